"""The commands that look inside: what each takes. The docstring under a field is its help text."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..common.errors import UserError
from ..sampling.config import Precision, SampleConfig, SamplingSettings
from ..training.config import TrainConfig


@dataclass(kw_only=True)
class HeadLoadConfig(SamplingSettings):
    """What to sample, count and draw"""

    checkpoint: str
    """Run folder (its newest checkpoint), one of its checkpoints, or a saved pipeline folder."""
    output: str
    """Folder for the pictures and numbers; must not exist."""
    weights: str = "transformer"
    """Averaged weights to use: transformer (the first), raw, or a folder such as ema-0.999."""
    class_labels: str | None = None
    """Classes by name or id, separated by commas; all of them unless given."""
    images_per_class: int = 8
    """Images to sample of each class: those of sample_dit.py's grid with the same settings."""
    timestep_ranges: int = 10
    """Equal parts of the process to keep apart."""
    layer: int | None = None
    """Layer of the bar charts, the timestep heat map and the maps; the last that routes unless
    given."""
    map_images: int = 6
    """Rows of the sheet of maps, the first image of a class each."""
    map_steps: int = 6
    """Columns of the sheet of maps: steps, evenly from noise to image."""
    batch_size: int = 64
    """Images per batch and process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; a GPU if there is one unless given."""
    dtype: Precision = "float32"
    """What the transformer runs in; latents and scheduler stay float32."""

    def as_sampling(self, checkpoint: str) -> SampleConfig:
        """What ``sample_dit.py`` would be told to make the same images; checks the values."""
        at_least = dict(timestep_ranges=1, map_images=0, map_steps=1)
        for name, least in at_least.items():
            if (value := getattr(self, name)) < least:
                raise UserError(f"{name} is {value}; it must be at least {least}")
        own = ("output", "checkpoint", "timestep_ranges", "layer", "map_images", "map_steps")
        shared = {name: value for name, value in vars(self).items() if name not in own}
        config = SampleConfig(checkpoint=checkpoint, output="grid.png", **shared)
        config.check()
        return config


@dataclass
class CostConfig(TrainConfig):
    """A run, given as train_dit.py takes it or in short, and the GPUs it is to run on"""

    preset: str | None = None
    """A published model as published (1000 classes, factor-8 autoencoder), e.g. MoH-DiT-XL/2-75."""
    image_size: int | None = None
    """Side of the images in pixels: short for data.image_size; 256 with preset unless given."""
    checkpoint: str | None = None
    """A run, one of its checkpoints or a saved pipeline instead: its model, and a run's settings
    of training where the next five are not given."""
    num_steps: int | None = None  # type: ignore[assignment]
    """Optimizer steps; those of checkpoint, else 400000."""
    batch_size: int | None = None  # type: ignore[assignment]
    """Images per optimizer step over all GPUs; that of checkpoint, else 256."""
    gradient_accumulation_steps: int | None = None  # type: ignore[assignment]
    """Micro-batches per optimizer step; those of checkpoint, else 1."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None  # type: ignore[assignment]
    """Arithmetic of the model; that of checkpoint, else no."""
    gradient_checkpointing: bool | None = None  # type: ignore[assignment]
    """Recompute activations in the backward pass; as checkpoint does, else false."""
    gpu: str = "H100"
    """GPU whose peak is the measure: A100, H100, H100 PCIe, H100 NVL, H200, H200 NVL, GH200."""
    num_gpus: int = 1
    """GPUs that share a batch."""
    mfu: float = 0.4
    """Share of the peak that training reaches (model FLOP utilisation)."""
    json: bool = False
    """Print everything as JSON instead of a table."""

    OPEN: ClassVar = ("num_steps", "batch_size", "gradient_accumulation_steps", "mixed_precision",
                      "gradient_checkpointing")  # fmt: skip

    def check_choice(self) -> None:
        """Raise ``UserError`` where the model is named twice."""
        own = [f"model.{name}" for name, value in vars(self.model).items() if value is not None]
        if self.checkpoint is not None and (self.preset or self.image_size or own):
            second = "preset" if self.preset else "image_size" if self.image_size else own[0]
            raise UserError(f"checkpoint says what the model is; leave out {second}")
        if self.preset is not None and self.model.preset is not None:
            raise UserError("preset and model.preset are both given; leave one out")
        if self.num_gpus < 1:
            raise UserError(f"num_gpus is {self.num_gpus}; it must be at least 1")


@dataclass
class ReportConfig:
    """The runs and their report"""

    runs: list[str]
    """Run folders: one, or several to set side by side."""
    output: str
    """The report, an .html file; must not exist."""
    replace: bool = False
    """Write over a report that exists, as one does while a run goes on."""
    max_grids: int = 24
    """Pictures of samples to embed of each run, evenly over its steps."""
