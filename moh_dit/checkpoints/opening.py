"""What can be opened: run folders, whose layout this module knows, and everyone's checkpoints.

    RUN/
      config.yaml           resolved configuration; alone reproduces the run
      data.json             what tells the data and the autoencoder of the run from others
      classes.json          class names, by label
      vae/  scheduler/      the autoencoder and the noise process, diffusers format
      checkpoints/
        step-00001500/
          transformer/      averaged (EMA) weights, diffusers format: what one samples with
          ema-0.999/ …      further averages, where several are kept
          state/            raw weights, optimizer and counters: what resuming needs

A checkpoint is written aside and renamed when whole, so every ``step-*`` folder is complete.

Beside runs: model and pipeline folders of this project and of diffusers' DiT, published ``.pt``
files, ``.safetensors`` files, and hub ids of any of them (docs/checkpoints.md).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin
from safetensors import SafetensorError
from torch import Tensor

from ..autoencoder import load_autoencoder
from ..common.errors import UserError
from ..common.hub import is_weight_file, local_path
from ..diffusion.process import make_scheduler
from ..model.architecture import full_config
from ..model.transformer import MoHDiTTransformer2DModel
from ..pipeline.pipeline import MoHDiTPipeline
from .infer_config import infer_config, state_difference
from .state_dict_names import DIFFUSERS_CLASSES, from_diffusers, from_diffusers_config, is_diffusers
from .weight_files import State, open_weights

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Where a folder's weights are, the first kind that is there.
PATTERNS = ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin", "*.pt",
            "*.pth", "*.ckpt")  # fmt: skip
# What reading a folder raises where something in it is cut off or missing.
TORN_FOLDER = (OSError, ValueError, RuntimeError, SafetensorError, AttributeError, LookupError)


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
        raise UserError(f"checkpoint {path} is a file; give a run folder or a checkpoint of it")
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


@dataclass
class Opened:
    """A model's weights, not yet read, whatever they came as.

    Attributes:
        path: the file or folder with the weights.
        kind: whose format it was: ``"moh-dit"``, ``"published"`` or ``"diffusers"``.
        config: arguments of :class:`MoHDiTTransformer2DModel`; ``None`` where the weights came
            without a configuration (see :meth:`resolve`).
        state: the weights under this project's names.
        home: the run or pipeline folder around them, with ``vae/`` and ``scheduler/``.
    """

    path: Path
    kind: str
    config: dict[str, Any] | None
    state: State
    home: Path | None = None

    def resolve(self, **overrides: Any) -> dict[str, Any]:
        """The full configuration, checked against the weights.

        Args:
            overrides: arguments of the model that go before what is stored or inferred.

        Raises:
            UserError: when keys or shapes differ, or the shapes are those of no preset.
        """
        try:
            known = {**self.config, **overrides} if self.config else None
            config = full_config(known or infer_config(self.state, overrides))
            with torch.device("meta"):
                model = MoHDiTTransformer2DModel(**config)
            if difference := state_difference(model, self.state):
                raise UserError(f"the weights do not match the model: {difference}")
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        return config

    def build(self, dtype: torch.dtype | None = None, **overrides: Any) -> MoHDiTTransformer2DModel:
        """The model in evaluation mode, its weights read one by one."""
        config = self.resolve(**overrides)
        with torch.device("meta"):
            model = MoHDiTTransformer2DModel(**config)
        model.load_state_dict(self.read(dtype), assign=True)
        return model.eval()

    def read(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """All weights, in ``dtype`` or as they are stored."""
        return {name: t.read().to(dtype or t.dtype) for name, t in self.state.items()}

    def class_names(self) -> list[str] | None:
        """The name of each class, where the run or pipeline has any."""
        if self.home is None:
            return None
        if not (self.home / "model_index.json").is_file():
            try:
                return json.loads((self.home / "classes.json").read_text())
            except (OSError, ValueError) as error:
                raise UserError(f"{self.home} cannot be opened: {error}") from None
        index = read_json(self.home / "model_index.json")
        if labels := index.get("id2label"):  # of diffusers' DiTPipeline
            return [labels[str(i)] for i in range(len(labels))]
        return index.get("class_names")


def open_checkpoint(
    source: str | Path, weights: str = "transformer", *, local_files_only: bool = False
) -> Opened:
    """Find the weights behind a path or hub id, without reading them.

    Args:
        source: a run folder or a checkpoint of it; a model or pipeline folder of this project or of
            diffusers; a ``.pt`` or ``.safetensors`` file; a hub id of any of these.
        weights: which weights, where there are several: ``"transformer"`` (the first average),
            ``"raw"`` (not averaged), or a folder of a checkpoint, e.g. ``"ema-0.999"``.
        local_files_only: never ask the hub.

    Raises:
        UserError: when nothing is there, or it is damaged, unknown, or unsafe to open.
    """
    path = local_path(source, local_files_only)
    if path.is_file():
        return _open_model(path, path.parent / "config.json", weights)
    if (path / "model_index.json").is_file():
        folder = path / "transformer"
        return _open_model(find_weights(folder), folder / "config.json", weights, path)
    is_run = (path / "config.yaml").is_file() or path.resolve().parent.name == "checkpoints"
    if not is_run and any(is_weight_file(file.name) for file in path.iterdir()):
        return _open_model(find_weights(path), path / "config.json", weights)
    run, checkpoint = resolve_checkpoint(path)
    raw = weights == "raw"
    file = checkpoint / ("state/model.safetensors" if raw else f"{weights}/{WEIGHTS}")
    if not file.is_file():
        kept = [path.parent.name for path in sorted(checkpoint.glob(f"*/{WEIGHTS}"))]
        raise UserError(f"{checkpoint} has no weights {weights!r}; it has {', '.join(kept)}, raw")
    return _open_model(file, checkpoint / "transformer" / "config.json", weights, run)


def find_weights(folder: Path) -> Path:
    """The weight file of a folder, or the index of a sharded one."""
    for pattern in PATTERNS:
        found = sorted(folder.glob(pattern))
        preferred = [file for file in found if file.name.startswith("diffusion_pytorch_model.")]
        if len(chosen := preferred if len(found) > 1 else found) == 1:
            return chosen[0]
        if found:
            names = ", ".join(file.name for file in found[:4])
            raise UserError(f"{folder} has several weight files: {names}; give one of them")
    raise UserError(f"{folder} has no weights ({', '.join(PATTERNS)})")


def _open_model(file: Path, config_file: Path, weights: str, home: Path | None = None) -> Opened:
    state: State = open_weights(file, "raw" if weights == "raw" else "averaged")
    config = read_json(config_file) if config_file.is_file() else {}
    name = config.get("_class_name")
    try:
        if name in DIFFUSERS_CLASSES:
            config = from_diffusers_config(config)
            state = from_diffusers(state, config)
            return Opened(file, "diffusers", config, state, home)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if name == MoHDiTTransformer2DModel.__name__:
        return Opened(file, "moh-dit", config, state, home)
    if name is not None:
        raise UserError(f"{config_file} describes {name}, which is no DiT")
    if is_diffusers(state):
        raise UserError(f"{file} is a DiT of diffusers, whose config.json is not beside it")
    kind = "moh-dit" if file.name.endswith((".safetensors", ".json")) else "published"
    return Opened(file, kind, None, state, home)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; a ``UserError`` where there is none."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{file} is no configuration")
    return dict(content)


def load_pretrained(
    source: str | Path,
    *,
    weights: str = "transformer",
    dtype: torch.dtype | None = None,
    local_files_only: bool = False,
    **overrides: Any,
) -> MoHDiTTransformer2DModel:
    """Load anyone's (MoH-)DiT: this project's, a published ``.pt``, Meta's, diffusers'.

    Args:
        source, weights, local_files_only: see :func:`open_checkpoint`.
        dtype: what to convert the weights to; as stored unless given.
        overrides: arguments of the model that go before what is stored or inferred, e.g.
            ``num_heads`` for weights of no preset.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        UserError: see :func:`open_checkpoint` and :meth:`Opened.resolve`.
    """
    opened = open_checkpoint(source, weights, local_files_only=local_files_only)
    return opened.build(dtype, **overrides)


def load_pipeline(
    source: str | Path, weights: str = "transformer", autoencoder: str | None = None
) -> MoHDiTPipeline:
    """Open for sampling whatever :func:`open_checkpoint` opens; the weights become float32.

    Args:
        source, weights: see there.
        autoencoder: a folder or hub id, for weights without one (or in place of theirs). Such
            weights sample by the papers' process.

    Raises:
        UserError: when something is missing, unreadable, or does not fit together.
    """
    opened = open_checkpoint(source, weights)
    home = opened.home
    try:
        transformer = opened.build(torch.float32)
        vae, scheduler = surroundings(opened, dict(transformer.config), autoencoder)
        index = home / "model_index.json" if home else None
        stored = read_json(index) if index and index.is_file() else {}
        return MoHDiTPipeline(
            transformer,
            vae.float(),
            scheduler,
            class_names=opened.class_names(),
            prediction_type=stored.get("prediction_type"),
        )
    except UserError:
        raise
    except TORN_FOLDER as error:
        raise UserError(f"{source} cannot be opened: {' '.join(str(error).split())}") from None


def surroundings(
    opened: Opened, config: Mapping[str, Any], autoencoder: str | None = None
) -> tuple[AutoencoderKL, SchedulerMixin]:
    """The autoencoder, in its own precision unless one is named, and the scheduler.

    Args:
        config: arguments of the model, which say the papers' process where no scheduler is stored.
        autoencoder: a folder or hub id in place of what is stored.

    Raises:
        UserError: when there is no autoencoder, or something cannot be opened.
    """
    home = opened.home
    if autoencoder is not None:
        vae = load_autoencoder(autoencoder)
    elif home is not None and (home / "vae").is_dir():
        vae = _open_vae(home / "vae")
    else:
        raise UserError(
            f"{opened.path} has no autoencoder; give the one it was trained with, for the "
            "published models --autoencoder stabilityai/sd-vae-ft-ema"
        )
    if home is not None:
        return vae, load_scheduler(home / "scheduler")
    return vae, make_scheduler(config["out_channels"] == 2 * config["in_channels"])


def _open_vae(folder: Path) -> AutoencoderKL:
    """The autoencoder of a pipeline or run, in the precision of its file."""
    try:
        tensors = open_weights(find_weights(folder)).values()
        dtype = max((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize)
        return AutoencoderKL.from_pretrained(folder, local_files_only=True, torch_dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be opened: {' '.join(str(error).split())}") from None


def load_scheduler(folder: Path) -> SchedulerMixin:
    """The diffusers scheduler of a run, of whichever class its objective samples with."""
    name = read_json(folder / "scheduler_config.json").get("_class_name")
    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise UserError(f"{folder} names {name}, which is no scheduler of diffusers")
    return getattr(diffusers, name).from_pretrained(folder)


def load_weights(model: MoHDiTTransformer2DModel, file: Path) -> None:
    """Load a weight file into a model; a ``UserError`` names the keys and shapes that differ."""
    state = read_weights(file)
    if difference := state_difference(model, state):
        raise UserError(f"{file} does not match the model: {difference}")
    model.load_state_dict(state)


def read_weights(file: Path) -> dict[str, Tensor]:
    """The state dict in a weight file; a ``UserError`` where it is missing or is no such."""
    return {name: tensor.read() for name, tensor in open_weights(file).items()}
