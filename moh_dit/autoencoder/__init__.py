"""Load an autoencoder, encode images into latents, and decode latents into images."""

from .adapters import LatentScaling, adapter_of
from .codec import (
    autoencoder_identity,
    decode_latents,
    downsampling_factor,
    encode_moments,
    latent_layout,
    latent_scaling,
    latent_shape,
    layout_of_config,
    moments_shape,
    sample_posterior,
)
from .loading import EMBEDDED, PIXELS, load_autoencoder, stored_class

__all__ = [
    "EMBEDDED",
    "PIXELS",
    "LatentScaling",
    "adapter_of",
    "autoencoder_identity",
    "decode_latents",
    "downsampling_factor",
    "encode_moments",
    "latent_layout",
    "latent_scaling",
    "latent_shape",
    "layout_of_config",
    "load_autoencoder",
    "moments_shape",
    "sample_posterior",
    "stored_class",
]
