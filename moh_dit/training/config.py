"""Everything that defines a training run. The docstring under a field is its help text.

Modules that import torch are imported where they are used, so that ``--help`` is quick.
"""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..common.errors import UserError
from ..model.presets import preset_config

if TYPE_CHECKING:
    from ..diffusion.objectives import Objective

WITHOUT_WARMUP = ("constant", "piecewise_constant")
# What settings may be, by dotted key, where they are set at all.
SMALLEST = {
    "num_steps": 1, "log_every": 1, "checkpoint_every": 1, "gradient_accumulation_steps": 1,
    "keep_checkpoints": 0, "ema_snapshot_every": 0, "balance_loss_weight": 0,
    "model.depth": 1, "model.patch_size": 1, "model.hidden_size": 1, "model.num_classes": 1,
    "model.label_init_std": 0, "data.num_workers": 0, "optimizer.weight_decay": 0,
    "optimizer.lr_warmup_steps": 0, "evaluation.sample_every": 0, "evaluation.fid_every": 0,
    "evaluation.num_inference_steps": 1,
}  # fmt: skip
MAY_BE_INFINITE = ("peak_tflops", "objective.min_snr_gamma", "optimizer.max_grad_norm")
POSITIVE = ("model.mlp_ratio", "optimizer.learning_rate", *MAY_BE_INFINITE)


@dataclass
class ModelConfig:
    """The model: a preset, its fields, or both"""

    preset: str | None = None
    """Published model to start from, e.g. MoH-DiT-XL/2-75 or DiT-B/4. Fields below override it."""
    patch_size: int | None = None
    """Side of a token, in latent pixels."""
    hidden_size: int | None = None
    """Model width C."""
    depth: int | None = None
    """Number of blocks."""
    num_heads: int | list[int] | None = None
    """Heads h, one number or one per layer."""
    num_shared_heads: int | list[int | None] | None = None
    """Shared heads s, one number or one per layer; none for plain multi-head attention."""
    num_active_routed_heads: int | list[int | None] | None = None
    """Routed heads k that each token activates, one number or one per layer."""
    head_dim: int | None = None
    """Width d of a head; C / h unless given."""
    router: Literal["learned", "query_norm"] | None = None
    """How routed heads are chosen: by weights of its own, or by the norms of the queries."""
    mlp_ratio: float | None = None
    """Hidden width of the MLP over C."""
    label_init_std: float | None = None
    """Spread of the label table at the start: 0.02 as published, 0.5 for short runs."""
    timestep_freq_shift: float | None = None
    """1 to go on from a model trained in diffusers' DiTTransformer2DModel; 0 unless given."""
    num_classes: int | None = None
    """Classes; counted in the data unless given. May exceed those of the data, not fall short."""

    def resolve(self, initial: dict[str, Any] | None = None, **derived: Any) -> dict[str, Any]:
        """Arguments of ``MoHDiTTransformer2DModel``.

        The preset, or else what of the configuration ``initial`` is set here; then what is given,
        then ``derived``.
        """
        names = {field.name for field in fields(self)} - {"num_classes"}
        config = {key: value for key, value in (initial or {}).items() if key in names}
        if self.preset:
            config = preset_config(self.preset)
        given = {k: v for k, v in vars(self).items() if v is not None and k != "preset"}
        config = {**config, **given, **derived}
        if missing := [key for key in ("hidden_size", "depth", "num_heads") if key not in config]:
            raise UserError(f"model.{missing[0]} is not set; set it, or name a model.preset")
        return config


@dataclass
class DataConfig:
    """What is learned from"""

    source: str = "digits"
    """"digits" (embedded), a folder with one sub-folder of images per class, tar shards, or
    hf:NAME (docs/data.md). Encoded at the start: by one process into memory, by several into the
    run folder."""
    latents: str | None = None
    """Folder written by moh-dit-encode, in place of source: for sets that outgrow memory."""
    num_workers: int = 2
    """Loader processes per training process, for latents on disk."""
    image_size: int = 32
    """Side of the square images the model is trained on, in pixels."""
    autoencoder: str = "digits"
    """"digits" (embedded), a folder, or a hub id of an AutoencoderKL."""
    horizontal_flip: bool = False
    """Mirror every image with probability one half, anew each epoch."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read and say how many, instead of stopping."""


