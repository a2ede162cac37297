"""The commands that look inside: what each takes. The docstring under a field is its help text."""

from dataclasses import dataclass
from typing import Literal

from ..cli import run_program
from ..errors import UserError
from ..sampling.config import Precision, SampleConfig, SamplingSettings


@dataclass(kw_only=True)
class HeadLoadConfig(SamplingSettings):
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


def _head_load(config: HeadLoadConfig) -> None:
    from .measure import measure_head_load  # here, so that --help stays quick

    measure_head_load(config)


def head_load() -> None:
    run_program(
        _head_load,
        HeadLoadConfig,
        prog="moh-dit-head-load",
        description="Show which attention heads the tokens of each class choose: sample images, "
        "count, and draw. Runs on several processes behind accelerate launch.",
        example="moh-dit-head-load --checkpoint runs/digits --class_labels 0,1,7 "
        "--guidance_scale 2 --num_inference_steps 50 --output head_load",
    )
