"""Adapt the autoencoder classes of diffusers: one small class per family.

An adapter encodes images, returns the normalisation of the latents, and decodes. Some classes store
statistics of latents in their configuration, some in buffers, and some apply them themselves.
"""

import math
import threading
from functools import cached_property
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from torch import Tensor
from torch.nn import functional as F

from ..common.errors import UserError


class LatentScaling(NamedTuple):
    """Affine map from the autoencoder's latents to the diffusion model's: (z − shift) · factor.

    Attributes:
        factor, shift: one number for all channels, or one per channel as a tensor (C, 1, 1).
        posterior: whether the autoencoder encodes an image to the moments (2C, h, w) of a Gaussian
            posterior. Otherwise, it encodes an image to a point (C, h, w).
    """

    factor: float | Tensor = 1.0
    shift: float | Tensor = 0.0
    posterior: bool = True

    def statistics(self) -> dict[str, Any]:
        """Return factor and shift as numbers or lists of numbers, for JSON files."""
        return {
            name: value.flatten().tolist() if isinstance(value, Tensor) else value
            for name, value in (("factor", self.factor), ("shift", self.shift))
        }


class Adapter:
    """Use an ``AutoencoderKL``, and the base of other adapters.

    Args:
        vae: the autoencoder.

    Attributes:
        version: increases when an adapter encodes or normalises differently than before.
        posterior: see ``LatentScaling``.
        requires: package to install beside diffusers.
        image_size: the only image size that the autoencoder decodes; ``None`` for any multiple of
            its factor.
    """

    version = 1
    posterior = True
    requires: str | None = None
    image_size: int | None = None

    def __init__(self, vae: ModelMixin):
        self.vae, self.config = vae, vae.config

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in −1 … 1 to moments (B, 2C, h, w) or points (B, C, h, w)."""
        posterior = self.vae.encode(images).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents (B, C, h, w) to images (B, 3, H, W) in −1 … 1."""
        return self.vae.decode(latents).sample

    def scaling(self) -> LatentScaling:
        """Return the scaling in the configuration.

        With ``latents_mean`` and ``latents_std``, it is (z − mean) / std · scaling_factor, as in
        diffusers' Stable Diffusion XL pipeline.
        """
        given = getattr(self.config, "scaling_factor", 1.0)
        if not (isinstance(given, int | float) and 0 < abs(given) < math.inf):
            raise UserError(f"scaling_factor is {given} in config.json: set a number other than 0")
        factor = float(given)
        mean = getattr(self.config, "latents_mean", None)
        std = getattr(self.config, "latents_std", None)
        if mean is None and std is None:
            shift = float(getattr(self.config, "shift_factor", None) or 0.0)
            return LatentScaling(factor, shift, self.posterior)
        if mean is None or std is None:
            raise UserError(
                "this autoencoder has only one of latents_mean and latents_std: set both or neither"
            )
        return LatentScaling(factor / self._per_channel(std), self._per_channel(mean))

    def _per_channel(self, values: Any) -> Tensor:
        numbers = torch.as_tensor(values, dtype=torch.float32, device=self.vae.device)
        return numbers.reshape(-1, 1, 1)


class PointAdapter(Adapter):
    """Use an autoencoder without a posterior: ``AutoencoderDC``, ``AutoencoderTiny`` or pixels."""

    posterior = False

    def encode(self, images: Tensor) -> Tensor:
        return self.vae.encode(images, return_dict=False)[0]


class RaeAdapter(PointAdapter):
    """Use ``AutoencoderRAE``: images in 0 … 1, normalised inside its ``encode`` and ``decode``."""

    requires = "transformers"

    @cached_property
    def image_size(self) -> int:  # type: ignore[override]
        return int(self.vae.decoder_image_size)

    def encode(self, images: Tensor) -> Tensor:
        return super().encode((images + 1) / 2)

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents) * 2 - 1

    def scaling(self) -> LatentScaling:
        return LatentScaling(posterior=False)


class Flux2Adapter(Adapter):
    """Use ``AutoencoderKLFlux2``: patches of 2×2 become channels, normalised by a batch norm."""

    def encode(self, images: Tensor) -> Tensor:
        mean, log_variance = super().encode(images).chunk(2, dim=1)
        return torch.cat([self._pack(mean), self._pack(log_variance)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(F.pixel_shuffle(latents, self.config.patch_size[0]))

    def scaling(self) -> LatentScaling:
        statistics = self.vae.bn
        std = torch.sqrt(statistics.running_var.float() + self.config.batch_norm_eps)
        return LatentScaling(1 / self._per_channel(std), self._per_channel(statistics.running_mean))

    def _pack(self, latents: Tensor) -> Tensor:
        return F.pixel_unshuffle(latents, self.config.patch_size[0])


class QwenImageAdapter(Adapter):
    """Use ``AutoencoderKLQwenImage``, which encodes videos: an image is a video of one frame."""

    _lock = threading.Lock()  # the class stores the state of a call on the autoencoder

    def encode(self, images: Tensor) -> Tensor:
        with self._lock:
            return super().encode(images[:, :, None])[:, :, 0]

    def decode(self, latents: Tensor) -> Tensor:
        with self._lock:
            return super().decode(latents[:, :, None])[:, :, 0]


ADAPTERS: dict[str, type[Adapter]] = {
    "AutoencoderKL": Adapter,
    "AutoencoderDC": PointAdapter,
    "AutoencoderKLFlux2": Flux2Adapter,
    "AutoencoderKLQwenImage": QwenImageAdapter,
    "AutoencoderRAE": RaeAdapter,
    "AutoencoderTiny": PointAdapter,
    "PixelAutoencoder": PointAdapter,
}


def adapter_of(vae: ModelMixin) -> Adapter:
    """Return the adapter of an autoencoder.

    Raises:
        UserError: its class has no adapter.
    """
    return adapter_class(type(vae).__name__, "this autoencoder")(vae)


def adapter_class(class_name: Any, source: str) -> type[Adapter]:
    """Return the adapter of a class; ``source`` names the autoencoder in the error message."""
    if class_name not in ADAPTERS:
        known = ", ".join(name for name in ADAPTERS if name.startswith("Autoencoder"))
        raise UserError(
            f"{source} is of class {class_name}, which is not supported: use one of {known}"
        )
    return ADAPTERS[class_name]