@dataclass
class ObjectiveConfig:
    """What the model learns to predict"""

    prediction_type: Literal["epsilon", "v_prediction", "flow"] = "epsilon"
    """What the model predicts: noise, v (arXiv 2202.00512), or the velocity of a rectified flow."""
    learned_variance: bool = True
    """With epsilon: also predict the variance of each step (Improved DDPM)."""
    min_snr_gamma: float | None = None
    """Weigh timesteps by min-SNR-γ (arXiv 2303.09556; γ = 5 there); none for even weights."""
    logit_normal: tuple[float, float] = (0.0, 1.0)
    """With flow: mean and standard deviation of the logit of the drawn times."""

    def build(self, device: Any) -> "Objective":
        """The objective, or a ``UserError`` where the settings contradict each other."""
        from ..diffusion.objectives import FlowObjective, NoiseObjective

        if self.prediction_type != "flow":
            return NoiseObjective(
                self.prediction_type, self.learned_variance, self.min_snr_gamma, device
            )
        if self.min_snr_gamma is not None:
            raise UserError("objective.min_snr_gamma goes with epsilon or v_prediction, not flow")
        return FlowObjective(*self.logit_normal)


@dataclass
class OptimizerConfig:
    """AdamW and its learning rate"""

    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's averages of the gradient and of its square."""
    weight_decay: float = 0.0
    """Decoupled weight decay of every parameter not named next."""
    no_weight_decay: list[str] = field(default_factory=lambda: ["*.bias", "*.embedding_table.*"])
    """Patterns of parameter names without decay; by default biases and the label table."""
    lr_schedule: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "piecewise_constant",
    ] = "constant"
    """Learning-rate schedule (diffusers.optimization)."""
    lr_schedule_options: dict[str, int | float | str] = field(default_factory=dict)
    """Its further options: num_cycles (cosine…), power (polynomial), step_rules
    (piecewise_constant, e.g. "1:10000,0.1")."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises linearly; the schedule must be one with warm-up."""
    max_grad_norm: float | None = None
    """Clip the global gradient norm to this; none for no clipping."""


@dataclass
class EvaluationConfig:
    """Samples and metrics while it trains"""

    sample_every: int = 0
    """Steps between grids of samples; 0 for one at the end."""
    fid_every: int = 0
    """Steps between evaluations of generated samples, the last step included; 0 for none."""
    num_samples: int = 1000
    """Samples in an evaluation."""
    num_inference_steps: int = 50
    """Denoising steps of grids and evaluations."""
    guidance_scale: float = 1.5
    """Classifier-free guidance weight of grids and evaluations; 1 for none."""
    metrics: list[str] = field(default_factory=lambda: ["fid"])
    """Metrics of fid_eval to follow."""
    feature_extractor: str = "inception"
    """Feature extractor of the evaluation, a name or import path known to fid_eval."""
    feature_extractor_weights: str | None = None
    """Its weights, a local file; downloaded unless given."""
    reference: str | None = None
    """Reference of the evaluation: a file or saved name of fid_eval; the training images unless
    given."""


