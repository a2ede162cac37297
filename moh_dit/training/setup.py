"""The parts of a run that are made once: accelerator, data, model, parameter groups, schedule."""

import math
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DynamoBackend,
    InitProcessGroupKwargs,
)
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from ..checkpoints.infer_config import LABEL_TABLE, infer_config, state_difference
from ..checkpoints.opening import Opened, open_checkpoint
from ..checkpoints.weight_files import lazy
from ..common.distributed import run_on_main_process
from ..common.errors import UserError
from ..data.config import EncodeConfig
from ..data.encoding import encode_data
from ..data.images import ImageSet, open_images
from ..data.latents import INDEX_FILE, LatentSet, encode_images, open_latents
from ..diffusion.objectives import Objective
from ..model.transformer import MoHDiTTransformer2DModel
from .config import DataConfig, OptimizerConfig, TrainConfig

LATENTS = "latents"  # in the run folder
PATIENCE = timedelta(hours=2)

# Gradients exchanged at once: faster than torch's 25 MiB (docs/performance.md).
BUCKET_MIB = 256


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of the process group that ``accelerate launch`` or ``torchrun`` made."""
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed_precision fp16 needs a GPU; use bf16 or no")
    try:
        accelerator = Accelerator(
            # Without it, several processes without a GPU would each run alone.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=config.mixed_precision,
            log_with=config.trackers or None,
            project_dir=config.run_dir,
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True,  # saves a copy of all gradients
                    bucket_cap_mb=BUCKET_MIB,
                ),
                # The others wait while one looks through the data, or draws a grid.
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
        )
    except ValueError as error:  # an unknown tracker
        raise UserError(f"trackers {config.trackers}: {error}") from None
    # accelerate passes over those that it cannot import.
    there = {str(tracker) for tracker in accelerator.log_with}
    if missing := [name for name in config.trackers if name not in (*there, "all")]:
        raise UserError(
            f"trackers: {', '.join(missing)} is not installed: install it (moh-dit[tracking] has "
            "wandb), or name others, e.g. --trackers '[tensorboard]'"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        check_fsdp(accelerator)
    return accelerator


def check_fsdp(accelerator: Accelerator) -> None:
    """A ``UserError`` where there is no FSDP2, or it is told what the run's configuration says."""
    if not accelerator.is_fsdp2:
        raise UserError(
            "FSDP needs several GPUs and fsdp_version: 2 (configs/accelerate/fsdp2.yaml)"
        )
    compiles = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    for wanted, name, instead in (
        (accelerator.state.fsdp_plugin.activation_checkpointing, "fsdp_activation_checkpointing",
         "gradient_checkpointing"),
        (compiles, "dynamo_backend", "compile"),
    ):  # fmt: skip
        if wanted:
            raise UserError(f"{name} of accelerate is not used here; give --{instead} true instead")
    # The model's output is a view, which is safe as long as nobody writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)


def open_training_data(
    config: DataConfig,
    vae: AutoencoderKL,
    shape: tuple[int, int, int],
    accelerator: Accelerator,
) -> ImageSet | LatentSet:
    """The images of a configuration, checked by one process for all, or their latents on disk.

    Raises:
        UserError: unreadable data, latents of another autoencoder or size, or images whose latents
            would not fit into memory.
    """
    if config.latents is not None:
        store = open_latents(config.latents, vae, flip=config.horizontal_flip)
        if store.moments_shape != (2 * shape[0], *shape[1:]):
            raise UserError(
                f"latents {config.latents} have moments of {store.moments_shape}; "
                f"data.image_size {config.image_size} needs {(2 * shape[0], *shape[1:])}"
            )
        return store
    images = run_on_main_process(
        accelerator,
        lambda: open_images(
            config.source, config.image_size, skip_unreadable=config.skip_unreadable
        ),
    )
    if accelerator.num_processes > 1:
        return images  # to be encoded to disk
    needed = len(images) * 2 * math.prod(shape) * 4 * (1 + config.horizontal_flip)
    available = psutil.virtual_memory().available
    if needed > available / 2:
        raise UserError(
            f"the latents of {len(images)} images take {needed / 2**30:.1f} GiB of memory, "
            f"of {available / 2**30:.1f} GiB free: encode them to disk with moh-dit-encode and "
            "set data.latents"
        )
    return images


