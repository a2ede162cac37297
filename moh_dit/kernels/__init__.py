"""Compute attention, adaLN and the MLP faster than the definitions in ``moh_dit.model``."""
