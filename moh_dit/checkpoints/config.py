"""Settings of ``moh-dit convert``.

moh-dit convert DiT-XL-2-256x256.pt                                   # describe the checkpoint
moh-dit convert DiT-XL-2-256x256.pt --to diffusers --output dit-xl-2
moh-dit convert runs/digits --to pipeline --with_code --output shared
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..common.errors import UserError
from ..common.paths import split_hub_id
from ..continue_tuning.config import MoHSettings

Format = Literal["moh-dit", "pipeline", "published", "diffusers", "diffusers-pipeline"]


@dataclass
class ModelOverrides:
    """Arguments of the model that its weights do not tell"""

    sample_size: int | None = None
    """Side of the latents, for example 64 for 512 pixels. The fixed position table is computed
    again."""
    num_classes: int | None = None
    """Number of classes, for a label table that has no row for the null class."""
    num_heads: int | list[int] | None = None
    """Heads h, one number or one per layer."""
    num_shared_heads: int | list[int | None] | None = None
    """Shared heads s, one number or one per layer."""
    num_active_routed_heads: int | list[int | None] | None = None
    """Routed heads k that each token activates, one number or one per layer."""
    head_dim: int | None = None
    """Width d of a head."""
    timestep_freq_shift: float | None = None
    """1 for a model trained in diffusers' DiTTransformer2DModel, whose timestep frequencies differ
    slightly from those of published models."""


@dataclass
class MoHOptions(MoHSettings):
    """Continue-tuning: make a MoH model from a dense one"""

    num_shared_heads: int | list[int | None] | None = None
    """Convert a dense model to MoH with this number of shared heads, for all layers or one per
    layer."""
    num_active_routed_heads: int | list[int | None] | None = None
    """Routed heads that each token activates, for all layers or one per layer."""
    data: str | None = None
    """Images for router=learned and shared_heads=importance: any data set that training accepts."""
    num_images: int = 512
    """Number of images to use from data."""


@dataclass
class ConvertConfig:
    """Source and output of a conversion"""

    source: str
    """Run, checkpoint, model or pipeline folder, .pt or .safetensors file, or a hub id of these."""
    to: Format | None = None
    """moh-dit: a model folder. pipeline: a folder with model, autoencoder and scheduler. published:
    a .pt file. diffusers: a DiTTransformer2DModel folder. diffusers-pipeline: a DiTPipeline folder.
    Without it, the source is only described."""
    output: str | None = None
    """File or folder to write; must not exist."""
    weights: str = "transformer"
    """Weights to convert: transformer (the averaged ones), raw, or another average of the
    checkpoint, such as ema-0.999."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Data type of the written weights; keep: as stored in the source."""
    model: ModelOverrides = field(default_factory=ModelOverrides)
    """Arguments of the model, for weights without a configuration that match no preset."""
    moh: MoHOptions = field(default_factory=MoHOptions)
    """Continue-tuning: a MoH model from a dense one (docs/continue_tuning.md)."""
    autoencoder: str | None = None
    """Autoencoder for a pipeline whose source has none, e.g. stabilityai/sd-vae-ft-ema."""
    with_code: bool = False
    """Write the code into the pipeline folder, so that diffusers opens it without this package."""
    license: str | None = None
    """Licence of the weights for the model card, e.g. apache-2.0; by default that of the source."""
    local_files_only: bool = False
    """Use the local cache of the hub and download nothing."""
    no_verify: bool = False
    """Do not compare the files of the source with their checksums."""

    def check_paths(self) -> None:
        """Check the source, the output and the options of the output format.

        Raises:
            UserError: the source does not exist, the output exists, or they do not fit ``to``.
        """
        split_hub_id(self.source)  # fails for a source that is neither a path nor a hub id
        if self.to is None:
            return
        if self.output is None:
            raise UserError("output is not set; name the file or folder to write, or omit --to")
        output = Path(self.output)
        if output.exists():
            raise UserError(f"output {output} exists; give another name")
        if self.to == "published" and output.suffix != ".pt":
            raise UserError(f"output {output} must end in .pt: --to published writes a .pt file")
        if self.with_code and self.to != "pipeline":
            raise UserError("with_code is possible only with --to pipeline")
