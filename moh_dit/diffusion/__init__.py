"""Diffusion processes: losses, samplers and reproducible noise."""
