"""Settings of a training run. The docstring under a field is its help text.

Functions here import torch only when they are called, so that ``--help`` stays fast.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..common.errors import UserError
from ..common.paths import require_new_output
from ..model.presets import preset_config

if TYPE_CHECKING:
    from ..diffusion.objectives import Objective


@dataclass
class ModelConfig:
    """Shape of the model: a preset, single fields, or both"""

    preset: str | None = None
    """Published model, e.g. MoH-DiT-XL/2-75 or DiT-B/4. The fields below override its values."""
    patch_size: int | None = None
    """Side of the latent patch that becomes one token, in latent pixels."""
    hidden_size: int | None = None
    """Model width C."""
    depth: int | None = None
    """Number of blocks."""
    num_heads: int | list[int] | None = None
    """Number of attention heads h: one number, or a list with one per layer."""
    num_shared_heads: int | list[int | None] | None = None
    """Number of shared heads s, one or one per layer; null for plain multi-head attention."""
    num_active_routed_heads: int | list[int | None] | None = None
    """Number of routed heads k that each token activates: one number, or one per layer."""
    head_dim: int | None = None
    """Width d of a head (default: C / h)."""
    router: Literal["learned", "query_norm"] | None = None
    """How tokens choose routed heads: by a learned linear router, or by the query norms."""
    mlp_ratio: float | None = None
    """Hidden width of the MLP as a multiple of C."""
    label_init_std: float | None = None
    """Initial standard deviation of the label embeddings: 0.02 as published, 0.5 for short runs."""
    timestep_freq_shift: float | None = None
    """Set 1 for weights trained with diffusers' DiTTransformer2DModel (default: 0)."""
    num_classes: int | None = None
    """Number of classes, at least as many as the data has (default: as many as the data has)."""

    def resolve(self, initial: dict[str, Any] | None = None, **derived: Any) -> dict[str, Any]:
        """Return the arguments of ``MoHDiTTransformer2DModel``.

        Args:
            initial: configuration of the weights to start from; used if no preset is set.
            derived: arguments that follow from the data and the objective.

        The fields of this class override the preset or ``initial``, and ``derived`` overrides both.

        Raises:
            UserError: the preset is unknown, or the width, depth or heads are not set.
        """
        names = {field.name for field in fields(self)} - {"num_classes"}
        config = {key: value for key, value in (initial or {}).items() if key in names}
        if self.preset:
            config = preset_config(self.preset)
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        given = {k: value for k, value in given.items() if value is not None and k != "preset"}
        config = {**config, **given, **derived}
        if missing := [key for key in ("hidden_size", "depth", "num_heads") if key not in config]:
            raise UserError(f"model.{missing[0]} is not set; set it, or choose a model.preset")
        return config


@dataclass
class DataConfig:
    """Training data and autoencoder"""

    source: str = "digits"
    """Images: "digits" (embedded), a folder with one sub-folder per class, .zip, .npz, .tar, or
    hf://OWNER/NAME (docs/data.md). They are encoded when the run starts: into memory on one
    process, into the run folder on several."""
    latents: str | None = None
    """Folder written by moh-dit encode, used instead of source; for data larger than memory."""
    num_workers: int = 2
    """Data-loader workers per training process: they decode the images to encode, if there are
    thousands, and read latents from disk."""
    image_size: int = 32
    """Side of the square training images in pixels."""
    autoencoder: str | None = None
    """"digits" (embedded), "none" (pixels), a folder, or a Hub id. Required unless source is
    "digits" or latents is set; latents name their own autoencoder. Classes: docs/autoencoder.md."""
    horizontal_flip: bool = False
    """Mirror each image with probability 0.5, drawn anew in each epoch."""
    skip_unreadable: bool = False
    """Skip unreadable images and print how many, instead of stopping."""


@dataclass
class ObjectiveConfig:
    """Training objective"""

    prediction_type: Literal["epsilon", "v_prediction", "flow"] = "epsilon"
    """What the model predicts: noise, v (arXiv 2202.00512), or the velocity of a rectified flow."""
    learned_variance: bool = True
    """With epsilon: also predict the variance of each step (Improved DDPM)."""
    min_snr_gamma: float | None = None
    """Weight timesteps by min-SNR-γ (arXiv 2303.09556, where γ is 5); null for equal weights."""
    logit_normal: tuple[float, float] = (0.0, 1.0)
    """With flow: mean and standard deviation of the logit of the sampled times."""

    def build(self, device: Any) -> "Objective":
        """Create the objective.

        Raises:
            UserError: the settings contradict each other.
        """
        from ..diffusion.objectives import FlowObjective, NoiseObjective

        if self.prediction_type != "flow":
            return NoiseObjective(
                self.prediction_type, self.learned_variance, self.min_snr_gamma, device
            )
        if self.min_snr_gamma is not None:
            raise UserError(
                "objective.min_snr_gamma cannot be used with objective.prediction_type flow; "
                "leave it out, or predict epsilon or v_prediction"
            )
        return FlowObjective(*self.logit_normal)


@dataclass
class OptimizerConfig:
    """AdamW and its learning rate"""

    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's running averages of the gradient and its square."""
    weight_decay: float = 0.0
    """Decoupled weight decay of all parameters that no_weight_decay does not match."""
    no_weight_decay: list[str] = field(default_factory=lambda: ["*.bias", "*.embedding_table.*"])
    """Patterns of parameter names without weight decay (default: biases, label embeddings)."""
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
    """Options of the schedule: num_cycles (cosine, cosine_with_restarts), power (polynomial),
    step_rules (piecewise_constant, e.g. "1:10000,0.1")."""
    lr_warmup_steps: int = 0
    """Steps of linear warm-up; not available for constant and piecewise_constant."""
    max_grad_norm: float | None = None
    """Clip the global gradient norm to this value; null for no clipping."""


