"""Convert checkpoints between formats, and say what one is.

moh-dit-convert DiT-XL-2-256x256.pt                                   # which model is it?
moh-dit-convert DiT-XL-2-256x256.pt --to diffusers --output dit-xl-2
moh-dit-convert runs/digits --to pipeline --with_code --output shared

Weights go from file to file tensor by tensor, in the precision they have.
"""

from dataclasses import dataclass, field
from typing import Literal

Format = Literal["moh-dit", "pipeline", "published", "diffusers", "diffusers-pipeline"]


@dataclass
class Overrides:
    """The model, where its weights alone do not tell"""

    num_heads: int | list[int] | None = None
    """Heads h, one number or one per layer."""
    num_shared_heads: int | list[int | None] | None = None
    """Shared heads s, one number or one per layer."""
    num_active_routed_heads: int | list[int | None] | None = None
    """Routed heads k that each token activates, one number or one per layer."""
    head_dim: int | None = None
    """Width d of a head."""
    timestep_freq_shift: float | None = None
    """1 for a model trained in diffusers' DiTTransformer2DModel, which spreads the timestep
    frequencies over 127 steps where published models have 128."""


@dataclass
class MoHPlan:
    """Continue-tuning: MoH from a dense model"""

    num_shared_heads: int | list[int | None] | None = None
    """Make MoH of a dense model, with so many shared heads in every layer or in each."""
    num_active_routed_heads: int | list[int | None] | None = None
    """Routed heads that each token activates, likewise."""
    router: Literal["query_norm", "learned"] = "query_norm"
    """query_norm: without parameters. learned: MoH's own, fitted on data to select as that does."""
    shared_heads: Literal["first", "random", "importance"] = "first"
    """Which heads become shared: the first, a random choice, or the most important on data."""
    data: str | None = None
    """Images to measure importance or fit routers on: any source that training knows."""
    num_images: int = 512
    """Images drawn from data."""
    seed: int = 0
    """Seed of random choices."""


@dataclass
class ConvertConfig:
    """Source and output"""

    source: str
    """Run, checkpoint, model or pipeline folder, .pt or .safetensors file, or a hub id of any."""
    to: Format | None = None
    """moh-dit: a model folder. pipeline: with autoencoder and scheduler. published: a .pt file.
    diffusers: a DiTTransformer2DModel folder. diffusers-pipeline: a DiTPipeline folder. Unless
    given, only say what the source is."""
    output: str | None = None
    """What to write; must not exist."""
    weights: str = "transformer"
    """Which weights: transformer (the averaged ones), raw, or a folder such as ema-0.999."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Precision to write."""
    model: Overrides = field(default_factory=Overrides)
    """What the shapes of weights without a configuration leave open; presets need none of it."""
    moh: MoHPlan = field(default_factory=MoHPlan)
    """Continue-tuning: a MoH model from a dense one (docs/continue_tuning.md)."""
    autoencoder: str | None = None
    """Autoencoder of a pipeline whose source has none, e.g. stabilityai/sd-vae-ft-ema."""
    with_code: bool = False
    """Put the code beside a pipeline, so that diffusers opens it without this package."""
    license: str | None = None
    """Licence of the weights for the model card, e.g. apache-2.0; the source's unless given."""
    local_files_only: bool = False
    """Never ask the hub."""
