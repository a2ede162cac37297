"""Convert checkpoints between formats, and say what one is.

moh-dit-convert DiT-XL-2-256x256.pt                                   # which model is it?
moh-dit-convert DiT-XL-2-256x256.pt --to diffusers --output dit-xl-2
moh-dit-convert runs/digits --to pipeline --with_code --output shared

Weights go from file to file tensor by tensor, in the precision they have.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from diffusers import __version__ as diffusers_version

from .autoencoder import load_autoencoder
from .bundle import add_code
from .card import Facts, run_facts, stated_license, write_card
from .checkpoints import WEIGHTS, Opened, find_weights, load_scheduler, open_checkpoint
from .cli import run_program
from .diffusion import make_scheduler
from .errors import UserError
from .formats import to_diffusers, to_diffusers_config
from .identify import describe, preset_of
from .pipeline import MoHDiTPipeline
from .progress import progress_bar
from .schedulers import named_scheduler
from .transformer import MoHDiTTransformer2DModel
from .weights import State, open_weights, write_safetensors, write_torch

Format = Literal["moh-dit", "pipeline", "published", "diffusers", "diffusers-pipeline"]


@dataclass
class Overrides:
    num_heads: int | list[int] | None = None
    """Heads h, one number or one per layer."""
    num_shared_heads: int | list[int | None] | None = None
    """Shared heads s, one number or one per layer."""
    num_active_routed_heads: int | list[int | None] | None = None
    """Routed heads k that each token activates, one number or one per layer."""
    head_dim: int | None = None
    """Width d of a head."""
    timestep_freq_shift: float | None = None
    """1 for a model trained in diffusers' DiTTransformer2DModel, which spreads the timestep
    frequencies over 127 steps where published models have 128."""


@dataclass
class ConvertConfig:
    source: str
    """Run, checkpoint, model or pipeline folder, .pt or .safetensors file, or a hub id of any."""
    to: Format | None = None
    """moh-dit: a model folder. pipeline: with autoencoder and scheduler. published: a .pt file.
    diffusers: a DiTTransformer2DModel folder. diffusers-pipeline: a DiTPipeline folder. Unless
    given, only say what the source is."""
    output: str | None = None
    """What to write; must not exist."""
    weights: str = "transformer"
    """Which weights: transformer (the averaged ones), raw, or a folder such as ema-0.999."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Precision to write."""
    model: Overrides = field(default_factory=Overrides)
    """What the shapes of weights without a configuration leave open; presets need none of it."""
    autoencoder: str | None = None
    """Autoencoder of a pipeline whose source has none, e.g. stabilityai/sd-vae-ft-ema."""
    with_code: bool = False
    """Put the code beside a pipeline, so that diffusers opens it without this package."""
    license: str | None = None
    """Licence of the weights for the model card, e.g. apache-2.0; the source's unless given."""
    local_files_only: bool = False
    """Never ask the hub."""


def convert(config: ConvertConfig) -> None:
    """Say what the source is, and write it as asked."""
    if config.to is not None:
        check_output(config)
    opened = open_checkpoint(
        config.source, config.weights, local_files_only=config.local_files_only
    )
    given = {key: value for key, value in vars(config.model).items() if value is not None}
    opened = replace(opened, config=opened.resolve(**given))
    if config.dtype != "keep":
        dtype = getattr(torch, config.dtype)
        opened.state = {name: tensor.to(dtype) for name, tensor in opened.state.items()}
    print(summary(config.source, opened))
    if config.to is None:
        return
    output = Path(config.output or "")
    plan = PLANS[config.to](opened, config)
    check_space(output, opened.state)
    with written_aside(output) as aside:
        plan(aside)
    print(f"wrote {output}")


def summary(source: str, opened: Opened) -> str:
    """What a checkpoint is, in one line."""
    assert opened.config is not None
    state = opened.state.values()
    parameters = sum(torch.Size(tensor.shape).numel() for tensor in state)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state})
    sizes = f"{parameters:,} parameters in {' and '.join(dtypes)}"
    return f"{source}: {describe(opened.config)}; {sizes}, {opened.kind} format"


def check_output(config: ConvertConfig) -> None:
    """Raise ``UserError`` unless the output is named, new, and fits the format."""
    if config.output is None:
        raise UserError("output is not set; say what to write, or leave --to out")
    output = Path(config.output)
    if output.exists():
        raise UserError(f"output {output} exists; give another name")
    if config.to == "published" and output.suffix != ".pt":
        raise UserError(f"output {output}: the published format is a file called .pt")
    if config.with_code and config.to != "pipeline":
        raise UserError("with_code goes with --to pipeline")


def check_space(output: Path, state: State) -> None:
    """Raise ``UserError`` unless the weights fit on the disk."""
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    needed = sum(tensor.nbytes for tensor in state.values())
    free = shutil.disk_usage(parent).free
    if free < needed * 1.02:
        raise UserError(
            f"output {output}: {free / 2**30:.2f} GiB are free there, the weights take "
            f"{needed / 2**30:.2f} GiB"
        )


