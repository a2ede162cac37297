"""Saving and restoring everything a run needs to go on exactly where it stopped."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..checkpoints.opening import (
    WEIGHTS,
    checkpoint_name,
    checkpoint_step,
    list_checkpoints,
    load_weights,
    read_weights,
)
from ..common.atomic_write import atomic_output
from ..common.disk_space import require_disk_space
from ..common.errors import UserError
from ..model.transformer import MoHDiTTransformer2DModel
from .config import TrainConfig
from .ema import PowerEma, WeightAverage, ema_name, power_name
from .sharding import gather_state, restore_state

SCALER = Path("state/scaler.json")  # of a checkpoint, under fp16

WeightAverages = list[WeightAverage[MoHDiTTransformer2DModel]]


def average_folder(index: int, name: str) -> str:
    """Where a checkpoint keeps an average: the first is the one to sample with."""
    return "transformer" if index == 0 else name


@dataclass
class TrainingState:
    """What changes from step to step. There is no RNG state: see ``order``."""

    accelerator: Accelerator
    model: MoHDiTTransformer2DModel
    optimizer: torch.optim.Optimizer
    averages: WeightAverages

    def save(self, run: Path, step: int, keep: int) -> Path:
        """Write a checkpoint aside, rename it when whole, then drop the oldest beyond ``keep``.

        Raises:
            UserError: the disk is full or cannot be written to; earlier checkpoints stay.
        """
        final = run / "checkpoints" / checkpoint_name(step)
        weights, moments = gather_state(list(self.model.named_parameters()), self.optimizer)
        for average in self.averages:
            average.gather()
        # Asked of the main process alone: to the others it may have come to exist just now.
        if self.accelerator.is_main_process and not final.exists():
            with written_for_run(final, run) as aside:
                self._write_state(aside / "state", weights, moments)
                for index, average in enumerate(self.averages):
                    _write_average(average, aside / average_folder(index, average.name))
            for old in list_checkpoints(run)[:-keep] if keep else []:
                # Renamed first: a folder called step-* is whole, whenever this is killed.
                shutil.rmtree(old.rename(old.with_name(f".deleting-{old.name}")))
            self.check_space(run)
        self.accelerator.wait_for_everyone()
        return final

    def check_space(self, run: Path) -> None:
        """Say so while there is time, if the next checkpoint will not fit on the disk."""
        weights = sum(parameter.numel() * 4 for parameter in self.model.parameters())
        # AdamW has two moments; a snapshot may be due as well.
        needed = weights * (3 + len(self.averages) + len(self._powers()))
        try:
            require_disk_space(run, needed, "the next checkpoint")
        except UserError as shortage:
            tqdm.write(f"warning: {shortage}", file=sys.stderr)

    def _powers(self) -> list[PowerEma]:
        return [average for average in self.averages if isinstance(average, PowerEma)]

    def save_snapshot(self, run: Path, step: int) -> None:
        """Keep the power-function averages of this step for good; see ``posthoc_ema``.

        Raises:
            UserError: as in :meth:`save`.
        """
        averages = self._powers()
        for average in averages:
            average.gather()
        final = run / "snapshots" / checkpoint_name(step)
        if averages and self.accelerator.is_main_process and not final.exists():
            with written_for_run(final, run) as aside:
                for average in averages:
                    _write_average(average, aside / average.name)
        self.accelerator.wait_for_everyone()

    def restore(self, checkpoint: Path) -> int:
        """Load weights, optimizer and averages; returns the number of steps behind them.

        Raises:
            UserError: something is missing there or does not fit.
        """
        folder = checkpoint / "state"
        for index, average in enumerate(self.averages):
            file = checkpoint / average_folder(index, average.name) / WEIGHTS
            load_weights(average.model, file)
            average.spread(self.model)
        weights = read_weights(folder / "model.safetensors")
        moments = read_weights(folder / "optimizer.safetensors")
        restore_state(list(self.model.named_parameters()), self.optimizer, weights, moments)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(json.loads((checkpoint / SCALER).read_text()))
        return checkpoint_step(checkpoint)

    def _write_state(
        self, folder: Path, weights: dict[str, Tensor], moments: dict[str, Tensor]
    ) -> None:
        folder.mkdir()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        save_file(moments, folder / "optimizer.safetensors")
        if self.accelerator.scaler is not None:
            (folder / SCALER.name).write_text(json.dumps(self.accelerator.scaler.state_dict()))


def _write_average(average: WeightAverage[MoHDiTTransformer2DModel], folder: Path) -> None:
    average.model.save_config(folder)
    save_file(average.model.state_dict(), folder / WEIGHTS, metadata={"format": "pt"})


def newest_whole_checkpoint(run: Path, config: TrainConfig) -> Path | None:
    """The checkpoint to go on from; damaged ones are put out of the way and reported.

    Raises:
        UserError: there are checkpoints, and none is whole; they stay where they are.
    """
    faults: dict[Path, str] = {}
    checkpoints = list_checkpoints(run)
    for checkpoint in reversed(checkpoints):
        if (fault := _fault(checkpoint, config)) is None:
            break
        faults[checkpoint] = fault
    else:
        if faults:
            raise UserError(
                f"none of the {len(faults)} checkpoints of {run} is whole: "
                f"{'; '.join(faults.values())}. Put back what is missing, or choose a new run_dir"
            )
        return None
    for damaged, fault in faults.items():
        aside = damaged.with_name(f"damaged-{damaged.name}")
        while aside.exists():  # it was not the first time
            aside = aside.with_name(f"damaged-{aside.name}")
        damaged.rename(aside)
        tqdm.write(f"{fault}: moved to {aside}", file=sys.stderr)
    return checkpoint


def _fault(checkpoint: Path, config: TrainConfig) -> str | None:
    """What is wrong with a checkpoint of this run, in words."""
    averages = [*map(ema_name, config.ema_decays), *map(power_name, config.ema_power_stds)]
    folders = [average_folder(index, name) for index, name in enumerate(averages)]
    files = ["transformer/config.json", "state/model.safetensors", "state/optimizer.safetensors"]
    files += [f"{folder}/{WEIGHTS}" for folder in folders]
    if config.mixed_precision == "fp16":
        files.append(str(SCALER))
    for file in [checkpoint / name for name in files]:
        try:
            if file.suffix == ".json":
                json.loads(file.read_text())
            else:
                with safe_open(file, framework="pt"):  # compares its header with its length
                    pass
        except (OSError, ValueError, SafetensorError) as error:
            return f"{file} is damaged ({error})"
    return None


def clear_leftovers(folder: Path) -> None:
    """Remove what a kill left of a checkpoint that was being written or deleted."""
    for leftover in folder.glob(".*-step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def written_for_run(final: Path, run: Path) -> Iterator[Path]:
    """A folder to write into, renamed to ``final`` when whole; what a kill left goes first."""
    clear_leftovers(final.parent)
    last = list_checkpoints(run)
    advice = f"; free space, then resume from {last[-1] if last else 'the start'}"
    with atomic_output(final, advice) as aside:
        aside.mkdir()
        yield aside
