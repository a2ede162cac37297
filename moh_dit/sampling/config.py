"""Everything that defines a sampling job. The docstring under a field is its help text."""

from dataclasses import dataclass
from typing import Literal

from ..errors import UserError


@dataclass(kw_only=True)
class SamplingSettings:
    """What an image depends on beside the weights, its index and its class."""

    num_inference_steps: int = 250
    """Denoising steps, at most the length of the trained process."""
    guidance_scale: float = 4.0
    """Guidance weight; 1 for none."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only in this part of the process, as shares of it from 0 (image) to 1 (pure noise)."""
    guidance_channels: int | None = None
    """Guide only the first so many latent channels; 3 compares with the papers. None for all."""
    scheduler: str | None = None
    """Sampler by name, e.g. ddpm, ddim, dpmsolver++; the one saved with the model unless given."""
    seed: int = 0
    """Seed of all noise: an image depends on it, the image's index and its class alone."""


@dataclass(kw_only=True)
class SampleConfig(SamplingSettings):
    checkpoint: str
    """Run folder (its newest checkpoint), one of its checkpoints, or a saved pipeline folder."""
    output: str
    """A grid for people: .png. A set for evaluation (with num_samples): .npz."""
    num_samples: int | None = None
    """Make an exact set of so many images instead of a grid."""
    weights: str = "transformer"
    """Averaged weights to use: transformer (the first), raw, or a folder such as ema-0.999."""

    class_labels: str | None = None
    """Classes by name or id, separated by commas; all of them unless given."""
    images_per_class: int = 8
    """Columns of a grid."""
    labels: Literal["balanced", "drawn"] = "balanced"
    """Classes of a set: image i of class i mod number of classes, or drawn evenly at random."""

    batch_size: int = 64
    """Images per batch and process."""
    decode_batch_size: int | None = None
    """Images that the autoencoder decodes at once; batch_size unless given."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; a GPU if there is one unless given."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the transformer runs in; latents and scheduler stay float32."""

    def check(self) -> None:
        """Raise ``UserError`` for values that mean nothing, before any work."""
        for name in ("num_samples", "images_per_class", "batch_size", "decode_batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"seed is {self.seed}; give one in 0 … 2^64 - 1")
