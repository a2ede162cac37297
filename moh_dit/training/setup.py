"""Create the accelerator, the model, the parameter groups and the schedule of a run."""

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DynamoBackend,
    InitProcessGroupKwargs,
    LoggerType,
)
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checkpoints.infer_config import LABEL_TABLE, infer_config, state_difference
from ..checkpoints.opening import OpenedCheckpoint, open_checkpoint
from ..checkpoints.state_dict_names import fit_positions
from ..common.compat import skip_update_if
from ..common.cuda_graphs import leave_default_stream
from ..common.errors import UserError
from ..diffusion.objectives import Objective
from ..model.transformer import MoHDiTTransformer2DModel
from .config import OptimizerConfig, TrainConfig

TIMEOUT = timedelta(hours=2)  # ranks wait while rank 0 checks the data or draws a sample grid
# Larger than torch's 25 MiB, which is slower (docs/performance.md).
BUCKET_MIB = 256


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Join the process group of ``accelerate launch`` or ``torchrun`` and set the precision.

    Raises:
        UserError: a tracker that is unknown or not installed, fp16 without a GPU, or settings of
            accelerate that this trainer does not support.
    """
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed_precision fp16 needs a GPU; use bf16 or no")
    # accelerate itself only warns about trackers that are not installed.
    trackers, known = set(config.trackers), set(map(str, LoggerType))
    if unknown := trackers - known:
        raise UserError(
            f"tracker {', '.join(unknown)} is unknown; choose from {', '.join(sorted(known))}"
        )
    if missing := trackers - {"all", *map(str, get_available_trackers())}:
        raise UserError(
            f'tracker {", ".join(missing)} is not installed; pip install "moh-dit[tracking]" has '
            "tensorboard and wandb, or run without trackers: --trackers '[]'"
        )
    accelerator = Accelerator(
        # Without this, several processes without a GPU would each run alone.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        log_with=config.trackers or None,
        project_dir=config.run_dir,
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True,  # saves a copy of all gradients
                bucket_cap_mb=BUCKET_MIB,
            ),
            InitProcessGroupKwargs(timeout=TIMEOUT),
        ],
    )
    leave_default_stream()
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        check_fsdp(accelerator)
    return accelerator


def check_fsdp(accelerator: Accelerator) -> None:
    """Require FSDP2 and reject accelerate settings that TrainConfig already controls.

    Raises:
        UserError: FSDP1, a single GPU, or a setting that belongs into the run's configuration.
    """
    if not accelerator.is_fsdp2:
        raise UserError(
            "FSDP needs several GPUs and fsdp_version: 2 (configs/accelerate/fsdp2.yaml)"
        )
    compiles = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    checkpoints = accelerator.state.fsdp_plugin.activation_checkpointing
    for enabled, name, option in (
        (checkpoints, "fsdp_activation_checkpointing", "gradient_checkpointing"),
        (compiles, "dynamo_backend", "compile"),
    ):
        if enabled:
            raise UserError(
                f"{name} in the accelerate configuration is not supported; remove it and give "
                f"--{option} true"
            )
    # The output of the model is a view. That is safe, because nothing writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)


def create_model(
    config: TrainConfig,
    objective: Objective,
    latent_shape: tuple[int, int, int],
    classes_in_data: int,
    checkpoint: Path | None = None,
) -> MoHDiTTransformer2DModel:
    """Create the model for the objective, the latents and the classes of a run.

    Args:
        config: settings of the run.
        objective: determines the number of output channels.
        latent_shape: (C, h, w) of the latents.
        classes_in_data: number of classes in the data.
        checkpoint: checkpoint to resume from. Its settings replace those of ``init_from``, and its
            weights are loaded later.

    Raises:
        UserError: settings that contradict each other, or weights that do not match the model.
    """
    channels, size, _ = latent_shape
    num_classes = config.model.num_classes or classes_in_data
    if num_classes < classes_in_data:
        raise UserError(
            f"the data has {classes_in_data} classes, but model.num_classes is {num_classes}; "
            "increase it, or leave it out"
        )
    opened, initial = None, {}
    if checkpoint is not None:
        initial = MoHDiTTransformer2DModel.load_config(checkpoint / "transformer")
    elif config.init_from is not None:
        opened = open_checkpoint(config.init_from, verify=not config.no_verify)
        initial = config_of_weights(opened)
    arguments = config.model.resolve(
        initial=initial,
        sample_size=size,
        in_channels=channels,
        out_channels=objective.output_channels(channels),
        num_classes=num_classes,
    )
    patch_size = arguments.get("patch_size", 2)
    if size % patch_size:
        pixels = config.data.image_size // size * patch_size
        raise UserError(
            f"data.image_size {config.data.image_size} gives latents of {size}×{size}, which are "
            f"not divisible by model.patch_size {patch_size}; use a multiple of {pixels} pixels"
        )
    model = MoHDiTTransformer2DModel(**arguments)
    if opened is not None:
        load_initial_weights(model, opened)
    return model


def config_of_weights(opened: OpenedCheckpoint) -> dict[str, Any]:
    """Return the saved or inferred configuration of weights; empty if it cannot be inferred."""
    try:
        return opened.config or infer_config(opened.state, {})
    except UserError:
        return {}


def load_initial_weights(model: MoHDiTTransformer2DModel, opened: OpenedCheckpoint) -> None:
    """Load weights to fine-tune. Label embeddings for another number of classes are not loaded.

    Raises:
        UserError: another weight is missing or has another shape; the message names it.
    """
    state, own = dict(opened.state), model.state_dict()
    if LABEL_TABLE in state and state[LABEL_TABLE].shape != own[LABEL_TABLE].shape:
        classes = state[LABEL_TABLE].shape[0] - 1
        print(
            f"{opened.path} was trained on {classes} classes, this run has another number: its "
            "label embeddings are newly initialised"
        )
        state[LABEL_TABLE] = own[LABEL_TABLE]
    fit_positions(state, dict(model.config))
    if difference := state_difference(model, state):
        hint = "; leave out the model settings to use those of the weights"
        hint = hint if config_of_weights(opened) else ""
        raise UserError(f"{opened.path} does not match the model: {difference}{hint}")
    model.load_state_dict(state)


def checkpoint_block(block: nn.Module, *arguments: Any) -> Any:
    """Run a block without storing activations; the backward pass computes them again.

    The blocks draw no random numbers. Saving the RNG state would wait for the GPU, which a CUDA
    graph does not allow.
    """
    return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)


def trainable_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the trainable parameters by name."""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def create_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Create a fused AdamW for the trainable parameters."""
    return torch.optim.AdamW(
        weight_decay_groups(trainable_parameters(model), config),
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,
    )


def create_optimizer_state(optimizer: torch.optim.AdamW) -> None:
    """Create the moments of all parameters, which AdamW otherwise does in its first step.

    Moments created after a forward pass lie between freed activations, and keep the allocator from
    returning that memory to the GPU before a CUDA graph is captured.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    skip_update_if(optimizer, torch.ones((), dtype=torch.bool, device=parameters[0].device))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def weight_decay_groups(
    parameters: list[tuple[str, Tensor]], config: OptimizerConfig
) -> list[dict[str, object]]:
    """Split the parameters into AdamW's groups with and without weight decay.

    Raises:
        UserError: a pattern of ``no_weight_decay`` matches no parameter.
    """
    for pattern in config.no_weight_decay:
        if not any(fnmatchcase(name, pattern) for name, _ in parameters):
            known = ", ".join(sorted({name.rpartition(".")[0] for name, _ in parameters})[-3:])
            raise UserError(
                f"optimizer.no_weight_decay contains {pattern!r}, which matches no parameter; "
                f"examples of module names are {known}"
            )
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in parameters:
        exempt = any(fnmatchcase(name, pattern) for pattern in config.no_weight_decay)
        groups[not exempt].append(parameter)
    return [
        {"params": params, "weight_decay": config.weight_decay if decayed else 0.0}
        for decayed, params in groups.items()
    ]


def learning_rate_factor(
    config: OptimizerConfig, num_steps: int, optimizer: torch.optim.Optimizer
) -> Callable[[int], float]:
    """Return the learning-rate factor as a function of the number of completed steps.

    A function needs no state in checkpoints.

    Raises:
        UserError: the schedule does not accept its options.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about the order of calls to step()
        try:
            schedule = get_scheduler(
                config.lr_schedule,
                optimizer,
                num_warmup_steps=config.lr_warmup_steps,
                num_training_steps=num_steps,
                **config.lr_schedule_options,
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"optimizer.lr_schedule {config.lr_schedule} does not accept "
                f"optimizer.lr_schedule_options {config.lr_schedule_options}: {error}"
            ) from None
    return schedule.lr_lambdas[0]
