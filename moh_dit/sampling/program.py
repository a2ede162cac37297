"""The sampling program: a configuration in, a sheet or a set and its settings out."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs

from ..checkpoints.opening import load_pipeline, resolve_checkpoint
from ..common.errors import UserError
from ..common.version import __version__
from ..pipeline.pipeline import MoHDiTPipeline
from .config import SampleConfig
from .grids import (
    ANIMATIONS,
    check_animation,
    sample_animation,
    sample_grid,
    sample_strip,
    save_animation,
    save_sheet,
)
from .output_formats import format_of
from .sample_set import (
    check_disk_space,
    image_bytes,
    images_done,
    partial_folder,
    sample_set,
    set_labels,
    weights_digest,
)
from .sweeps import Axis, parse_axis, sample_sweep


def sample(config: SampleConfig) -> None:
    """Make what ``config`` asks for; called by every process of a launch."""
    config.check()
    output = Path(config.output)
    check_output(output, config)
    config = replace(config, checkpoint=resolved(config.checkpoint))
    if config.guidance_checkpoint is not None:
        config = replace(config, guidance_checkpoint=resolved(config.guidance_checkpoint))
    state = start_processes(config.device)
    load = partial(place, config, state.device)
    pipeline = load(config.checkpoint, config.weights)
    options: dict[str, Any] = dict(
        batch_size=config.batch_size,
        decode_batch_size=config.decode_batch_size or config.batch_size,
    )
    if config.guidance_checkpoint is not None:
        weak = load(config.guidance_checkpoint, config.guidance_weights)
        options["guidance_model"] = weak.transformer
    labels = parse_labels(pipeline, config.class_labels)
    settings = record(config, facts(config, pipeline))

    if config.num_samples is not None:
        check_disk_space(output, config.num_samples * image_bytes(pipeline))
        classes = set_labels(config.num_samples, labels, config.labels, config.seed)
        sample_set(pipeline, config, output, classes, record=settings, state=state, **options)
    elif state.is_main_process:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output {output}: no folder for it ({error.strerror})") from None
        save = draw(config, output.suffix, pipeline, load, labels, settings, options)
        aside = output.with_name(f".{output.stem}.{os.getpid()}{output.suffix}")
        try:
            save(aside)
            beside(output).write_text(settings)
            aside.replace(output)
        finally:
            aside.unlink(missing_ok=True)
    if state.num_processes > 1:
        state.destroy_process_group()
    if state.is_main_process:
        print(f"wrote {output}; its settings are in {beside(output).name}")


def start_processes(device: str) -> PartialState:
    """The processes of this launch, on ``"cpu"``, ``"cuda"`` or, for ``"auto"``, what there is."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no CUDA GPU; give auto or cpu")
    # accelerate must be told: on a machine without GPU it starts no process group by itself.
    cpu = device == "cpu" or not torch.accelerator.is_available()
    # One process may wait long for another's last batch.
    waiting = InitProcessGroupKwargs(timeout=timedelta(days=7)).to_kwargs()
    return PartialState(cpu=cpu, **waiting)


def check_output(output: Path, config: SampleConfig) -> None:
    """Raise ``UserError`` for an output that exists, or that cannot be what is asked for."""
    if output.exists():
        raise UserError(f"output {output} exists; give another name")
    if config.num_samples is not None:
        format_of(output)
        begun = images_done(partial_folder(output))
    elif output.suffix not in (".png", *ANIMATIONS):
        raise UserError(
            f"output {output}: a sheet is written as .png, {', '.join(ANIMATIONS)}; for a set "
            "give num_samples"
        )
    else:
        check_animation(output)
        begun = 0
    if output.suffix in ANIMATIONS and (config.rows or config.columns or config.interpolate):
        raise UserError(f"output {output}: sweeps and strips are written as .png")
    folder = next(path for path in output.absolute().parents if path.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"output {output}: {folder} is no folder that can be written to")
    if beside(output).exists() and not begun:
        raise UserError(f"{beside(output)} exists, but not its output; give another name")


def beside(output: Path) -> Path:
    """Where the settings of an output are."""
    return output.with_name(output.name + ".yaml")


