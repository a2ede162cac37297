"""Encode images into latents, and decode latents into images, with any supported autoencoder."""

import hashlib
import inspect
import json
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import diffusers
import torch
from diffusers import ModelMixin
from torch import Tensor

from ..common.errors import UserError
from .adapters import LatentScaling, adapter_class, adapter_of
from .pixel_autoencoder import PixelAutoencoder

PROBE_SIZE = 256  # divisible by the factor of every autoencoder
_layouts: MutableMapping[ModelMixin, "LatentLayout"] = WeakKeyDictionary()


class LatentLayout(NamedTuple):
    """Shape of the latents of an autoencoder."""

    channels: int
    factor: int  # image pixels per latent position along a side
    image_size: int | None  # the only image size; None for any multiple of the factor


def latent_scaling(vae: ModelMixin) -> LatentScaling:
    """Return the normalisation of the latents, on the device of the autoencoder.

    Raises:
        UserError: statistics whose number differs from the number of latent channels.
    """
    scaling = adapter_of(vae).scaling()
    for value in (scaling.factor, scaling.shift):
        if isinstance(value, Tensor) and len(value) != (channels := latent_layout(vae).channels):
            raise UserError(
                f"this autoencoder has {channels} latent channels, but statistics "
                f"(mean and standard deviation) of {len(value)}: correct its configuration or "
                "statistics file"
            )
    return scaling


def latent_layout(vae: ModelMixin) -> LatentLayout:
    """Return channels and factor of the latents, found by encoding a probe without computation."""
    if vae not in _layouts:
        _layouts[vae] = layout_of_config(type(vae).__name__, vae.config)
    return _layouts[vae]


def layout_of_config(class_name: str, config: Mapping[str, Any]) -> LatentLayout:
    """Return the layout of latents from the class and the configuration of an autoencoder.

    Raises:
        UserError: the class is not supported, or it does not encode RGB images.
    """
    adapter_type = adapter_class(class_name, "this autoencoder")
    kind = autoencoder_class(class_name)
    known = inspect.signature(kind).parameters
    try:
        with torch.device("meta"), torch.no_grad():
            vae = kind(**{name: value for name, value in config.items() if name in known}).eval()
            adapter = adapter_type(vae)
            size = adapter.image_size or PROBE_SIZE
            record = adapter.encode(torch.empty(1, 3, size, size))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"this {class_name} does not encode RGB images: {reason}") from None
    channels = record.shape[1] // (1 + adapter.posterior)
    return LatentLayout(channels, size // record.shape[2], adapter.image_size)


def autoencoder_class(class_name: str) -> type[ModelMixin]:
    """Return a supported class of diffusers, or the one for pixels."""
    if class_name == PixelAutoencoder.__name__:
        return PixelAutoencoder
    return getattr(diffusers, class_name)


def downsampling_factor(vae: ModelMixin) -> int:
    """Return the number of image pixels per latent position along a side."""
    return latent_layout(vae).factor


def latent_shape(vae: ModelMixin, image_size: int) -> tuple[int, int, int]:
    """Return the shape (C, h, w) of the latents of square images.

    Raises:
        UserError: the autoencoder does not encode images of this size.
    """
    channels, factor, only_size = latent_layout(vae)
    if only_size not in (None, image_size):
        raise UserError(
            f"image size {image_size} differs from {only_size}, the only size of this "
            f"{type(vae).__name__}: use {only_size}"
        )
    if image_size % factor:
        raise UserError(
            f"image size {image_size} is not divisible by the autoencoder's factor {factor}: "
            f"use {max(1, image_size // factor) * factor} or {(image_size // factor + 1) * factor}"
        )
    return channels, image_size // factor, image_size // factor


def moments_shape(vae: ModelMixin, image_size: int) -> tuple[int, int, int]:
    """Return the shape of ``encode_moments`` for one square image: (2C, h, w) or (C, h, w)."""
    channels, height, width = latent_shape(vae, image_size)
    return channels * (1 + adapter_of(vae).posterior), height, width


def autoencoder_identity(vae: ModelMixin) -> str:
    """Return a SHA-256 over weights and statistics per channel, as hexadecimal text.

    Names and float32 values of all weights count. Copies of the same autoencoder have the same
    identity, wherever they were loaded from.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    scaling = adapter_of(vae).scaling()
    if isinstance(scaling.factor, Tensor):
        digest.update(json.dumps(scaling.statistics()).encode())
    return digest.hexdigest()


@torch.no_grad()
def encode_moments(vae: ModelMixin, images: Tensor, autocast: torch.dtype | None = None) -> Tensor:
    """Encode images (B, 3, H, W) in −1 … 1 to unscaled moments of the posterior.

    Args:
        vae: the autoencoder.
        images: float (B, 3, H, W).
        autocast: compute convolutions and matrix products in this dtype; ``None`` for the dtype of
            the weights.

    Returns:
        Mean and log-variance, float32 (B, 2C, h, w). For an autoencoder without a posterior, the
        encoded point, float32 (B, C, h, w).
    """
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        return adapter_of(vae).encode(images.to(vae.dtype)).float()


def sample_posterior(moments: Tensor, noise: Tensor, scaling: LatentScaling) -> Tensor:
    """Draw scaled latents, float32 (B, C, h, w), from the posterior.

    Args:
        moments: result of :func:`encode_moments`.
        noise: standard normal noise, (B, C, h, w); zeros give the posterior mean. It is not used if
            there is no posterior.
        scaling: scaling of the autoencoder.
    """
    latents = moments.float()
    if scaling.posterior:
        mean, log_variance = latents.chunk(2, dim=1)
        latents = mean + torch.exp(0.5 * log_variance) * noise
    return (latents - scaling.shift) * scaling.factor


@torch.no_grad()
def decode_latents(vae: ModelMixin, latents: Tensor) -> Tensor:
    """Decode scaled latents (B, C, h, w) to images, float32 (B, 3, H, W), clipped to −1 … 1."""
    scaling = latent_scaling(vae)
    unscaled = latents / scaling.factor + scaling.shift
    with torch.autocast(latents.device.type, enabled=False):
        images = adapter_of(vae).decode(unscaled.to(vae.dtype))
    return images.float().clamp(-1, 1)