@contextmanager
def written_aside(output: Path) -> Iterator[Path]:
    """A path to write to, renamed to ``output`` when whole; nothing is left of a failure."""
    aside = output.with_name(f".writing-{output.name}")
    made = next((p for p in [*output.absolute().parents][::-1] if not p.exists()), None)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        remove(aside)  # of a process that was killed
        yield aside
        aside.rename(output)
    except OSError as error:
        raise UserError(f"output {output} could not be written: {error}") from None
    finally:
        remove(aside)
        if made is not None and not output.exists():
            remove(made)


def remove(path: Path) -> None:
    """Delete a file or folder that may not exist."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


# ---------------------------------------------------- what each format needs: checked, then written

Write = Callable[[Path], None]


def plan_model(opened: Opened, config: ConvertConfig) -> Write:
    """This project's model folder: ``config.json`` and safetensors."""
    with torch.device("meta"):
        model = MoHDiTTransformer2DModel(**arguments(opened))

    def write(folder: Path) -> None:
        folder.mkdir()
        model.save_config(folder)
        stream(opened.state, write_safetensors, folder / WEIGHTS)

    return write


def plan_pipeline(opened: Opened, config: ConvertConfig) -> Write:
    """This project's pipeline folder: the model, autoencoder, scheduler and a model card."""
    write_model = plan_model(opened, config)
    with torch.device("meta"):
        model = MoHDiTTransformer2DModel(**arguments(opened))
    vae, scheduler = surroundings(opened, config)
    pipeline = MoHDiTPipeline(model, vae, scheduler, class_names=opened.class_names())
    facts = run_facts(opened.home) if opened.home else Facts()
    stated = stated_license(opened.home) if opened.home else None
    facts.license = config.license or stated or facts.license
    if "/" in config.source and not Path(config.source).exists():
        facts.base_model = "/".join(config.source.split("/")[:2])

    def write(folder: Path) -> None:
        folder.mkdir()
        pipeline.save_config(folder)
        write_model(folder / "transformer")
        vae.save_pretrained(folder / "vae")
        scheduler.save_pretrained(folder / "scheduler")
        write_card(folder, arguments(opened), facts)
        if config.with_code:
            add_code(folder)

    return write


def plan_published(opened: Opened, config: ConvertConfig) -> Write:
    """A bare state dict, as the published ``.pt`` files are."""
    if preset_of(arguments(opened)) is None:
        print(
            "note: this is no preset, and a .pt file holds no configuration: who loads it has to "
            "say its heads"
        )
    if arguments(opened).get("router", "learned") != "learned":
        raise UserError(
            "a router without parameters leaves no trace in a published .pt file, which would open "
            "as a dense model; convert to moh-dit or pipeline"
        )
    return lambda file: stream(opened.state, write_torch, file)


def plan_diffusers(opened: Opened, config: ConvertConfig) -> Write:
    """A folder of diffusers' ``DiTTransformer2DModel``."""
    theirs = to_diffusers_config(arguments(opened))
    state = to_diffusers(opened.state, arguments(opened))

    def write(folder: Path) -> None:
        folder.mkdir()
        content = {**theirs, "_diffusers_version": diffusers_version}
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        stream(state, write_safetensors, folder / WEIGHTS)

    return write


def plan_diffusers_pipeline(opened: Opened, config: ConvertConfig) -> Write:
    """A folder of diffusers' ``DiTPipeline``."""
    write_model = plan_diffusers(opened, config)
    vae, scheduler = surroundings(opened, config)
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


PLANS: dict[str, Callable[[Opened, ConvertConfig], Write]] = {
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


def surroundings(opened: Opened, config: ConvertConfig) -> tuple[AutoencoderKL, Any]:
    """The autoencoder, in its own precision, and the scheduler of a pipeline."""
    home = opened.home
    if config.autoencoder is not None:
        vae = load_autoencoder(config.autoencoder)
    elif home is not None and (home / "vae").is_dir():
        vae = open_vae(home / "vae")
    else:
        raise UserError(
            f"{config.source} has no autoencoder; give the one it was trained with, for the "
            "published models --autoencoder stabilityai/sd-vae-ft-ema"
        )
    if home is not None:
        return vae, load_scheduler(home / "scheduler")
    channels = arguments(opened)["in_channels"]
    return vae, make_scheduler(arguments(opened)["out_channels"] == 2 * channels)


def open_vae(folder: Path) -> AutoencoderKL:
    """The autoencoder of a pipeline or run, in the precision of its file."""
    dtype = max((t.dtype for t in open_weights(find_weights(folder)).values()), key=_width)
    try:
        return AutoencoderKL.from_pretrained(folder, local_files_only=True, torch_dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be opened: {' '.join(str(error).split())}") from None


def _width(dtype: torch.dtype) -> int:
    return dtype.itemsize


def main() -> None:
    """Console script ``moh-dit-convert``; a first word without dashes is the source."""
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv = ["--source", *argv]
    run_program(
        convert,
        ConvertConfig,
        prog="moh-dit-convert",
        description="Convert (MoH-)DiT checkpoints between formats, or say what one is.",
        example="moh-dit-convert DiT-XL-2-256x256.pt --to diffusers --output dit-xl-2",
        argv=argv,
    )


if __name__ == "__main__":
    main()
