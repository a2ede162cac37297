"""Settings of sampling. The docstring under a field is its help text."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from ..common.errors import UserError
from ..common.paths import require_new_output, split_hub_id

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(kw_only=True)
class SamplingSettings:
    """Settings that determine an image, together with the weights, its index and its class."""

    num_inference_steps: int = 250
    """Denoising steps, at most the number of training timesteps."""
    guidance_scale: float = 4.0
    """Guidance weight; 1 turns guidance off."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only between these two fractions of the process: 0 is the image, 1 is pure noise."""
    guidance_channels: int | None = None
    """Guide only the first N latent channels (default: all). The papers guide 3 of 4."""
    scheduler: str | None = None
    """Sampler, e.g. ddpm, ddim, dpmsolver++ (default: the one saved with the model)."""
    seed: int = 0
    """Seed of all noise. The noise of an image depends only on the seed and the image's index."""
    cache: Literal["first-block", "taylorseer", "magcache"] | None = None
    """Skip transformer blocks in some steps: faster, but approximate (docs/sampling.md)."""
    cache_threshold: float | None = None
    """Error up to which first-block (default: 0.05) and magcache (default: 0.06) skip blocks."""
    cache_interval: int | None = None
    """Compute one of N steps with taylorseer, and extrapolate the others (default: 5)."""

    @classmethod
    def from_config(cls, config: Any, **settings: Any) -> Self:
        """Create an instance from ``settings`` and the fields of ``config`` with the same names."""
        names = {field.name for field in fields(cls)} & vars(config).keys()
        return cls(**{**{name: getattr(config, name) for name in names}, **settings})


@dataclass(kw_only=True)
class ModelSettings:
    """Which model to load, and how to run it; shared by all programs that sample."""

    checkpoint: str
    """Run folder (its newest checkpoint), a checkpoint or pipeline folder, a published file, or a
    Hub id of any of these (docs/checkpoints.md)."""
    weights: str = "transformer"
    """Weights to use: transformer (the first average), raw, or a folder such as ema-0.999."""
    no_verify: bool = False
    """Do not compare the files with their checksums."""
    batch_size: int = 64
    """Images per batch and process. The CPU rounds it up to whole units (docs/sampling.md)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on; auto uses a GPU if there is one."""
    dtype: Precision = "float32"
    """Precision of the transformer; latents and scheduler stay float32."""


@dataclass(kw_only=True)
class SampleConfig(SamplingSettings, ModelSettings):  # --help lists the last base first
    """What to sample"""

    output: str
    """Grid: .png. Animation of the denoising: .gif, .webp, .mp4. Set of images: .npz, .tar
    (WebDataset), or a folder (no suffix)."""
    autoencoder: str | None = None
    """Autoencoder for a checkpoint that has none, e.g. stabilityai/sd-vae-ft-ema."""
    guidance_checkpoint: str | None = None
    """Weaker model for autoguidance, used instead of the null class."""
    guidance_weights: str = "transformer"
    """Weights of guidance_checkpoint to use."""

    class_labels: str | None = None
    """Class names or ids, separated by commas (default: all classes)."""
    images_per_class: int = 8
    """Columns of a grid."""
    rows: str | None = None
    """Setting to vary from row to row of a contact sheet, e.g. "guidance_scale=1,2,4". Also
    class_labels, seed, num_inference_steps, scheduler, weights, cache_threshold, cache_interval.
    All cells share one image index."""
    columns: str | None = None
    """Setting to vary from column to column, as in rows (default: images_per_class images)."""
    interpolate: int | None = None
    """Draw a strip of N images per class that blends from its image 0 to its image 1."""
    frames: int = 24
    """Frames of an animation."""

    num_samples: int | None = None
    """Sample a set of exactly N images instead of a grid."""
    labels: Literal["balanced", "drawn"] = "balanced"
    """Classes of a set: balanced takes them in turn, drawn picks each uniformly at random."""
    resume: bool = False
    """Continue an unfinished set, or start if there is none."""

    decode_batch_size: int | None = None
    """Images that the autoencoder decodes at once (default: batch_size)."""
    decode_dtype: Precision = "float32"
    """Precision of the autoencoder."""
    allow_tf32: bool = False
    """Let float32 matrix products on CUDA use TF32."""
    compile: bool = False
    """Compile the transformer with torch.compile (GPU only). The last batch is then padded."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Replay forward passes as CUDA graphs, which saves the host the launch of every kernel; auto:
    if the GPU is from NVIDIA and the model has no hooks or adapters."""

    def check(self) -> None:
        """Raise ``UserError`` for values that are invalid for every model."""
        require_at_least(self, num_samples=1, images_per_class=1, batch_size=1)
        require_at_least(self, decode_batch_size=1, interpolate=2, frames=2)
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"seed is {self.seed}; it must be between 0 and 2^64 - 1")
        sweep = bool(self.rows or self.columns)
        chosen = {"num_samples": self.num_samples, "interpolate": self.interpolate}
        modes = [name for name, value in chosen.items() if value] + ["rows/columns"] * sweep
        if len(modes) > 1:
            raise UserError(f"{modes[0]} and {modes[1]} cannot be combined; give only one of them")

    def check_paths(self) -> None:
        """Check the settings, the checkpoint paths and the output path, without importing torch.

        Raises:
            UserError: a setting is invalid; a checkpoint does not exist; the output exists, cannot
                be written or has the wrong suffix; an unfinished set exists without ``resume``.
        """
        from . import output_formats

        self.check()
        split_hub_id(self.checkpoint)
        if self.guidance_checkpoint is not None:
            split_hub_id(self.guidance_checkpoint, "guidance_checkpoint")
        output, animations = Path(self.output), output_formats.ANIMATIONS
        require_writable_output(output)
        if self.num_samples is not None:
            output_formats.check_set_output(output, self.resume)
        elif output.suffix not in (".png", *animations):
            raise UserError(
                f"output {output}: a grid is written as .png, an animation as "
                f"{', '.join(animations)}; to write a set, give num_samples"
            )
        else:
            output_formats.check_animation(output)
        if output.suffix in animations and (self.rows or self.columns or self.interpolate):
            raise UserError(f"output {output}: rows, columns and interpolate are written as .png")
        settings = output_formats.settings_path(output)
        if settings.exists() and not output_formats.has_unfinished_set(output):
            raise UserError(f"{settings} exists, but {output} does not; give another name")


def require_at_least(config: Any, **minima: int) -> None:
    """Raise ``UserError`` if a field is below its minimum; fields that are ``None`` pass."""
    for name, least in minima.items():
        if (value := getattr(config, name)) is not None and value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")


def require_writable_output(output: Path) -> None:
    """Raise ``UserError`` if ``output`` exists or its folder is not writable."""
    require_new_output(output)
    folder = next(path for path in output.absolute().parents if path.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"output {output}: {folder} is not a writable folder")
