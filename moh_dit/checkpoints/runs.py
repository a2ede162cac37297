"""Find the checkpoints of a run folder.

    RUN/
      config.yaml           resolved configuration, which reproduces the run
      data.json             identifies the data and the autoencoder of the run by content
      classes.json          class names, by label
      vae/  scheduler/      the autoencoder and the noise process, in diffusers format
      checkpoints/
        step-00001500/
          transformer/      averaged (EMA) weights in diffusers format, for sampling
          ema-0.999/ …      further averages, if the run keeps several
          state/            raw weights, optimizer state and counters, for resuming

Checkpoints are written atomically, so every ``step-*`` folder is complete.
"""

import re
from pathlib import Path

import yaml

from ..common.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
DATA_FILE = "data.json"


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}"


def checkpoint_step(checkpoint: Path) -> int:
    """Return the number of optimizer steps of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(run: Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted(path for path in folders if re.fullmatch(r"step-\d{8,}", path.name))


def label_dropout(path: Path) -> float | None:
    """Return the label dropout of the run that a run or checkpoint folder belongs to.

    Returns:
        ``None`` if the path belongs to no run, or if its settings cannot be read.
    """
    try:
        run = resolve_checkpoint(path)[0]
        return float(yaml.safe_load((run / "config.yaml").read_text())["label_dropout"])
    except (UserError, OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return None


def resolve_checkpoint(path: Path) -> tuple[Path, Path]:
    """Return the run folder and the checkpoint folder that a path stands for.

    Args:
        path: a run folder, which stands for its newest checkpoint, or one checkpoint folder.

    Raises:
        UserError: ``path`` is neither, or the run has no checkpoint yet.
    """
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist")
    if path.is_file():
        raise UserError(f"checkpoint {path} is a file; give a run folder or one of its checkpoints")
    path = path.resolve()
    if (path / "transformer").is_dir() and path.parent.name == "checkpoints":
        return path.parent.parent, path
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"{path} is neither a run folder (no config.yaml) nor a model or pipeline folder"
        )
    if not (checkpoints := list_checkpoints(path)):
        raise UserError(f"run {path} has no checkpoint yet")
    return path, checkpoints[-1]
