"""Open checkpoints: runs (see ``runs``), models and pipelines of this project and of others.

Besides run folders: model and pipeline folders of this project and of diffusers' DiT, published
``.pt`` files, ``.safetensors`` files, and hub ids of any of these (docs/checkpoints.md).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin
from safetensors import SafetensorError

from ..autoencoder import autoencoder_identity, load_autoencoder, stored_class
from ..common.errors import UserError
from ..common.hub import local_path
from ..common.manifest import verify_files
from ..common.paths import is_weight_file
from ..diffusion.process import make_scheduler
from ..model.architecture import full_config
from ..model.transformer import MoHDiTTransformer2DModel
from ..pipeline.pipeline import MoHDiTPipeline
from .infer_config import check_sizes, infer_config, state_difference
from .runs import DATA_FILE, WEIGHTS, resolve_checkpoint
from .state_dict_names import (
    DIFFUSERS_CLASSES,
    fit_null_class,
    fit_positions,
    from_diffusers,
    from_diffusers_config,
    is_diffusers,
)
from .weight_files import State, open_weights, unwrap_names

# File names of weights in a folder, in order of preference.
PATTERNS = ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin", "*.pt",
            "*.pth", "*.ckpt")  # fmt: skip
# Errors that libraries raise for a folder with missing or truncated files.
DAMAGED_FOLDER = (OSError, ValueError, RuntimeError, SafetensorError, AttributeError, LookupError)


@dataclass
class OpenedCheckpoint:
    """The weights of a model with their configuration, in memory-mapped tensors.

    Attributes:
        path: the weight file, or the index of a sharded one.
        format: the format it was in: ``"moh-dit"``, ``"published"`` or ``"diffusers"``.
        config: arguments of :class:`MoHDiTTransformer2DModel`; ``None`` if the weights came
            without a configuration (see :meth:`resolve`).
        state: the state dict, under this project's names.
        folder: the run or pipeline folder of the weights, which contains ``vae/`` and
            ``scheduler/``; ``None`` for weights on their own.
        verify: whether files with a manifest are compared with it.
    """

    path: Path
    format: str
    config: dict[str, Any] | None
    state: State
    folder: Path | None = None
    verify: bool = True

    def resolve(self, **overrides: Any) -> dict[str, Any]:
        """Return the full configuration, after checking that the weights fit it.

        Args:
            overrides: arguments of the model; they replace stored or inferred ones.

        Raises:
            UserError: keys or shapes of the weights differ, or no preset has their shapes.
        """
        try:
            known = {**self.config, **overrides} if self.config else None
            config = full_config(known or infer_config(self.state, overrides))
            check_sizes(self.state, config)
            fit_positions(self.state, config)
            if self.config is None or "num_classes" in overrides:
                fit_null_class(self.state, config, is_given="num_classes" in overrides)
            with torch.device("meta"):
                model = MoHDiTTransformer2DModel(**config)
            if difference := state_difference(model, self.state):
                raise UserError(f"the weights do not match the model: {difference}")
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.path}: the configuration is invalid: {reason}") from None
        return config

    def build(self, dtype: torch.dtype | None = None, **overrides: Any) -> MoHDiTTransformer2DModel:
        """Return the model in evaluation mode.

        Args:
            dtype: convert the weights to this type; ``None`` keeps the stored type.
            overrides: see :meth:`resolve`.
        """
        config = self.resolve(**overrides)
        with torch.device("meta"):
            model = MoHDiTTransformer2DModel(**config)
        # torch.save overwrites a file in place, which would change memory-mapped weights.
        copy = ".safetensors" not in self.path.name
        state = {key: t.to(dtype or t.dtype, copy=copy) for key, t in self.state.items()}
        model.load_state_dict(state, assign=True)
        return model.eval()

    def class_names(self) -> list[str] | None:
        """Return the names of the classes, by label, or ``None`` if there are none."""
        if self.folder is None:
            return None
        if not (self.folder / "model_index.json").is_file():
            try:
                return json.loads((self.folder / "classes.json").read_text())
            except (OSError, ValueError) as error:
                raise UserError(f"{self.folder} cannot be opened: {error}") from None
        index = _read_json(self.folder / "model_index.json", self.verify)
        if labels := index.get("id2label"):  # a DiTPipeline of diffusers
            return [labels[str(i)] for i in range(len(labels))]
        return index.get("class_names")


def open_checkpoint(
    source: str | Path,
    weights: str = "transformer",
    *,
    local_files_only: bool = False,
    verify: bool = True,
) -> OpenedCheckpoint:
    """Open the weights at a path or hub id.

    Args:
        source: a run folder or one of its checkpoints; a model or pipeline folder of this project
            or of diffusers; a ``.pt`` or ``.safetensors`` file; a hub id of any of these.
        weights: which weights of a checkpoint: ``"transformer"`` (the first average), ``"raw"``
            (not averaged), or the name of another average, such as ``"ema-0.999"``.
        local_files_only: use the local cache of the hub and download nothing.
        verify: compare files that are listed in a manifest with it.

    Raises:
        UserError: the source is missing, damaged, of an unknown kind, or unsafe to open.
    """
    path = local_path(source, local_files_only)
    if path.is_file():
        return _open_model(path, path.parent / "config.json", weights, verify)
    if (path / "model_index.json").is_file():
        folder = path / "transformer"
        return _open_model(find_weights(folder), folder / "config.json", weights, verify, path)
    is_run = (path / "config.yaml").is_file() or path.resolve().parent.name == "checkpoints"
    if not is_run and any(is_weight_file(file.name) for file in path.iterdir()):
        return _open_model(find_weights(path), path / "config.json", weights, verify)
    run, checkpoint = resolve_checkpoint(path)
    raw = weights == "raw"
    file = checkpoint / ("state/model.safetensors" if raw else f"{weights}/{WEIGHTS}")
    if not file.is_file():
        kept = [path.parent.name for path in sorted(checkpoint.glob(f"*/{WEIGHTS}"))]
        raise UserError(
            f"{checkpoint} has no weights named {weights!r}; choose one of {', '.join(kept)}, raw"
        )
    config_file = checkpoint / "transformer" / "config.json"
    return _open_model(file, config_file, weights, verify, run)


def find_weights(folder: Path) -> Path:
    """Return the weight file of a folder, or the index of a sharded one."""
    for pattern in PATTERNS:
        found = sorted(folder.glob(pattern))
        preferred = [file for file in found if file.name.startswith("diffusion_pytorch_model.")]
        if len(chosen := preferred if len(found) > 1 else found) == 1:
            return chosen[0]
        if found:
            names = ", ".join(file.name for file in found[:4])
            raise UserError(f"{folder} has several weight files: {names}; give one of them")
    raise UserError(f"{folder} has no weights ({', '.join(PATTERNS)})")


def _open_model(
    file: Path, config_file: Path, weights: str, verify: bool, folder: Path | None = None
) -> OpenedCheckpoint:
    entry = "raw" if weights == "raw" else "averaged"
    state = open_weights(file, entry, verify)
    config = _read_json(config_file, verify) if config_file.is_file() else {}
    name = config.get("_class_name")
    try:
        state = unwrap_names(state, entry)
        if name in DIFFUSERS_CLASSES:
            config = from_diffusers_config(config)
            check_sizes(state, full_config(config))
            state = from_diffusers(state, config)
            return OpenedCheckpoint(file, "diffusers", config, state, folder, verify)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{config_file} is not the configuration of a DiT: {error}") from None
    if name == MoHDiTTransformer2DModel.__name__:
        return OpenedCheckpoint(file, "moh-dit", config, state, folder, verify)
    if name is not None:
        raise UserError(f"{config_file} describes {name}, which is not a DiT or MoH-DiT")
    if is_diffusers(state):
        raise UserError(
            f"{file} contains weights of diffusers' DiT, which need a config.json beside the file"
        )
    is_own = file.name.endswith((".safetensors", ".json"))
    format = "moh-dit" if is_own else "published"
    return OpenedCheckpoint(file, format, None, state, folder, verify)


def _read_json(file: Path, verify: bool) -> dict[str, Any]:
    if verify:
        verify_files(file)
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{file} is not a configuration: expected a JSON object")
    return dict(content)


def load_pretrained(
    source: str | Path,
    *,
    weights: str = "transformer",
    dtype: torch.dtype | None = None,
    local_files_only: bool = False,
    verify: bool = True,
    **overrides: Any,
) -> MoHDiTTransformer2DModel:
    """Load a (MoH-)DiT of this project, of diffusers, or from a published ``.pt`` file.

    Args:
        source, weights, local_files_only, verify: see :func:`open_checkpoint`.
        dtype: convert the weights to this type; ``None`` keeps the stored type.
        overrides: arguments of the model, which replace stored or inferred ones; for example
            ``num_heads`` for weights that match no preset.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        UserError: see :func:`open_checkpoint` and :meth:`OpenedCheckpoint.resolve`.
    """
    opened = open_checkpoint(source, weights, local_files_only=local_files_only, verify=verify)
    return opened.build(dtype, **overrides)


def load_pipeline(
    source: str | Path,
    weights: str = "transformer",
    autoencoder: str | None = None,
    *,
    verify: bool = True,
) -> MoHDiTPipeline:
    """Load a pipeline for sampling, with float32 weights.

    Args:
        source, weights, verify: see :func:`open_checkpoint`.
        autoencoder: a folder or hub id. It replaces the stored autoencoder, and is required for
            weights without one, which are sampled by the papers' noise process.

    Raises:
        UserError: a part is missing or unreadable, or the parts do not fit together.
    """
    opened = open_checkpoint(source, weights, verify=verify)
    try:
        transformer = opened.build(torch.float32)
        vae, scheduler = load_vae_and_scheduler(opened, dict(transformer.config), autoencoder)
        index = opened.folder / "model_index.json" if opened.folder else None
        stored = _read_json(index, verify) if index and index.is_file() else {}
        return MoHDiTPipeline(
            transformer,
            vae.float(),
            scheduler,
            class_names=opened.class_names(),
            prediction_type=stored.get("prediction_type"),
        )
    except UserError:
        raise
    except DAMAGED_FOLDER as error:
        raise UserError(f"{source} cannot be opened: {' '.join(str(error).split())}") from None


def load_vae_and_scheduler(
    opened: OpenedCheckpoint, config: Mapping[str, Any], autoencoder: str | None = None
) -> tuple[ModelMixin, SchedulerMixin]:
    """Load the autoencoder and the scheduler that belong to a model.

    Args:
        opened: the model's checkpoint. A stored autoencoder keeps its stored type.
        config: arguments of the model, which select the papers' noise process if no scheduler is
            stored.
        autoencoder: a folder or hub id, used instead of the stored autoencoder.

    Raises:
        UserError: there is no autoencoder, or a part cannot be opened.
    """
    folder = opened.folder
    if autoencoder is not None:
        vae = load_autoencoder(autoencoder)
    elif folder is not None and (folder / "vae").is_dir():
        vae = _load_stored_vae(folder, opened.verify)
    else:
        raise UserError(
            f"{opened.path} has no autoencoder; give the one that the model was trained with, for "
            "published models --autoencoder stabilityai/sd-vae-ft-ema"
        )
    if folder is not None:
        return vae, _load_scheduler(folder / "scheduler", opened.verify)
    return vae, make_scheduler(config["out_channels"] == 2 * config["in_channels"])


def _load_stored_vae(owner: Path, verify: bool) -> ModelMixin:
    """Load the autoencoder of a run or pipeline folder."""
    folder = owner / "vae"
    try:
        tensors = open_weights(find_weights(folder), verify=verify).values()
        dtypes = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
        dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
        if verify:
            verify_files(folder / "config.json")
        kind = stored_class(folder, str(folder))
        vae = kind.from_pretrained(folder, local_files_only=True, dtype=dtype)
        if verify and (owner / DATA_FILE).is_file():
            check_autoencoder(vae, owner)
        return vae
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be opened: {' '.join(str(error).split())}") from None


def check_autoencoder(vae: ModelMixin, run: Path) -> None:
    """Raise ``UserError`` if the weights of ``vae`` are not those that ``data.json`` identifies."""
    identity = _read_json(run / DATA_FILE, verify=False).get("autoencoder")
    if identity is not None and identity != autoencoder_identity(vae):
        raise UserError(
            f"{run / 'vae'} is damaged: its weights do not have the hash in {run / DATA_FILE}. "
            "Resume the run to write it again, or give --no_verify"
        )


def _load_scheduler(folder: Path, verify: bool) -> SchedulerMixin:
    name = _read_json(folder / "scheduler_config.json", verify).get("_class_name")
    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise UserError(f"{folder} names the class {name}, which is not a scheduler of diffusers")
    return getattr(diffusers, name).from_pretrained(folder)