@dataclass
class EvaluationConfig:
    """Samples and metrics during training"""

    sample_every: int = 0
    """Steps between sample grids; 0 for a single grid at the end."""
    fid_every: int = 0
    """Steps between evaluations of generated samples, also after the last step; 0 for none."""
    num_samples: int = 1000
    """Number of samples per evaluation."""
    num_inference_steps: int = 50
    """Denoising steps of grids and evaluations."""
    guidance_scale: float = 1.5
    """Classifier-free guidance scale of grids and evaluations; 1 for no guidance."""
    metrics: list[str] = field(default_factory=lambda: ["fid"])
    """Metrics of fid-eval to compute."""
    feature_extractor: str = "inception"
    """Feature extractor: a name known to fid-eval, or an import path."""
    feature_extractor_weights: str | None = None
    """File with the weights of the feature extractor (default: download them)."""
    reference: str | None = None
    """Reference set: a file or a saved name of fid-eval (default: the training images)."""
    held_out: float | str | None = None
    """Images for the held-out loss, never trained on: a share per class such as 0.05, a text file
    with one image per line, or other images or latents (docs/training.md); null for none."""
    held_out_every: int = 0
    """Steps between evaluations of the held-out loss; 0 for with each grid or metric."""
    held_out_images: int = 1024
    """Maximum number of held-out images, and of training images, per evaluation."""


@dataclass
class TrainConfig:
    """Run folder, length, precision and logging"""

    run_dir: str = "runs/train"
    """Folder of this run. It must not exist, unless --resume is given."""
    resume: bool = False
    """Continue the run in run_dir from its newest checkpoint, or start it if there is none."""
    no_verify: bool = False
    """Do not compare checkpoints, and the weights of init_from, with their checksums."""
    seed: int = 0
    """Seed of the initial weights, data order, noise, timesteps and label dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    init_from: str | None = None
    """Initial weights: a run, a model folder, a file or a hub id (docs/checkpoints.md). Without
    model.preset, the settings of these weights are the defaults of model."""
    num_steps: int = 400_000
    """Number of optimizer steps of the whole run."""
    batch_size: int = 256
    """Images per optimizer step, over all processes and micro-batches."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    label_dropout: float = 0.1
    """Probability of replacing a label by the null class, for classifier-free guidance."""
    balance_loss_weight: float = 0.01
    """Weight of the load-balance loss, which is 1 for balanced routing."""
    balance_loss: Literal["global", "two_pass", "published"] = "global"
    """global: head load over the batch of all processes. two_pass: the same, exact under gradient
    accumulation, at the cost of one more forward pass. published: per process and micro-batch."""
    ema_decays: list[float] = field(default_factory=lambda: [0.9999])
    """Decays of the exponential moving averages (EMA) of the weights. Sampling uses the first by
    default. All EMAs warm up."""
    ema_power_stds: list[float] = field(default_factory=list)
    """Relative widths of power-function averages to save as snapshots, e.g. [0.05, 0.1]. Two widths
    are enough to compute an average of any width after the run (docs/training.md)."""
    ema_snapshot_every: int = 0
    """Steps between these snapshots, which are never deleted; 0 for checkpoint_every."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast precision of the model; weights, averages and the loss stay float32."""
    allow_tf32: bool = True
    """Allow TF32 in float32 matrix products and convolutions on CUDA."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Launch the whole training step as one CUDA graph, which removes the host's overhead at small
    batch sizes. auto: on NVIDIA GPUs without FSDP2; true: stop if that is impossible."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more compute."""
    deterministic: bool = False
    """Use deterministic algorithms on CUDA, so that a resumed run is bit-identical."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """If the loss or a gradient is NaN or infinite: stop, or skip the update and continue."""

    log_every: int = 50
    """Steps between log entries, which average over these steps."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 3
    """Number of newest checkpoints to keep; 0 for all."""
    trackers: list[str] = field(default_factory=list)
    """Trackers of accelerate to log to, e.g. [tensorboard] or [wandb]; both need
    pip install "moh-dit[tracking]". log.jsonl and curves.png are always written."""
    peak_tflops: float | None = None
    """Peak TFLOP/s of one GPU, to compute the MFU; known for A100, H100 and H200."""

    def check_paths(self) -> None:
        """Raise ``UserError`` for paths that do not exist, without importing torch."""
        from .config_checks import check_paths

        check_paths(self)

    def check(self, num_processes: int) -> None:
        """Raise ``UserError`` for values that are out of range or contradict each other."""
        from .config_checks import check_values

        check_values(self, flatten(self), num_processes)


@dataclass
class PosthocConfig:
    """Settings of `moh-dit ema`"""

    run: str
    """Run folder with snapshots (trained with ema_power_stds)."""
    std: float = 0.1
    """Width of the average, relative to the length of the run up to step; below 0.289."""
    step: int | None = None
    """Step at which the average ends (default: the newest checkpoint that has a snapshot)."""
    output: str | None = None
    """Folder for the averaged model, readable by from_pretrained and init_from (default: into the
    checkpoint of that step, to be sampled with --weights ema-posthoc-STD)."""
    no_verify: bool = False
    """Do not compare the snapshots with their checksums."""

    def check_paths(self) -> None:
        """Raise ``UserError`` if the run does not exist, or the output does."""
        if not Path(self.run).is_dir():
            raise UserError(f"run {self.run} does not exist; give a run folder")
        if self.output is not None:
            require_new_output(Path(self.output))


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the settings of a nested configuration by dotted key; tuples become lists."""
    flat: dict[str, Any] = {}
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{each.name}.")
        else:
            flat[prefix + each.name] = list(value) if isinstance(value, tuple) else value
    return flat
