"""Settings of the analysis commands. The docstring under a field is its help text."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from fid_eval import EvaluationError
from fid_eval.choices import check_reconstruction_metrics

from ..common.errors import UserError
from ..common.paths import (
    require_autoencoder,
    require_data,
    require_new_output,
    split_hub_id,
)
from ..sampling.config import (
    ModelSettings,
    SampleConfig,
    SamplingSettings,
    require_at_least,
    require_writable_output,
)
from ..training.config import TrainConfig


@dataclass(kw_only=True)
class HeadLoadConfig(SamplingSettings, ModelSettings):
    """What to sample, count and draw"""

    output: str
    """Folder for figures and numbers; it must not exist."""
    class_labels: str | None = None
    """Class names or ids, separated by commas (default: all classes)."""
    images_per_class: int = 8
    """Images to sample per class: the same as sample_dit.py samples with these settings."""
    timestep_ranges: int = 10
    """Number of equal timestep ranges to count separately."""
    layer: int | None = None
    """Layer of the class figures, the timestep figure and the patch maps (default: the last layer
    with routed heads)."""
    map_images: int = 6
    """Rows of the sheet of patch maps; row i shows the first image of class i."""
    map_steps: int = 6
    """Columns of the sheet of patch maps: steps, evenly spaced from noise to image."""

    def check_paths(self) -> None:
        """Check the settings and both paths without importing torch."""
        self.to_sample_config()
        split_hub_id(self.checkpoint)
        require_writable_output(Path(self.output))

    def to_sample_config(self) -> SampleConfig:
        """Return the settings with which ``sample_dit.py`` samples the same images.

        Raises:
            UserError: a value is invalid.
        """
        require_at_least(self, timestep_ranges=1, map_images=0, map_steps=1)
        if self.cache is not None:
            raise UserError("cache skips layers, whose head load cannot be counted; leave it out")
        config = SampleConfig.from_config(self, output="grid.png")
        config.check()
        return config


@dataclass
class CostConfig(TrainConfig):
    """A training run and the GPUs to run it on"""

    preset: str | None = None
    """Published model, e.g. MoH-DiT-XL/2-75, with 1000 classes and a factor-8 autoencoder."""
    image_size: int | None = None
    """Side of the images in pixels: short for data.image_size (default with preset: 256)."""
    checkpoint: str | None = None
    """Run, checkpoint or saved pipeline to take the model from. A run also provides the defaults of
    the next five settings."""
    num_steps: int | None = None  # type: ignore[assignment]
    """Number of optimizer steps (default: the checkpoint's, or 400,000)."""
    batch_size: int | None = None  # type: ignore[assignment]
    """Images per optimizer step over all GPUs (default: the checkpoint's, or 256)."""
    gradient_accumulation_steps: int | None = None  # type: ignore[assignment]
    """Micro-batches per optimizer step (default: the checkpoint's, or 1)."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None  # type: ignore[assignment]
    """Precision of the model's arithmetic (default: the checkpoint's, or no)."""
    gradient_checkpointing: bool | None = None  # type: ignore[assignment]
    """Recompute activations in the backward pass (default: as the checkpoint's run, or false)."""
    gpu: str = "H100"
    """GPU type: A100, H100, H100 PCIe, H100 NVL, H200, H200 NVL, GH200."""
    num_gpus: int = 1
    """Number of GPUs that share a batch."""
    mfu: float = 0.4
    """Model FLOP utilisation: fraction of the peak FLOP/s that training reaches."""
    json: bool = False
    """Print the result as JSON instead of a table."""

    FROM_CHECKPOINT: ClassVar = ("num_steps", "batch_size", "gradient_accumulation_steps",
                                 "mixed_precision", "gradient_checkpointing")  # fmt: skip

    def check_paths(self) -> None:
        """Raise ``UserError`` for contradicting settings and for a checkpoint that is missing."""
        own = [f"model.{name}" for name, value in vars(self.model).items() if value is not None]
        if self.checkpoint is not None and (self.preset or self.image_size or own):
            second = "preset" if self.preset else "image_size" if self.image_size else own[0]
            raise UserError(f"checkpoint already determines the model; leave out {second}")
        if self.preset is not None and self.model.preset is not None:
            raise UserError("preset and model.preset are both given; leave one out")
        require_at_least(self, num_gpus=1)
        if not 0 < self.mfu <= 1:
            raise UserError(f"mfu is {self.mfu}; it must be above 0 and at most 1")
        if self.checkpoint is not None and not Path(self.checkpoint).exists():
            raise UserError(f"checkpoint {self.checkpoint} does not exist")


@dataclass
class ReportConfig:
    """The runs and their report"""

    runs: list[str]
    """Run folders; several runs are shown side by side."""
    output: str
    """Path of the report, an .html file."""
    replace: bool = False
    """Overwrite an existing report, e.g. to update it while a run continues."""
    max_grids: int = 24
    """Maximum number of sample grids per run, evenly spaced over its steps."""

    def check_paths(self) -> None:
        """Raise ``UserError`` for missing runs or an invalid output, without importing torch."""
        output = Path(self.output)
        if output.suffix not in (".html", ".htm"):
            raise UserError(f"output {output}: a report is an .html file")
        if output.exists() and not self.replace:
            raise UserError(f"output {output} exists; give another name, or --replace")
        require_at_least(self, max_grids=1)
        for run in self.runs:
            if not Path(run).is_dir():
                raise UserError(f"run {run} does not exist, or is not a folder")


@dataclass
class ReconstructionConfig:
    """An autoencoder and held-out images"""

    autoencoder: str
    """"digits", a folder or a Hub id."""
    data: str
    """Images that were not used in training: "digits", a folder with one sub-folder for each class,
    tar shards, or hf://OWNER/NAME."""
    image_size: int
    """Side of the images in pixels."""
    output: str
    """JSON file to write; it must not exist."""
    metrics: str = "rfid,psnr,ssim,lpips"
    """Metrics, separated by commas. rFID compares with the same images."""
    extractor: str = "inception"
    """Feature network of rFID, as in fid-eval."""
    weights: dict[str, str] = field(default_factory=dict)
    """Local weights of the extractor and of LPIPS, {"inception": PATH, "lpips": PATH}
    (default: download)."""
    weights_sha256: dict[str, str] = field(default_factory=dict)
    """SHA-256 of weights other than the published ones, by the same names."""
    backbone: Literal["vgg", "alex"] = "vgg"
    """Network of LPIPS."""
    batch_size: int = 64
    """Images that are processed at once."""
    num_workers: int = 0
    """Data-loader workers."""

    def check_paths(self) -> None:
        """Raise ``UserError`` for missing data or autoencoder, or an output that exists."""
        require_data(self.data)
        require_autoencoder(self.autoencoder)
        require_new_output(Path(self.output))
        require_at_least(self, image_size=1, batch_size=1, num_workers=0)
        try:
            check_reconstruction_metrics(self.metrics.split(","))
        except EvaluationError as error:
            raise UserError(str(error)) from None


@dataclass
class WatchConfig:
    """The run to follow"""

    run: str
    """Run folder."""
    interval: float = 2.0
    """Seconds between two looks at the folder."""
    once: bool = False
    """Print one line and end."""

    def check_paths(self) -> None:
        """Raise ``UserError`` for a run that does not exist."""
        if self.interval <= 0:
            raise UserError(f"interval is {self.interval}; it must be above 0")
        if not Path(self.run).is_dir():
            raise UserError(f"run {self.run} does not exist, or is not a folder")
