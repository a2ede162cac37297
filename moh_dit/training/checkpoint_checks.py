"""Find the newest checkpoint of a run whose files are complete, undamaged and fit the model."""

import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from ..checkpoints.infer_config import Shapes, shape_difference, shapes_of
from ..checkpoints.opening import open_checkpoint
from ..checkpoints.runs import WEIGHTS, list_checkpoints
from ..common.errors import UserError
from ..common.manifest import MANIFEST, find_damage
from ..model.transformer import MoHDiTTransformer2DModel
from .config import TrainConfig
from .ema import ema_name, power_name

MODEL_FILE, OPTIMIZER_FILE = "state/model.safetensors", "state/optimizer.safetensors"
SCALER_FILE = "state/scaler.json"  # in checkpoints of fp16 runs


def average_folders(names: list[str]) -> list[str]:
    """Return the folder of each average in a checkpoint; sampling uses the first by default."""
    return ["transformer", *names[1:]]


def newest_intact_checkpoint(run: Path, config: TrainConfig) -> Path | None:
    """Return the newest intact checkpoint, or ``None`` if the run has no checkpoints.

    Newer checkpoints that are damaged are renamed and reported.

    Raises:
        UserError: all checkpoints are damaged; they are left unchanged.
    """
    faults: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(run)):
        if (fault := find_fault(checkpoint, config)) is None:
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
        aside = move_aside(damaged)
        message = f"{fault}; moved the checkpoint to {aside.name}, continuing from {checkpoint}"
        tqdm.write(message, file=sys.stderr)
    if not (config.no_verify or (checkpoint / MANIFEST).is_file()):
        tqdm.write(f"{checkpoint} has no {MANIFEST}: not verified", file=sys.stderr)
    return checkpoint


def move_aside(damaged: Path) -> Path:
    """Rename a damaged file or folder to ``damaged-NAME`` and return the new path."""
    aside = damaged.with_name(f"damaged-{damaged.name}")
    while aside.exists():  # from an earlier resume
        aside = aside.with_name(f"damaged-{aside.name}")
    return damaged.rename(aside)


def find_fault(checkpoint: Path, config: TrainConfig) -> str | None:
    """Describe what prevents resuming from a checkpoint; ``None`` if nothing does."""
    has_checksums = (checkpoint / MANIFEST).is_file() and not config.no_verify
    if has_checksums and (damage := find_damage(checkpoint)):
        return damage
    averages = [*map(ema_name, config.ema_decays), *map(power_name, config.ema_power_stds)]
    try:
        model_config = open_checkpoint(checkpoint, verify=False).resolve()
        if config.mixed_precision == "fp16":
            scaler = json.loads((checkpoint / SCALER_FILE).read_text())
            torch.amp.GradScaler("cpu").load_state_dict(scaler)
    except UserError as error:
        return str(error)
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{checkpoint / SCALER_FILE} is damaged ({error})"
    with torch.device("meta"):
        model = MoHDiTTransformer2DModel(**model_config)
    return find_misfit(checkpoint, model, averages)


def find_misfit(
    checkpoint: Path, model: MoHDiTTransformer2DModel, averages: list[str]
) -> str | None:
    """Describe the first file whose tensors do not fit the model; ``None`` if all do.

    Args:
        checkpoint: folder of the checkpoint. Only headers of its files are read.
        model: the model to train, possibly without weights (on the meta device).
        averages: names of the averages of the run.
    """
    weights = shapes_of(model.state_dict())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    moments: dict[str, tuple[int, ...]] = {f"step.{name}": () for name in trained}
    for kind in ("exp_avg", "exp_avg_sq"):
        moments |= {f"{kind}.{name}": weights[name] for name in trained}
    files: dict[str, Shapes] = {MODEL_FILE: weights, OPTIMIZER_FILE: moments}
    files |= {f"{folder}/{WEIGHTS}": weights for folder in average_folders(averages)}
    for name, expected in files.items():
        file = checkpoint / name
        try:
            with safe_open(file, framework="pt") as opened:  # compares header and file length
                slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
                found = {key: tuple(each.get_shape()) for key, each in slices.items()}
                others = {each.get_dtype() for each in slices.values()} - {"F32"}
        except (OSError, SafetensorError) as error:
            return f"{file} is damaged ({error})"
        if difference := shape_difference(expected, found):
            return f"{file} does not match the model: {difference}"
        if others:
            return f"{file} does not match the model: it contains {', '.join(sorted(others))}"
    return None