def draw(
    config: SampleConfig,
    suffix: str,
    pipeline: MoHDiTPipeline,
    load: Callable[[str, str], MoHDiTPipeline],
    labels: list[int],
    settings: str,
    options: dict[str, Any],
) -> Callable[[Path], None]:
    """Sample what people look at; returns the function that writes it."""
    per_class = config.images_per_class
    if suffix in ANIMATIONS:
        frames = sample_animation(
            pipeline, config, labels, per_class, frames=config.frames, **options
        )
        return lambda path: save_animation(frames, path)
    if config.interpolate:
        sheet = sample_strip(pipeline, config, labels, config.interpolate, **options)
    elif config.rows or config.columns:
        parse = partial(parse_axis, parse_labels=partial(parse_labels, pipeline))
        images = Axis("index", list(range(per_class)))
        rows = parse(config.rows) if config.rows else images
        columns = parse(config.columns) if config.columns else images
        by_weights = cache(partial(load, config.checkpoint))
        sheet = sample_sweep(
            lambda name: pipeline if name == config.weights else by_weights(name),
            config,
            rows,
            columns,
            class_label=labels[0],
            weights=config.weights,
            **options,
        )
    else:
        sheet = sample_grid(pipeline, config, labels, per_class, **options)
    return lambda path: save_sheet(sheet, path, settings)


def place(
    config: SampleConfig, device: torch.device, checkpoint: str, weights: str
) -> MoHDiTPipeline:
    """A pipeline of a checkpoint, in the asked precision, on the device, compiled if asked."""
    if config.compile and device.type != "cuda":
        raise UserError(f"compile is for GPUs, this runs on {device.type}; leave it out")
    pipeline = load_pipeline(checkpoint, weights, config.autoencoder)
    for module, dtype in (
        (pipeline.transformer, config.dtype),
        (pipeline.vae, config.decode_dtype),
    ):
        if dtype != "float32":
            torch.nn.Module.to(module, getattr(torch, dtype))  # diffusers' own warns needlessly
    if config.allow_tf32:
        torch.set_float32_matmul_precision("high")
    pipeline.to(device)
    pipeline.transformer.fuse_qkv_projections()  # once the weights stay as they are
    if config.compile:
        # One batch size guided, one not: shapes as constants, two programs.
        if config.cuda_graphs:
            pipeline.transformer.compile(mode="reduce-overhead", dynamic=False)
        else:  # layers of one plan share a graph, so that it is ready soon
            pipeline.transformer.compile_repeated_blocks(dynamic=False)
    return pipeline


def resolved(path: str) -> str:
    """The very checkpoint that a run folder stands for now; anything else as it is."""
    if (Path(path) / "config.yaml").is_file():
        return str(resolve_checkpoint(Path(path))[1])
    return path


def parse_labels(pipeline: MoHDiTPipeline, text: str | None) -> list[int]:
    """Class ids of ``"golden retriever,88"``; all classes for ``None``.

    Names may have commas of their own: the longest name that fits is taken.
    """
    if text is None:
        return list(range(pipeline.transformer.config.num_classes))
    names = set(pipeline.config.class_names or [])
    parts = text.split(",")
    labels = []
    while parts:
        for length in range(len(parts), 0, -1):
            if (name := ",".join(parts[:length]).strip()) in names or length == 1:
                labels.append(name)
                parts = parts[length:]
                break
    return pipeline.label_ids(labels)


def facts(config: SampleConfig, pipeline: MoHDiTPipeline) -> str:
    """What was used beside the configuration, as comments: versions, weights, guided channels."""
    channels = pipeline.transformer.config.in_channels
    guided = config.guidance_channels or channels
    lines = [
        f"moh-dit {__version__}, torch {torch.__version__}, {pipeline.device.type}",
        f"transformer sha256 {weights_digest(pipeline.transformer)}",
        f"autoencoder sha256 {weights_digest(pipeline.vae)}",
        f"guidance on {'all' if guided == channels else f'the first {guided} of'} {channels} "
        "latent channels",
    ]
    return "".join(f"# {line}\n" for line in lines)


def record(config: SampleConfig, facts: str) -> str:
    """The resolved configuration as YAML, which ``--config`` reads, under :func:`facts`."""
    return facts + yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)
