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
from safetensors import SafetensorError, safe_open
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
from .config import TrainConfig
from .ema import PowerEma, WeightAverage, ema_name, power_name
from .sharding import gather_state, restore_state

SCALER_FILE = Path("state/scaler.json")  # in checkpoints of fp16 runs

WeightAverages = list[WeightAverage[MoHDiTTransformer2DModel]]


def average_folder(index: int, name: str) -> str:
    """Return the folder of an average in a checkpoint; sampling uses the first by default."""
    return "transformer" if index == 0 else name


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
                self._write_state(partial / "state", weights, moments)
                for index, average in enumerate(self.averages):
                    _write_average(average, partial / average_folder(index, average.name))
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
            UserError: a file is missing or does not match the model.
        """
        folder = checkpoint / "state"
        for index, average in enumerate(self.averages):
            file = checkpoint / average_folder(index, average.name) / WEIGHTS
            load_weights(average.model, file)
            average.shard(self.model)
        weights = open_weights(folder / "model.safetensors")
        moments = open_weights(folder / "optimizer.safetensors")
        restore_state(list(self.model.named_parameters()), self.optimizer, weights, moments)
        if self.accelerator.scaler is not None:
            scaler_state = json.loads((checkpoint / SCALER_FILE).read_text())
            self.accelerator.scaler.load_state_dict(scaler_state)
        return checkpoint_step(checkpoint)

    def _write_state(
        self, folder: Path, weights: dict[str, Tensor], moments: dict[str, Tensor]
    ) -> None:
        folder.mkdir()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        save_file(moments, folder / "optimizer.safetensors")
        if self.accelerator.scaler is not None:
            (folder / SCALER_FILE.name).write_text(json.dumps(self.accelerator.scaler.state_dict()))


def _write_average(average: WeightAverage[MoHDiTTransformer2DModel], folder: Path) -> None:
    average.model.save_config(folder)
    save_file(average.model.state_dict(), folder / WEIGHTS, metadata={"format": "pt"})


def newest_intact_checkpoint(run: Path, config: TrainConfig) -> Path | None:
    """Return the newest intact checkpoint, or ``None`` if the run has no checkpoints.

    Newer checkpoints that are damaged are renamed and reported.

    Raises:
        UserError: all checkpoints are damaged; they are left unchanged.
    """
    faults: dict[Path, str] = {}
    checkpoints = list_checkpoints(run)
    for checkpoint in reversed(checkpoints):
        if (fault := _find_damage(checkpoint, config)) is None:
            break
        faults[checkpoint] = fault
    else:
        if faults:
            raise UserError(
                f"all {len(faults)} checkpoints of {run} are damaged: "
                f"{'; '.join(faults.values())}. Restore the files, or choose a new --run_dir"
            )
        return None
    for damaged, fault in faults.items():
        renamed = damaged.with_name(f"damaged-{damaged.name}")
        while renamed.exists():  # from an earlier resume
            renamed = renamed.with_name(f"damaged-{renamed.name}")
        damaged.rename(renamed)
        tqdm.write(f"{fault}; renamed the checkpoint to {renamed}", file=sys.stderr)
    return checkpoint


def _find_damage(checkpoint: Path, config: TrainConfig) -> str | None:
    """Describe the first damaged file of a checkpoint; ``None`` if all are intact."""
    averages = [*map(ema_name, config.ema_decays), *map(power_name, config.ema_power_stds)]
    folders = [average_folder(index, name) for index, name in enumerate(averages)]
    files = ["transformer/config.json", "state/model.safetensors", "state/optimizer.safetensors"]
    files += [f"{folder}/{WEIGHTS}" for folder in folders]
    if config.mixed_precision == "fp16":
        files.append(str(SCALER_FILE))
    for file in [checkpoint / name for name in files]:
        try:
            if file.suffix == ".json":
                json.loads(file.read_text())
            else:
                with safe_open(file, framework="pt"):  # opening compares header and file length
                    pass
        except (OSError, ValueError, SafetensorError) as error:
            return f"{file} is damaged ({error})"
    return None


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
    with atomic_output(final, advice) as partial:
        partial.mkdir()
        yield partial