def encode_training_data(
    config: TrainConfig,
    images: ImageSet,
    fingerprint: str,
    vae: AutoencoderKL,
    accelerator: Accelerator,
) -> LatentSet:
    """Latents of the images: of one process in memory; of several in the run folder.

    There they are encoded by all, once, and mapped into memory by each; a resumed run finds them,
    whatever the number of its processes.

    Raises:
        UserError: the latents in the run folder are of other images.
    """
    data, folder = config.data, Path(config.run_dir) / LATENTS
    if accelerator.num_processes == 1 and not folder.exists():
        return encode_images(images, vae, flip=data.horizontal_flip)
    if not (folder / INDEX_FILE).exists():
        encoding = EncodeConfig(
            output=str(folder),
            data=data.source,
            image_size=data.image_size,
            autoencoder=data.autoencoder,
            flip=data.horizontal_flip,
            skip_unreadable=data.skip_unreadable,
            resume=True,
        )
        encode_data(encoding, images)
    store = open_latents(folder, vae, flip=data.horizontal_flip)
    if fingerprint != store.index["data"]["fingerprint"]:
        raise UserError(f"{data.source} has changed since {folder} was made; start a new run_dir")
    return store


def build_model(
    config: TrainConfig,
    objective: Objective,
    latent_shape: tuple[int, int, int],
    classes_in_data: int,
    checkpoint: Path | None = None,
) -> MoHDiTTransformer2DModel:
    """The model of the configuration, fitted to the objective, the latents and the classes.

    Where a run goes on from a ``checkpoint``, ``init_from`` is not needed any more: the weights
    will be restored, and the settings that it gave are in the checkpoint.
    """
    channels, size, _ = latent_shape
    num_classes = config.model.num_classes or classes_in_data
    if num_classes < classes_in_data:
        raise UserError(
            f"the data has {classes_in_data} classes, model.num_classes is {num_classes}; "
            "raise it, or leave it out to count them"
        )
    opened, initial = None, {}
    if checkpoint is not None:
        initial = MoHDiTTransformer2DModel.load_config(checkpoint / "transformer")
    elif config.init_from is not None:
        opened = open_checkpoint(config.init_from)
        initial = initial_config(opened)
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
            f"data.image_size {config.data.image_size} gives latents of {size}×{size}, which "
            f"model.patch_size {patch_size} does not divide; use a multiple of {pixels} pixels"
        )
    model = MoHDiTTransformer2DModel(**arguments)
    if opened is not None:
        initialise_from(model, opened)
    return model


def initial_config(opened: Opened | None) -> dict[str, Any]:
    """The configuration of weights to start from, as far as they came with one or are a preset."""
    if opened is None:
        return {}
    try:
        return opened.config or infer_config(opened.state, {})
    except UserError:
        return {}


def initialise_from(model: MoHDiTTransformer2DModel, opened: Opened) -> None:
    """Load weights to fine-tune. A label table for other classes is left as initialised.

    Raises:
        UserError: nothing readable there, or any other weight that differs (the keys are named).
    """
    state, own = dict(opened.state), model.state_dict()
    if LABEL_TABLE in state and state[LABEL_TABLE].shape != own[LABEL_TABLE].shape:
        classes = state[LABEL_TABLE].shape[0] - 1
        print(f"{opened.path}: made for {classes} classes; the label table starts afresh")
        state[LABEL_TABLE] = lazy(own[LABEL_TABLE])
    if difference := state_difference(model, state):
        hint = "; leave the settings of model out to take those of the weights"
        hint = hint if initial_config(opened) else ""
        raise UserError(f"{opened.path} does not match the model: {difference}{hint}")
    model.load_state_dict({name: tensor.read() for name, tensor in state.items()})


def trainable(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters that are trained, by name."""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def weight_decay_groups(
    parameters: list[tuple[str, Tensor]], config: OptimizerConfig
) -> list[dict[str, object]]:
    """Parameters with weight decay and those named in ``no_weight_decay``, as AdamW takes them."""
    for pattern in config.no_weight_decay:
        if not any(fnmatchcase(name, pattern) for name, _ in parameters):
            known = ", ".join(sorted({name.rpartition(".")[0] for name, _ in parameters})[-3:])
            raise UserError(
                f"optimizer.no_weight_decay has {pattern!r}, which no parameter matches; modules "
                f"are called {known} and so on"
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
    """The schedule as a function of the steps done so far, so that it needs no state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the schedule itself is never stepped
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
                f"optimizer.lr_schedule {config.lr_schedule} with lr_schedule_options "
                f"{config.lr_schedule_options}: {error}"
            ) from None
    return schedule.lr_lambdas[0]


def gradient_exchange(
    accelerator: Accelerator, model: nn.Module, exchange: bool
) -> AbstractContextManager:
    """Hold gradients back from the other processes until the last micro-batch of a step."""
    return nullcontext() if exchange else accelerator.no_sync(model)
