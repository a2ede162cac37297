"""Save and restore everything that a run needs to resume exactly."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..checkpoints.opening import load_weights
from ..checkpoints.runs import WEIGHTS, checkpoint_name, checkpoint_step, list_checkpoints
from ..checkpoints.weight_files import open_weights
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

    def save(self, run: Path, step: int, keep: int) -> Path:
        """Write a checkpoint atomically, then delete all but the newest ``keep`` (0 keeps all).

        Raises:
            UserError: the disk is full or not writable; earlier checkpoints are kept.
        """
        final = run / "checkpoints" / checkpoint_name(step)
        weights, moments = gather_state(list(self.model.named_parameters()), self.optimizer)
        for average in self.averages:
            average.gather()
        # Only rank 0 checks: other ranks may already see the folder it has just created.
        if self.accelerator.is_main_process and not final.exists():
            with write_in_run(final, run) as partial:
                self._write_state(partial, weights, moments)
                for average, folder in zip(self.averages, self._folders(), strict=True):
                    _write_average(average, partial / folder)
            for old in list_checkpoints(run)[:-keep] if keep else []:
                # Rename first: if this process is killed, every folder step-* is still complete.
                shutil.rmtree(old.rename(old.with_name(f".deleting-{old.name}")))
            self.warn_if_disk_is_full(run)
        self.accelerator.wait_for_everyone()
        return final

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

    def save_snapshot(self, run: Path, step: int) -> None:
        """Save the power-function averages of this step for ``posthoc_ema``.

        Raises:
            UserError: the disk is full or not writable.
        """
        averages = self._power_averages()
        for average in averages:
            average.gather()
        final = run / "snapshots" / checkpoint_name(step)
        if averages and self.accelerator.is_main_process and not final.exists():
            with write_in_run(final, run) as partial:
                for average in averages:
                    _write_average(average, partial / average.name)
        self.accelerator.wait_for_everyone()

    def restore(self, checkpoint: Path) -> int:
        """Load weights, optimizer and averages; return the step of the checkpoint.

        Raises:
            UserError: a file is missing or does not match the model; nothing is changed then.
        """
        names = [average.name for average in self.averages]
        if misfit := find_misfit(checkpoint, self.model, names):
            raise UserError(misfit)
        for average, folder in zip(self.averages, self._folders(), strict=True):
            load_weights(average.model, checkpoint / folder / WEIGHTS)
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

    def _write_state(
        self, checkpoint: Path, weights: dict[str, Tensor], moments: dict[str, Tensor]
    ) -> None:
        (checkpoint / "state").mkdir()
        save_file(weights, checkpoint / MODEL_FILE, metadata={"format": "pt"})
        save_file(moments, checkpoint / OPTIMIZER_FILE)
        if self.accelerator.scaler is not None:
            (checkpoint / SCALER_FILE).write_text(json.dumps(self.accelerator.scaler.state_dict()))


def _write_average(average: WeightAverage[MoHDiTTransformer2DModel], folder: Path) -> None:
    average.model.save_config(folder)
    save_file(average.model.state_dict(), folder / WEIGHTS, metadata={"format": "pt"})


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
