"""Train diffusion models and autoencoders."""
