"""Save and restore everything that a run needs to resume exactly."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from tqdm import tqdm

from ..checkpoints.runs import WEIGHTS, checkpoint_name, checkpoint_step, list_checkpoints
from ..checkpoints.weight_files import State, open_weights
from ..common.atomic_write import atomic_output
from ..common.disk_space import require_disk_space
from ..common.errors import UserError
from ..model.transformer import MoHDiTTransformer2DModel
from .checkpoint_checks import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    SCALER_FILE,
    average_folders,
    find_misfit,
)
from .checkpoint_writer import CheckpointWriter
from .ema import PowerEma, WeightAverage
from .sharding import gather_state, restore_state

WeightAverages = list[WeightAverage[MoHDiTTransformer2DModel]]


@dataclass
class TrainingState:
    """Everything that changes from step to step; there is no RNG state (see ``step_inputs``)."""

    accelerator: Accelerator
    model: MoHDiTTransformer2DModel
    optimizer: torch.optim.Optimizer
    averages: WeightAverages
    writer: CheckpointWriter = field(default_factory=CheckpointWriter)

    def save(
        self, run: Path, step: int, keep: int, *, checkpoint: bool = True, snapshot: bool = False
    ) -> None:
        """Copy the state aside, and write it in the background; all ranks must call this.

        Both folders are written atomically. Wait for the last one with ``writer.wait()``.

        Args:
            run: the run folder.
            step: number of completed steps.
            keep: delete all checkpoints but the newest ``keep`` afterwards; 0 keeps all.
            checkpoint: write a checkpoint.
            snapshot: write a snapshot of the power-function averages for ``posthoc_ema``, if there
                are any.

        Raises:
            UserError: the previous checkpoint could not be written; earlier ones are kept.
        """
        self.writer.wait()
        is_main = self.accelerator.is_main_process
        copy = self.writer.copy if is_main else None
        averages = self.averages if checkpoint else self._power_averages()
        states = {average.name: average.gather_state(copy) for average in averages}
        parameters = list(self.model.named_parameters()) if checkpoint else []
        weights, moments = gather_state(parameters, self.optimizer, copy)
        if not is_main:
            return
        scaler = self.accelerator.scaler and json.dumps(self.accelerator.scaler.state_dict())
        power = self._power_averages() if snapshot else []

        def write() -> None:
            final = run / "snapshots" / checkpoint_name(step)
            if power and not final.exists():
                with write_in_run(final, run) as partial:
                    for each in power:
                        _write_average(each, states[each.name], partial / each.name)
            final = run / "checkpoints" / checkpoint_name(step)
            if checkpoint and not final.exists():
                with write_in_run(final, run) as partial:
                    _write_state(partial, weights, moments, scaler)
                    for average, folder in zip(self.averages, self._folders(), strict=True):
                        _write_average(average, states[average.name], partial / folder)
                for old in list_checkpoints(run)[:-keep] if keep else []:
                    # Rename first: after a kill, every folder step-* is still complete.
                    shutil.rmtree(old.rename(old.with_name(f".deleting-{old.name}")))
                self.warn_if_disk_is_full(run)

        self.writer.start(write)

    def finish(self) -> None:
        """Wait until the last checkpoint is written; all ranks must call this.

        Raises:
            UserError: the disk is full or not writable; earlier checkpoints are kept.
        """
        self.writer.wait()
        self.accelerator.wait_for_everyone()

    def warn_if_disk_is_full(self, run: Path) -> None:
        """Print a warning if the next checkpoint will not fit on the disk."""
        weights = sum(parameter.numel() * 4 for parameter in self.model.parameters())
        # The weights, AdamW's two moments, the averages, and possibly a snapshot.
        needed = weights * (3 + len(self.averages) + len(self._power_averages()))
        try:
            require_disk_space(run, needed, "the next checkpoint")
        except UserError as error:
            tqdm.write(f"warning: {error}", file=sys.stderr)

    def _power_averages(self) -> list[PowerEma]:
        return [average for average in self.averages if isinstance(average, PowerEma)]

    def restore(self, checkpoint: Path) -> int:
        """Load weights, optimizer and averages; return the step of the checkpoint.

        Raises:
            UserError: a file is missing or does not match the model; nothing is changed then.
        """
        names = [average.name for average in self.averages]
        if misfit := find_misfit(checkpoint, self.model, names):
            raise UserError(misfit)
        for average, folder in zip(self.averages, self._folders(), strict=True):
            state = open_weights(checkpoint / folder / WEIGHTS, verify=False)
            average.model.load_state_dict(state)
            average.shard(self.model)
        weights = open_weights(checkpoint / MODEL_FILE, verify=False)
        moments = open_weights(checkpoint / OPTIMIZER_FILE, verify=False)
        restore_state(list(self.model.named_parameters()), self.optimizer, weights, moments)
        if self.accelerator.scaler is not None:
            scaler_state = json.loads((checkpoint / SCALER_FILE).read_text())
            self.accelerator.scaler.load_state_dict(scaler_state)
        return checkpoint_step(checkpoint)

    def _folders(self) -> list[str]:
        return average_folders([average.name for average in self.averages])


def _write_state(checkpoint: Path, weights: State, moments: State, scaler: str | None) -> None:
    (checkpoint / "state").mkdir()
    save_file(weights, checkpoint / MODEL_FILE, metadata={"format": "pt"})
    save_file(moments, checkpoint / OPTIMIZER_FILE)
    if scaler is not None:
        (checkpoint / SCALER_FILE).write_text(scaler)


def _write_average(
    average: WeightAverage[MoHDiTTransformer2DModel], state: State, folder: Path
) -> None:
    average.model.save_config(folder)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def remove_unfinished(folder: Path) -> None:
    """Remove checkpoints that a killed process left half written or half deleted."""
    for leftover in folder.glob(".*-step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def write_in_run(final: Path, run: Path) -> Iterator[Path]:
    """Yield a new folder that is renamed to ``final`` when the block has written it.

    Raises:
        UserError: the disk is full or not writable; the message names the last checkpoint.
    """
    remove_unfinished(final.parent)
    last = list_checkpoints(run)
    advice = f"; free some space, then resume from {last[-1] if last else 'the start'}"
    with atomic_output(final, advice, manifest=True) as partial:
        partial.mkdir()
        yield partial
