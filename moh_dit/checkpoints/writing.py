"""Write a checkpoint in each format.

The function ``plan_…`` of a format checks an opened checkpoint with its full configuration, and
returns the function that writes it to a path. So every error is raised before anything is written.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers import __version__ as diffusers_version
from torch import Tensor

from ..autoencoder import latent_scaling
from ..common.errors import UserError
from ..diffusion.samplers import named_scheduler, prediction_type
from ..model.architecture import find_preset
from ..model.transformer import MoHDiTTransformer2DModel
from ..pipeline import model_card
from ..pipeline.bundled_code import write_code
from ..pipeline.pipeline import MoHDiTPipeline
from .config import ConvertConfig
from .opening import OpenedCheckpoint, load_vae_and_scheduler
from .run_details import run_details
from .runs import WEIGHTS
from .state_dict_names import to_diffusers, to_diffusers_config
from .weight_files import write_safetensors, write_torch

Write = Callable[[Path], None]


def plan_model(opened: OpenedCheckpoint, settings: ConvertConfig) -> Write:
    """Prepare a model folder of this project: ``config.json`` and safetensors."""
    model = _empty_model(opened)

    def write(folder: Path) -> None:
        folder.mkdir()
        model.save_config(folder)
        write_safetensors(folder / WEIGHTS, opened.state)

    return write


def plan_pipeline(opened: OpenedCheckpoint, settings: ConvertConfig) -> Write:
    """Prepare a pipeline folder of this project: model, autoencoder, scheduler and model card."""
    config, source = _config(opened), opened.folder
    write_model = plan_model(opened, settings)
    vae, scheduler = load_vae_and_scheduler(opened, config, settings.autoencoder)
    pipeline = MoHDiTPipeline(
        _empty_model(opened), vae, scheduler, class_names=opened.class_names()
    )
    license = settings.license or (model_card.card_license(source) if source else None)
    details = run_details(source, license)
    if license is None:
        print("note: the model card states no licence; give one, such as --license apache-2.0")
    if not Path(settings.source).exists():  # the source is a hub id
        details.base_model = "/".join(settings.source.split("/")[:2])

    def write(folder: Path) -> None:
        folder.mkdir()
        pipeline.save_config(folder)
        write_model(folder / "transformer")
        vae.save_pretrained(folder / "vae")
        scheduler.save_pretrained(folder / "scheduler")
        if source and settings.license is None and model_card.card_matches_model(source, config):
            model_card.copy_or_write_card(folder, str(source), config)
        else:
            model_card.write_card(folder, config, details)
        if settings.with_code:
            write_code(folder)

    return write


def plan_published(opened: OpenedCheckpoint, settings: ConvertConfig) -> Write:
    """Prepare a ``.pt`` file with the state dict alone, like the published checkpoints."""
    if _config(opened)["router"] != "learned":
        raise UserError(
            "the query_norm router has no weights, so a published .pt file would open as a dense "
            "model; convert to moh-dit or pipeline instead"
        )
    if find_preset(_config(opened)) is None:
        print(
            "note: this model matches no preset, and a .pt file has no configuration: to open it, "
            "give the number of heads (model.num_heads …)"
        )
    return lambda file: write_torch(file, opened.state)


def plan_diffusers(opened: OpenedCheckpoint, settings: ConvertConfig) -> Write:
    """Prepare a model folder of diffusers' ``DiTTransformer2DModel``."""
    config = to_diffusers_config(_config(opened))
    state = to_diffusers(opened.state, _config(opened))

    def write(folder: Path) -> None:
        folder.mkdir()
        content = {**config, "_diffusers_version": diffusers_version}
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        write_safetensors(folder / WEIGHTS, state)

    return write


def plan_diffusers_pipeline(opened: OpenedCheckpoint, settings: ConvertConfig) -> Write:
    """Prepare a pipeline folder of diffusers' ``DiTPipeline``."""
    write_model = plan_diffusers(opened, settings)
    vae, scheduler = load_vae_and_scheduler(opened, _config(opened), settings.autoencoder)
    if prediction_type(scheduler) == "flow_prediction":
        raise UserError(
            "this model predicts a flow, but diffusers' DiTPipeline requires a model that predicts "
            "noise; convert to pipeline instead"
        )
    scaling = latent_scaling(vae)
    if type(vae) is not AutoencoderKL or isinstance(scaling.factor, Tensor) or scaling.shift:
        raise UserError(
            "diffusers' DiTPipeline requires an AutoencoderKL that has a scaling factor and no "
            "other statistics of its latents; convert to pipeline instead"
        )
    if scheduler.config.get("variance_type") == "learned_range":
        scheduler = named_scheduler("ddim", scheduler)  # DiTPipeline drops the variance channels
    index: dict[str, Any] = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers_version,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if names := opened.class_names():
        index["id2label"] = {str(i): name for i, name in enumerate(names)}

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        write_model(folder / "transformer")
        vae.save_pretrained(folder / "vae")
        scheduler.save_pretrained(folder / "scheduler")

    return write


PLANS: dict[str, Callable[[OpenedCheckpoint, ConvertConfig], Write]] = {
    "moh-dit": plan_model,
    "pipeline": plan_pipeline,
    "published": plan_published,
    "diffusers": plan_diffusers,
    "diffusers-pipeline": plan_diffusers_pipeline,
}


def _config(opened: OpenedCheckpoint) -> dict[str, Any]:
    assert opened.config is not None, "converting resolves the configuration first"
    return opened.config


def _empty_model(opened: OpenedCheckpoint) -> MoHDiTTransformer2DModel:
    with torch.device("meta"):
        return MoHDiTTransformer2DModel(**_config(opened))