@dataclass
class TrainConfig:
    """The run, its length and how it computes"""

    run_dir: str = "runs/train"
    """Folder of this run; must not exist unless resuming."""
    resume: bool = False
    """Continue the run in run_dir from its newest checkpoint, or start it if there is none."""
    seed: int = 0
    """Seed of the initial weights, data order, noise, timesteps and label dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    init_from: str | None = None
    """Start from these weights: a run, a model folder, a file or a hub id (docs/checkpoints.md).
    Where no model.preset is set, their own settings hold for those of model that are not given."""
    num_steps: int = 400_000
    """Optimizer steps of the whole run."""
    batch_size: int = 256
    """Images per optimizer step, over all processes and accumulation steps."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    label_dropout: float = 0.1
    """Probability of training an image as the null class, for guidance."""
    balance_loss_weight: float = 0.01
    """Weight of the load-balance loss, which is 1 at even routing."""
    balance_loss: Literal["global", "two_pass", "published"] = "global"
    """Load over the batch of all processes on one scale, or per process as published. two_pass:
    global, and exact under gradient accumulation, for one more forward pass."""
    ema_decays: list[float] = field(default_factory=lambda: [0.9999])
    """Decays of the averaged weights; the first is sampled from. All warm up with the run."""
    ema_power_stds: list[float] = field(default_factory=list)
    """Relative widths of power-function averages to keep snapshots of, e.g. [0.05, 0.1]: from two,
    an average of any width can be made after the run (docs/training.md). None unless given."""
    ema_snapshot_every: int = 0
    """Steps between those snapshots, which are all kept; 0 for checkpoint_every."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Arithmetic of the model; weights, averages and loss stay float32."""
    allow_tf32: bool = True
    """Let CUDA matrix products round their float32 inputs to TF32."""
    compile: bool = False
    """torch.compile the model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more compute."""
    deterministic: bool = False
    """Deterministic algorithms on CUDA, so that a resumed run is bit-identical."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not finite: the update is held back, then stop or go on."""

    log_every: int = 50
    """Steps between logged averages."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints to keep; 0 for all."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers of accelerate to log to, e.g. tensorboard or wandb (extra: tracking)."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one GPU, for the model FLOP utilisation; known for A100, H100 and H200."""

    def check(self, num_processes: int) -> None:
        """Raise ``UserError`` for values that do not fit together."""
        from .ema import power_gamma, power_name

        given = {key: value for key, value in flatten(self).items() if value is not None}
        for key, least in SMALLEST.items():
            if not given.get(key, least) >= least:
                raise UserError(f"{key} is {given[key]}; it must be at least {least}")
        for key in POSITIVE:
            if not given.get(key, 1) > 0:
                raise UserError(f"{key} is {given[key]}; it must be greater than 0")
        for key, value in given.items():
            if value == math.inf and key not in MAY_BE_INFINITE:
                raise UserError(f"{key} is inf; it must be finite")
        share = num_processes * self.gradient_accumulation_steps
        if self.batch_size < 1 or self.batch_size % share:
            raise UserError(
                f"batch_size {self.batch_size} is not divisible by {num_processes} processes × "
                f"{self.gradient_accumulation_steps} gradient_accumulation_steps"
            )
        if self.evaluation.fid_every and self.evaluation.num_samples < 4:
            raise UserError(
                f"evaluation.num_samples is {self.evaluation.num_samples}; precision and recall "
                "need at least 4, FID some thousands"
            )
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed is {self.seed}; it must be at least 0 and below 2**64")
        if not self.objective.logit_normal[1] > 0:
            raise UserError("objective.logit_normal needs a standard deviation greater than 0")
        if not all(0 <= beta < 1 for beta in self.optimizer.betas):
            raise UserError(f"optimizer.betas is {self.optimizer.betas}; both must lie in [0, 1)")
        if self.evaluation.fid_every and not self.evaluation.metrics:
            raise UserError("evaluation.metrics is empty; name some, or set evaluation.fid_every 0")
        if not 0 <= self.label_dropout < 1:
            raise UserError(f"label_dropout is {self.label_dropout}; it must lie in [0, 1)")
        if not self.ema_decays or not all(0 <= decay < 1 for decay in self.ema_decays):
            raise UserError(f"ema_decays is {self.ema_decays}; give at least one in [0, 1)")
        if len(set(self.ema_decays)) < len(self.ema_decays):
            raise UserError(f"ema_decays {self.ema_decays} lists a decay twice")
        if len(set(map(power_name, self.ema_power_stds))) < len(self.ema_power_stds):
            raise UserError(f"ema_power_stds {self.ema_power_stds} lists a width twice")
        for std in self.ema_power_stds:
            power_gamma(std)
        if self.optimizer.lr_warmup_steps and self.optimizer.lr_schedule in WITHOUT_WARMUP:
            raise UserError(
                "optimizer.lr_warmup_steps needs a schedule with warm-up: set "
                "optimizer.lr_schedule to constant_with_warmup, linear, cosine or the like"
            )


@dataclass
class PosthocConfig:
    """The wanted average"""

    run: str
    """Folder of a run with snapshots (ema_power_stds)."""
    std: float = 0.1
    """Relative width of the wanted average, a share of the run up to its step; below 0.289."""
    step: int | None = None
    """Step at which the wanted average ends; the newest checkpoint that has a snapshot unless
    given."""
    output: str | None = None
    """Folder for the model, to open with from_pretrained or init_from; by default into the
    checkpoint of that step, to sample with --weights ema-posthoc-STD."""


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration by dotted keys."""
    flat: dict[str, Any] = {}
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{each.name}.")
        else:
            flat[prefix + each.name] = list(value) if isinstance(value, tuple) else value
    return flat
