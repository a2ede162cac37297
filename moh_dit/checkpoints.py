"""Run folders and what can be sampled from: one place that knows the layout.

    RUN/
      config.yaml           resolved configuration; alone reproduces the run
      classes.json          class names, by label
      vae/  scheduler/      the autoencoder and the noise process, diffusers format
      checkpoints/
        step-00001500/
          transformer/      averaged (EMA) weights, diffusers format: what one samples with
          ema-0.999/ …      further averages, where several are kept
          state/            raw weights, optimizer and counters: what resuming needs

A checkpoint is written aside and renamed when whole, so every ``step-*`` folder is complete.
"""

import json
import re
from pathlib import Path

import diffusers
from diffusers import AutoencoderKL, SchedulerMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import UserError
from .pipeline import MoHDiTPipeline
from .transformer import MoHDiTTransformer2DModel

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted(path for path in folders if re.fullmatch(r"step-\d{8,}", path.name))


def checkpoint_step(checkpoint: Path) -> int:
    """Optimizer steps behind a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step-"))


def resolve_checkpoint(path: Path) -> tuple[Path, Path]:
    """``(run, checkpoint)`` of a run folder (its newest checkpoint) or of one checkpoint in it.

    Raises:
        UserError: when it is neither, or the run has no checkpoint yet.
    """
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist")
    if path.is_file():
        kind = "a pickle" if path.suffix in PICKLES else "a file"
        raise UserError(
            f"checkpoint {path} is {kind}; give a run folder, one of its checkpoints/step-* "
            "folders, or a saved pipeline folder (weights in safetensors)"
        )
    path = path.resolve()
    if (path / "transformer").is_dir() and path.parent.name == "checkpoints":
        return path.parent.parent, path
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is neither a run folder (no config.yaml) nor a pipeline folder")
    if not (checkpoints := list_checkpoints(path)):
        raise UserError(f"run {path} has no checkpoint yet")
    return path, checkpoints[-1]


def load_pipeline(path: str | Path, weights: str = "transformer") -> MoHDiTPipeline:
    """Open a run folder, a checkpoint of it, or a saved pipeline folder for sampling.

    Args:
        path: the folder.
        weights: which weights of a checkpoint: ``"transformer"`` (the first average), ``"raw"``
            (not averaged) or the folder name of a further average, e.g. ``"ema-0.999"``.

    Raises:
        UserError: when something is missing, unreadable, or does not fit together.
    """
    path = Path(path)
    try:
        if (path / "model_index.json").is_file():
            return MoHDiTPipeline.from_pretrained(path, local_files_only=True)
        run, checkpoint = resolve_checkpoint(path)
        return MoHDiTPipeline(
            load_transformer(checkpoint, weights).eval(),
            AutoencoderKL.from_pretrained(run / "vae", local_files_only=True),
            load_scheduler(run / "scheduler"),
            class_names=json.loads((run / "classes.json").read_text()),
        )
    except UserError:
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
        SafetensorError,
        AttributeError,
        LookupError,
    ) as error:  # a torn folder
        raise UserError(f"{path} cannot be opened: {' '.join(str(error).split())}") from None


def load_scheduler(folder: Path) -> SchedulerMixin:
    """The diffusers scheduler of a run, of whichever class its objective samples with."""
    name = json.loads((folder / "scheduler_config.json").read_text())["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder)


def load_transformer(checkpoint: Path, weights: str = "transformer") -> MoHDiTTransformer2DModel:
    """The model of a checkpoint with the chosen weights (see :func:`load_pipeline`)."""
    config = MoHDiTTransformer2DModel.load_config(checkpoint / "transformer")
    model = MoHDiTTransformer2DModel.from_config(config)
    raw = weights == "raw"
    file = checkpoint / ("state/model.safetensors" if raw else f"{weights}/{WEIGHTS}")
    if not file.is_file():
        kept = [path.parent.name for path in sorted(checkpoint.glob(f"*/{WEIGHTS}"))]
        raise UserError(f"{checkpoint} has no weights {weights!r}; it has {', '.join(kept)}, raw")
    load_weights(model, file)
    return model


def load_weights(model: MoHDiTTransformer2DModel, file: Path) -> None:
    """Load a safetensors file into a model, in place; see the two steps for the errors."""
    apply_weights(model, read_weights(file), file)


def read_weights(file: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors file; a ``UserError`` where it is missing or is no such."""
    if not file.is_file():
        raise UserError(f"weights {file} do not exist")
    if file.suffix in PICKLES:
        raise UserError(f"{file} is a pickle; weights are expected as .safetensors")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors: {error}") from None


def apply_weights(model: MoHDiTTransformer2DModel, state: dict[str, Tensor], file: Path) -> None:
    """Load a state dict, or raise a ``UserError`` naming the keys and shapes that differ."""
    if difference := state_difference(model, state):
        raise UserError(f"{file} does not match the model: {difference}")
    model.load_state_dict(state)


def state_difference(model: MoHDiTTransformer2DModel, state: dict[str, Tensor]) -> str:
    """In words, how a state dict differs from what the model expects; empty when it does not."""
    expected = model.state_dict()
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & state.keys())
        if state[key].shape != expected[key].shape
    ]
    parts = [
        _some("missing", sorted(expected.keys() - state.keys())),
        _some("unexpected", sorted(state.keys() - expected.keys())),
        _some("shapes", shapes),
    ]
    return "; ".join(filter(None, parts))


def _some(what: str, items: list[str], limit: int = 4) -> str:
    if not items:
        return ""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return f"{what}: {', '.join(items[:limit])}{more}"
