"""Measure head load: a checkpoint in, a folder of pictures and numbers out.

OUTPUT/
  head_load.json             every share, with the settings, versions and weights behind it
  settings.yaml              ``--config`` reads it
  class-bars.png  .svg       the papers' figure: routed heads of one layer, by class
  class-map, layer-map, timestep-map.png  .svg
  head-maps.png              which head each patch chose, over the image as it emerges
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from ..common.cli import save_config
from ..common.errors import UserError
from ..common.progress import progress_bar
from ..pipeline.pipeline import MoHDiTPipeline
from ..sampling.config import SamplingSettings
from ..sampling.engine import count_steps, decode_state, generate, use_settings, whole_units
from ..sampling.grids import class_name
from ..sampling.program import parse_labels, place, resolved, start_processes
from ..sampling.sample_set import weights_digest
from ..training.run_log import environment
from .config import HeadLoadConfig
from .head_load import HeadLoad, HeadLoadRecorder, HeadMap
from .head_load_figures import (
    class_bars,
    class_map,
    draw_head_maps,
    layer_map,
    timestep_map,
    to_bytes,
)


def measure_head_load(config: HeadLoadConfig) -> None:
    """Make what ``config`` asks for; called by every process of a launch."""
    output = Path(config.output)
    if output.exists():
        raise UserError(f"output {output} exists; give another name")
    config = replace(config, checkpoint=resolved(config.checkpoint))
    sampling = config.as_sampling(config.checkpoint)
    state = start_processes(config.device)
    pipeline = place(sampling, state.device, config.checkpoint, config.weights)
    classes = list(dict.fromkeys(parse_labels(pipeline, config.class_labels)))
    layer = choose_layer(pipeline, config.layer)
    load, maps, finals = sample_and_count(pipeline, config, classes, state)
    if state.is_main_process:
        names = [class_name(pipeline, label) for label in load.classes]
        figures = {
            "class-bars": class_bars(load, names, layer),
            "class-map": class_map(load, names, layer),
            "layer-map": layer_map(load),
            "timestep-map": timestep_map(load, layer),
        }
        files = {
            f"{name}.{kind}": to_bytes(figure, kind)
            for name, figure in figures.items()
            for kind in ("png", "svg")
        }
        document = {
            "settings": asdict(config),
            "transformer_sha256": weights_digest(pipeline.transformer),
            "autoencoder_sha256": weights_digest(pipeline.vae),
            "environment": environment(),
            "head_load": load.to_dict(names),
        }
        files["head_load.json"] = json.dumps(document, indent=1).encode()
        sheet = None
        if maps:
            rows = [class_name(pipeline, label) for label in classes[: config.map_images]]
            sheet = draw_maps(pipeline, maps, finals, load, layer, rows)
        write_folder(output, files, sheet, config)
        print(f"wrote {output}: {', '.join(path.name for path in sorted(output.iterdir()))}")
    if state.num_processes > 1:
        state.destroy_process_group()


def choose_layer(pipeline: MoHDiTPipeline, asked: int | None) -> int:
    """The layer to draw; a ``UserError`` where it does not route."""
    routed = list(pipeline.transformer.routed_layers)
    if not routed:
        HeadLoadRecorder(pipeline.transformer)  # says so
    if asked is not None and asked not in routed:
        raise UserError(
            f"layer {asked} has no routed heads; those that have are {', '.join(map(str, routed))}"
        )
    return routed[-1] if asked is None else asked


def sample_and_count(
    pipeline: MoHDiTPipeline, config: HeadLoadConfig, classes: Sequence[int], state: PartialState
) -> tuple[HeadLoad, dict[tuple[int, int], HeadMap], dict[int, np.ndarray]]:
    """Sample ``images_per_class`` images of each class, an equal share on every process.

    Returns:
        ``(load, maps, finals)``: the load over all processes; on the main process also the maps by
        (index of the image, step), and the finished images of those indices.
    """
    settings = SamplingSettings(**{k: getattr(config, k) for k in vars(SamplingSettings())})
    chosen, _ = use_settings(pipeline, settings)
    steps = count_steps(chosen, settings)
    per_class = config.images_per_class
    labels = np.repeat(classes, per_class)
    mine = np.arange(len(labels))[state.process_index :: state.num_processes]
    mapped = set(range(0, config.map_images * per_class, per_class))
    shown = np.linspace(0, steps - 1, config.map_steps).round().astype(int).tolist()
    recorder = HeadLoadRecorder(
        pipeline.transformer,
        timestep_ranges=config.timestep_ranges,
        num_train_timesteps=chosen.scheduler.config.num_train_timesteps,
        map_images=[place for place, index in enumerate(mine.tolist()) if index in mapped],
        map_steps=shown,
    )
    finals: dict[int, np.ndarray] = {}
    bar = progress_bar(len(mine), desc="sampling", unit="image", enabled=state.is_main_process)
    with recorder, bar:
        for positions, images in generate(
            pipeline,
            labels[mine].tolist(),
            settings,
            indices=mine,
            batch_size=whole_units(pipeline.transformer, config.batch_size),
            on_step=recorder.on_step,
        ):
            bar.update(len(images))
            indices = mine[positions].tolist()
            finals |= {i: image for i, image in zip(indices, images, strict=True) if i in mapped}
    maps = {(int(mine[image]), step): found for (image, step), found in recorder.maps.items()}
    load = recorder.result()
    gathered = gather_object([(maps, finals)]) if state.num_processes > 1 else [(maps, finals)]
    for some_maps, some_finals in gathered:
        maps |= some_maps
        finals |= some_finals
    return load, maps, finals


def draw_maps(
    pipeline: MoHDiTPipeline,
    maps: dict[tuple[int, int], HeadMap],
    finals: dict[int, np.ndarray],
    load: HeadLoad,
    layer: int,
    row_labels: Sequence[str],
) -> Image.Image:
    """The contact sheet of one layer: a row an image, a column a step."""
    indices, steps = (sorted(set(part)) for part in zip(*maps, strict=True))
    device = pipeline.transformer.device
    images = [
        [decode_state(pipeline, maps[i, step].latents[None].to(device))[0] for step in steps]
        for i in indices
    ]
    return draw_head_maps(
        np.array(images),
        np.array([[maps[i, step].heads[layer] for step in steps] for i in indices]),
        np.array([finals[i] for i in indices]),
        load.activated[layer].shape[-1],
        row_labels,
        [f"t = {maps[indices[0], step].timestep:.4g}" for step in steps],
        load.num_shared[layer],
    )


def write_folder(
    output: Path, files: dict[str, bytes], sheet: Image.Image | None, config: HeadLoadConfig
) -> None:
    """Write everything aside, then give the folder its name."""
    aside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        for name, content in files.items():
            (aside / name).write_bytes(content)
        if sheet is not None:
            sheet.save(aside / "head-maps.png")
        save_config(config, aside / "settings.yaml")
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
