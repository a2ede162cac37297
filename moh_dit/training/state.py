"""Saving and restoring everything a run needs to go on exactly where it stopped."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from ..checkpoints import (
    WEIGHTS,
    checkpoint_name,
    checkpoint_step,
    list_checkpoints,
    load_weights,
)
from ..cli import load_config
from ..errors import UserError
from ..transformer import MoHDiTTransformer2DModel
from .config import TrainConfig
from .ema import Ema

# What may change when a run is resumed; everything else defines what is being computed.
FREE_ON_RESUME = (
    "run_dir", "resume", "num_steps", "log_every", "checkpoint_every", "keep_checkpoints",
    "trackers", "compile", "gradient_checkpointing", "gradient_accumulation_steps", "evaluation",
    "on_nonfinite", "deterministic", "allow_tf32",
)  # fmt: skip


def check_resumable(config: TrainConfig, run: Path) -> None:
    """Raise ``UserError`` naming the keys in which ``config`` differs from the run's own."""
    path = run / "config.yaml"
    before, now = _flatten(load_config(TrainConfig, path)), _flatten(config)
    changed = [
        f"{key} is {now[key]}, was {before[key]}"
        for key in now
        if now[key] != before[key] and key.split(".")[0] not in FREE_ON_RESUME
    ]
    if changed:
        raise UserError(
            f"cannot resume {run} with another configuration: {'; '.join(changed)}. "
            f"Use --config {path}, or a new run_dir"
        )


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= _flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = list(value) if isinstance(value, tuple) else value
    return flat


def ema_folder(index: int, ema: Ema) -> str:
    """Where a checkpoint keeps an average: the first is the one to sample with."""
    return "transformer" if index == 0 else f"ema-{ema.decay:g}"


def save_checkpoint(
    accelerator: Accelerator,
    run: Path,
    step: int,
    emas: list[Ema[MoHDiTTransformer2DModel]],
    keep: int,
) -> Path:
    """Write a checkpoint aside, rename it when whole, then drop the oldest beyond ``keep``.

    Raises:
        UserError: the disk is full or cannot be written to; earlier checkpoints stay.
    """
    final = run / "checkpoints" / checkpoint_name(step)
    if final.exists():  # resumed exactly here
        return final
    aside = final.with_name(f".writing-{final.name}")
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(aside / "state"))
        if accelerator.is_main_process:
            for index, ema in enumerate(emas):
                folder = aside / ema_folder(index, ema)
                ema.model.save_config(folder)
                save_file(ema.model.state_dict(), folder / WEIGHTS, metadata={"format": "pt"})
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(aside, ignore_errors=True)
        last = list_checkpoints(run)
        raise UserError(
            f"checkpoint {final} could not be written ({error}); free space, then resume from "
            f"{last[-1] if last else 'the start'}"
        ) from None
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        aside.rename(final)
        for old in list_checkpoints(run)[: -keep or None] if keep else []:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def restore_checkpoint(
    accelerator: Accelerator, checkpoint: Path, emas: list[Ema[MoHDiTTransformer2DModel]]
) -> int:
    """Load weights, optimizer and averages; returns the number of steps behind them."""
    for index, ema in enumerate(emas):
        file = checkpoint / ema_folder(index, ema) / WEIGHTS
        if not file.is_file():
            raise UserError(f"{checkpoint} has no average of decay {ema.decay:g}")
        load_weights(ema.model, file)
    with torch.no_grad():
        accelerator.load_state(str(checkpoint / "state"))
    return checkpoint_step(checkpoint)
