"""MoHDiTPipeline, model cards, and pipelines saved with their code."""
