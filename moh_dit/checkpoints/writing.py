"""What each format needs: planned, so that mistakes come before anything is written, then written.

A plan takes an opened checkpoint whose configuration is resolved and returns the function that
writes it to a path.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import __version__ as diffusers_version

from ..common.errors import UserError
from ..common.progress import progress_bar
from ..diffusion.samplers import named_scheduler, prediction_type
from ..model.architecture import preset_of
from ..model.transformer import MoHDiTTransformer2DModel
from ..pipeline.bundled_code import add_code
from ..pipeline.model_card import Facts, describes, keep_card, run_facts, stated_license, write_card
from ..pipeline.pipeline import MoHDiTPipeline
from .opening import WEIGHTS, Opened, surroundings
from .state_dict_names import to_diffusers, to_diffusers_config
from .weight_files import State, write_safetensors, write_torch

Write = Callable[[Path], None]


@dataclass
class Extras:
    """What goes with the weights.

    Attributes:
        autoencoder: a folder or hub id, in place of the source's.
        with_code: whether the code goes beside a pipeline.
        license: of the weights; ``None`` for what the source's card says.
        base_model: the hub id that the weights came from.
    """

    autoencoder: str | None = None
    with_code: bool = False
    license: str | None = None
    base_model: str | None = None


def plan_model(opened: Opened, extras: Extras) -> Write:
    """This project's model folder: ``config.json`` and safetensors."""
    with torch.device("meta"):
        model = MoHDiTTransformer2DModel(**arguments(opened))

    def write(folder: Path) -> None:
        folder.mkdir()
        model.save_config(folder)
        stream(opened.state, write_safetensors, folder / WEIGHTS)

    return write


def plan_pipeline(opened: Opened, extras: Extras) -> Write:
    """This project's pipeline folder: the model, autoencoder, scheduler and a model card."""
    write_model = plan_model(opened, extras)
    with torch.device("meta"):
        model = MoHDiTTransformer2DModel(**arguments(opened))
    vae, scheduler = surroundings(opened, arguments(opened), extras.autoencoder)
    pipeline = MoHDiTPipeline(model, vae, scheduler, class_names=opened.class_names())
    facts = run_facts(opened.home) if opened.home else Facts()
    stated = stated_license(opened.home) if opened.home else None
    facts.license = extras.license or stated or facts.license
    facts.base_model = extras.base_model

    def write(folder: Path) -> None:
        folder.mkdir()
        pipeline.save_config(folder)
        write_model(folder / "transformer")
        vae.save_pretrained(folder / "vae")
        scheduler.save_pretrained(folder / "scheduler")
        if opened.home and extras.license is None and describes(opened.home, arguments(opened)):
            keep_card(folder, str(opened.home), arguments(opened))
        else:
            write_card(folder, arguments(opened), facts)
        if extras.with_code:
            add_code(folder)

    return write


def plan_published(opened: Opened, extras: Extras) -> Write:
    """A bare state dict, as the published ``.pt`` files are."""
    if arguments(opened)["router"] != "learned":
        raise UserError(
            "a router without parameters leaves no trace in a published .pt file, which would open "
            "as a dense model; convert to moh-dit or pipeline"
        )
    if preset_of(arguments(opened)) is None:
        print(
            "note: this is no preset, and a .pt file holds no configuration: who loads it has to "
            "say its heads"
        )
    return lambda file: stream(opened.state, write_torch, file)


def plan_diffusers(opened: Opened, extras: Extras) -> Write:
    """A folder of diffusers' ``DiTTransformer2DModel``."""
    theirs = to_diffusers_config(arguments(opened))
    state = to_diffusers(opened.state, arguments(opened))

    def write(folder: Path) -> None:
        folder.mkdir()
        content = {**theirs, "_diffusers_version": diffusers_version}
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        stream(state, write_safetensors, folder / WEIGHTS)

    return write


def plan_diffusers_pipeline(opened: Opened, extras: Extras) -> Write:
    """A folder of diffusers' ``DiTPipeline``."""
    write_model = plan_diffusers(opened, extras)
    vae, scheduler = surroundings(opened, arguments(opened), extras.autoencoder)
    if prediction_type(scheduler) == "flow_prediction":
        raise UserError("diffusers' DiTPipeline steps noise, this model predicts a flow")
    if scheduler.config.get("variance_type") == "learned_range":
        scheduler = named_scheduler("ddim", scheduler)  # theirs drops the variance channels
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


PLANS: dict[str, Callable[[Opened, Extras], Write]] = {
    "moh-dit": plan_model,
    "pipeline": plan_pipeline,
    "published": plan_published,
    "diffusers": plan_diffusers,
    "diffusers-pipeline": plan_diffusers_pipeline,
}


def arguments(opened: Opened) -> dict[str, Any]:
    """The arguments of a model that has been resolved."""
    assert opened.config is not None
    return opened.config


def stream(state: State, write: Callable[..., None], file: Path) -> None:
    """Write a state dict with a progress bar."""
    with progress_bar(len(state), desc="writing weights", unit="tensor") as bar:
        write(file, state, bar.update)
