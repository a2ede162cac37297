"""MoH-DiT: Diffusion Transformers with Mixture-of-Head attention."""

__version__ = "0.1.0"
