"""Turn a dense model into MoH and continue its training."""
