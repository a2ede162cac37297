"""Sample from a checkpoint (`moh-dit sample`): a grid, an animation or a set, with its settings."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs

from ..checkpoints.opening import load_pipeline
from ..checkpoints.outputs import Kind, record_output
from ..checkpoints.runs import label_dropout, resolve_checkpoint
from ..common.atomic_write import atomic_output
from ..common.disk_space import require_disk_space
from ..common.errors import UserError
from ..common.paths import require_new_output
from ..common.version import __version__
from ..pipeline.forward_graphs import device_obstacle
from ..pipeline.pipeline import MoHDiTPipeline
from .config import SampleConfig
from .grids import sample_animation, sample_grid, sample_strip, split_pages
from .output_formats import ANIMATIONS, encode_sheet, save_animation, settings_path
from .sample_set import image_bytes, sample_set, set_labels, weights_digest
from .sweeps import Axis, parse_axis, sample_sweep


def sample(config: SampleConfig) -> None:
    """Sample as ``config`` says and write the output. Every process of a launch must call this."""
    config.check_paths()
    output = Path(config.output)
    config = replace(config, checkpoint=pin_checkpoint(config.checkpoint))
    if config.guidance_checkpoint is not None:
        config = replace(config, guidance_checkpoint=pin_checkpoint(config.guidance_checkpoint))
    outputs, kind = [output], output_kind(config)
    state = start_processes(config.device)
    load = partial(load_for_sampling, config, state.device)
    pipeline = load(config.checkpoint, config.weights)
    if state.is_main_process and state.device.type == "cuda":
        obstacle = pipeline.graphs.obstacle(pipeline.transformer)
        print(f"no CUDA graphs: {obstacle}" if obstacle else "forward passes run as CUDA graphs")
    options: dict[str, Any] = dict(
        batch_size=config.batch_size,
        decode_batch_size=config.decode_batch_size or config.batch_size,
    )
    if config.guidance_checkpoint is not None:
        weaker = load(config.guidance_checkpoint, config.guidance_weights)
        options["guidance_model"] = weaker.transformer
    labels = parse_labels(pipeline, config.class_labels)
    settings = settings_yaml(config, provenance_comments(config, pipeline))

    if config.num_samples is not None:
        # Labels of a set that does not fit on the disk may not fit into memory either.
        needed = config.num_samples * image_bytes(pipeline)
        require_disk_space(output, needed, f"output {output}")
        classes = set_labels(config.num_samples, labels, config.labels, config.seed)
        options |= dict(resume=config.resume, settings_yaml=settings, state=state)
        sample_set(pipeline, config, output, classes, **options)
    elif state.is_main_process:
        per_class = config.images_per_class
        pages = split_pages(pipeline, labels, per_class) if kind == "grid" else [labels]
        outputs = page_paths(output, len(pages))
        first = 0  # index of the first image of the page
        for path, page in zip(outputs, pages, strict=True):
            if kind == "grid":
                options["indices"] = np.arange(len(page) * per_class) + first
                first += len(page) * per_class
            save = sample_picture(config, pipeline, load, page, settings, options)
            with atomic_output(path) as temporary:
                save(temporary)
                settings_path(path).write_text(settings)
    if state.num_processes > 1:
        state.destroy_process_group()
    if state.is_main_process:
        for path in outputs:
            record_output(config.checkpoint, kind, path, config)
            print(f"wrote {path}; its settings are in {settings_path(path).name}")


def page_paths(output: Path, number: int) -> list[Path]:
    """Return the paths of the pages of a grid: ``grid.png``, ``grid-2.png``, …

    Raises:
        UserError: a page other than the first, or its settings, exists.
    """
    further = [output.with_stem(f"{output.stem}-{page}") for page in range(2, number + 1)]
    for path in further:
        require_new_output(path)
        require_new_output(settings_path(path))
    if further:
        print(f"the grid is too large for one picture, so it has {number} pages")
    return [output, *further]


def output_kind(config: SampleConfig) -> Kind:
    """Return what the output of these settings is."""
    if config.num_samples is not None:
        return "set"
    if Path(config.output).suffix in ANIMATIONS:
        return "animation"
    return "strip" if config.interpolate else "sweep" if config.rows or config.columns else "grid"


def start_processes(device: str) -> PartialState:
    """Join the processes of this launch and choose the device of this one.

    Args:
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` for a GPU if there is one.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no CUDA GPU; give auto or cpu")
    # Without `cpu`, accelerate starts no process group on a machine that has no GPU.
    cpu = device == "cpu" or not torch.accelerator.is_available()
    # Processes wait for the last batch of the slowest one, which may take long.
    timeout = InitProcessGroupKwargs(timeout=timedelta(days=7)).to_kwargs()
    return PartialState(cpu=cpu, **timeout)


def sample_picture(
    config: SampleConfig,
    pipeline: MoHDiTPipeline,
    load: Callable[[str, str], MoHDiTPipeline],
    labels: Sequence[int],
    settings: str,
    options: dict[str, Any],
) -> Callable[[Path], object]:
    """Sample a grid, animation, strip or sweep; return the function that writes it to a path."""
    per_class = config.images_per_class
    if Path(config.output).suffix in ANIMATIONS:
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
        options = {**options, "class_label": labels[0], "weights": config.weights}

        def load_weights(name: str) -> MoHDiTPipeline:
            return pipeline if name == config.weights else load(config.checkpoint, name)

        sheet = sample_sweep(load_weights, config, rows, columns, **options)
    else:
        sheet = sample_grid(pipeline, config, labels, per_class, **options)
    return lambda path: path.write_bytes(encode_sheet(sheet, settings))


def load_for_sampling(
    config: SampleConfig, device: torch.device, checkpoint: str, weights: str
) -> MoHDiTPipeline:
    """Load a pipeline with the precision and compilation of ``config``, on ``device``."""
    if config.compile and device.type != "cuda":
        raise UserError(f"compile needs a GPU, but the device is {device.type}; leave out compile")
    if config.cuda_graphs is True and (obstacle := device_obstacle(device)):
        raise UserError(f"cuda_graphs is true, but {obstacle}; set it to auto or false")
    uses_null_class = config.guidance_scale != 1 and config.guidance_checkpoint is None
    if uses_null_class and label_dropout(Path(checkpoint)) == 0:
        PartialState().print(
            f"warning: {checkpoint} was trained with label_dropout 0, so its null class was never "
            "trained and guidance is meaningless; give guidance_scale 1 or a guidance_checkpoint",
            file=sys.stderr,
        )
    pipeline = load_pipeline(checkpoint, weights, config.autoencoder, verify=not config.no_verify)
    dtypes = {pipeline.transformer: config.dtype, pipeline.vae: config.decode_dtype}
    for module, dtype in dtypes.items():
        if dtype != "float32":
            # ModelMixin.to of diffusers does the same, with a warning that does not apply here.
            torch.nn.Module.to(module, getattr(torch, dtype))
    if config.allow_tf32:
        torch.set_float32_matmul_precision("high")
    pipeline.to(device)
    pipeline.transformer.fuse_qkv_projections()  # after the last change of the weights
    if config.compile:
        # Blocks with the same numbers of heads share one compilation. All batches have one size, so
        # static shapes need two compilations: guided and unguided.
        pipeline.transformer.compile_repeated_blocks(dynamic=False)
    pipeline.graphs.mode = config.cuda_graphs
    return pipeline


def pin_checkpoint(path: str) -> str:
    """Replace a run folder by its newest checkpoint; return any other path or Hub id unchanged."""
    if (Path(path) / "config.yaml").is_file():
        return str(resolve_checkpoint(Path(path))[1])
    return path


def parse_labels(pipeline: MoHDiTPipeline, text: str | None) -> list[int]:
    """Return the class ids of ``"golden retriever,88"``; all classes for ``None``.

    A class name may contain commas; the longest name that matches is used.
    """
    if text is None:
        return list(range(pipeline.transformer.config.num_classes))
    names = set(pipeline.config.class_names or [])
    longest = 1 + max((name.count(",") for name in names), default=0)
    parts = text.split(",")
    labels = []
    while parts:
        for length in range(min(longest, len(parts)), 0, -1):
            if (name := ",".join(parts[:length]).strip()) in names or length == 1:
                labels.append(name)
                parts = parts[length:]
                break
    return pipeline.label_ids(labels)


def provenance_comments(config: SampleConfig, pipeline: MoHDiTPipeline) -> str:
    """Return YAML comments with the versions, weight digests and guided channels of a sampling."""
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


def settings_yaml(config: SampleConfig, comments: str) -> str:
    """Return ``comments`` and the resolved configuration as YAML, which ``--config`` reads.

    ``resume`` is left out: it does not change the images.
    """
    settings = json.loads(json.dumps(asdict(config)))
    del settings["resume"]
    return comments + yaml.safe_dump(settings, sort_keys=False)
