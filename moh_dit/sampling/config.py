"""Everything that defines a sampling job. The docstring under a field is its help text."""

from dataclasses import dataclass
from typing import Literal

from ..common.errors import UserError

Precision = Literal["float32", "bfloat16", "float16"]


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
class FromTo:
    checkpoint: str
    """Run folder (its newest checkpoint), a checkpoint or pipeline folder, a published file, or a
    hub id of any of these (docs/checkpoints.md)."""
    output: str
    """A grid: .png. Its denoising: .gif, .webp, .mp4. A set: .npz, .tar (WebDataset), a folder."""


@dataclass(kw_only=True)
class SampleConfig(SamplingSettings, FromTo):  # the last base comes first in --help
    """The job"""

    weights: str = "transformer"
    """Averaged weights to use: transformer (the first), raw, or a folder such as ema-0.999."""
    autoencoder: str | None = None
    """Autoencoder for a checkpoint that has none, e.g. stabilityai/sd-vae-ft-ema."""
    guidance_checkpoint: str | None = None
    """Autoguidance: guide away from this weaker model instead of from the null class."""
    guidance_weights: str = "transformer"
    """Which weights of guidance_checkpoint."""

    class_labels: str | None = None
    """Classes by name or id, separated by commas; all of them unless given."""
    images_per_class: int = 8
    """Columns of a grid."""
    rows: str | None = None
    """Sweep down a contact sheet, e.g. "guidance_scale=1,2,4"; also class_labels, seed,
    num_inference_steps, scheduler, weights. Every cell has the same index, so the same noise."""
    columns: str | None = None
    """Sweep across it, likewise; unless given, images_per_class different images."""
    interpolate: int | None = None
    """A strip per class instead, from its image 0 to its image 1 in so many images."""
    frames: int = 24
    """Frames of an animation."""

    num_samples: int | None = None
    """Make an exact set of so many images instead of a grid."""
    labels: Literal["balanced", "drawn"] = "balanced"
    """Classes of a set: in turn, or drawn evenly at random."""

    batch_size: int = 64
    """Images per batch and process; on the CPU rounded up to whole units (docs/sampling.md)."""
    decode_batch_size: int | None = None
    """Images that the autoencoder decodes at once; batch_size unless given."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; a GPU if there is one unless given."""
    dtype: Precision = "float32"
    """What the transformer runs in; latents and scheduler stay float32."""
    decode_dtype: Precision = "float32"
    """What the autoencoder runs in."""
    allow_tf32: bool = False
    """Let CUDA matrix products round their float32 inputs to TF32."""
    compile: bool = False
    """torch.compile the transformer on a GPU; batches then have one size, the last one padded."""
    cuda_graphs: bool = False
    """Record the compiled transformer as CUDA graphs: for small models and batches."""

    def check(self) -> None:
        """Raise ``UserError`` for values that mean nothing, before any work."""
        at_least = dict(num_samples=1, images_per_class=1, batch_size=1, decode_batch_size=1)
        for name, least in dict(at_least, interpolate=2, frames=2).items():
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"{name} is {value}; it must be at least {least}")
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"seed is {self.seed}; give one in 0 … 2^64 - 1")
        sweep = bool(self.rows or self.columns)
        chosen = {"num_samples": self.num_samples, "interpolate": self.interpolate}
        modes = [name for name, value in chosen.items() if value] + ["rows, columns"] * sweep
        if len(modes) > 1:
            raise UserError(f"{modes[0]} and {modes[1]} exclude each other; give one")
        if self.cuda_graphs and not self.compile:
            raise UserError("cuda_graphs needs compile: add --compile true")
