"""Measure the head load of a checkpoint (`moh-dit head-load`) and write figures and numbers.

OUTPUT/
  head_load.json             all shares, with the settings, versions and weight digests
  settings.yaml              the settings, which ``--config`` reads
  class-bars.png  .svg       the figure of the papers: routed heads of one layer, by class
  class-map, layer-map, timestep-map.png  .svg
  head-maps.png              the head of each patch, drawn over the image during the denoising
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from fid_eval.progress import progress_bar

from ..checkpoints.outputs import record_output
from ..common.atomic_write import atomic_output
from ..common.cli import save_config
from ..common.errors import UserError
from ..pipeline.pipeline import MoHDiTPipeline
from ..sampling.engine import count_steps, decode_noisy, generate, use_settings
from ..sampling.grids import class_name, draw_sheet
from ..sampling.sample import load_for_sampling, parse_labels, pin_checkpoint, start_processes
from ..sampling.sample_set import weights_digest
from ..training.run_log import environment
from . import head_load_figures
from .config import HeadLoadConfig
from .head_load import HeadLoad, HeadLoadRecorder, HeadMap


def measure_head_load(config: HeadLoadConfig) -> None:
    """Measure head load and write the output folder. Every process of a launch must call this."""
    config.check_paths()
    output = Path(config.output)
    config = replace(config, checkpoint=pin_checkpoint(config.checkpoint))
    state = start_processes(config.device)
    pipeline = load_for_sampling(
        config.to_sample_config(), state.device, config.checkpoint, config.weights
    )
    classes = list(dict.fromkeys(parse_labels(pipeline, config.class_labels)))
    layer = choose_layer(pipeline, config.layer)
    load, maps, finals = sample_and_count(pipeline, config, classes, state)
    if state.is_main_process:
        names = [class_name(pipeline, label) for label in load.classes]
        figures = {
            "class-bars": head_load_figures.class_bars(load, names, layer),
            "class-map": head_load_figures.class_map(load, names, layer),
            "layer-map": head_load_figures.layer_map(load),
            "timestep-map": head_load_figures.timestep_map(load, layer),
        }
        document = {
            "settings": asdict(config),
            "transformer_sha256": weights_digest(pipeline.transformer),
            "autoencoder_sha256": weights_digest(pipeline.vae),
            "environment": environment(),
            "head_load": load.to_dict(names),
        }
        with atomic_output(output) as folder:
            folder.mkdir()
            for name, figure in figures.items():
                for kind in ("png", "svg"):
                    (folder / f"{name}.{kind}").write_bytes(
                        head_load_figures.to_bytes(figure, kind)
                    )
            (folder / "head_load.json").write_text(json.dumps(document, indent=1))
            if maps:
                rows = [class_name(pipeline, label) for label in classes[: config.map_images]]
                sheet = draw_maps(pipeline, maps, finals, load, layer, rows)
                sheet.save(folder / "head-maps.png")
            save_config(config, folder / "settings.yaml")
        record_output(config.checkpoint, "head load", output, config)
        print(f"wrote {output}: {', '.join(path.name for path in sorted(output.iterdir()))}")
    if state.num_processes > 1:
        state.destroy_process_group()


def choose_layer(pipeline: MoHDiTPipeline, layer: int | None) -> int:
    """Return the layer to draw, by default the last routed one.

    Raises:
        UserError: the layer, or the whole model, has no routed heads.
    """
    routed = list(pipeline.transformer.routed_layers)
    if not routed:
        HeadLoadRecorder(pipeline.transformer)  # raises the error for models without routed heads
    if layer is not None and layer not in routed:
        raise UserError(
            f"layer {layer} has no routed heads; give one of {', '.join(map(str, routed))}"
        )
    return routed[-1] if layer is None else layer


def sample_and_count(
    pipeline: MoHDiTPipeline, config: HeadLoadConfig, classes: Sequence[int], state: PartialState
) -> tuple[HeadLoad, dict[tuple[int, int], HeadMap], dict[int, np.ndarray]]:
    """Sample ``images_per_class`` images of each class on all processes and count heads.

    Returns:
        ``(load, maps, finals)``: the load over all processes. On the main process also the maps by
        (image index, step), and the final images by image index.
    """
    chosen, _ = use_settings(pipeline, config)
    steps = count_steps(chosen, config)
    per_class = config.images_per_class
    labels = np.repeat(classes, per_class)
    mine = np.arange(len(labels))[state.process_index :: state.num_processes]
    mapped = set(range(0, config.map_images * per_class, per_class))
    recorder = HeadLoadRecorder(
        pipeline.transformer,
        timestep_ranges=config.timestep_ranges,
        num_train_timesteps=chosen.scheduler.config.num_train_timesteps,
        map_images=[position for position, index in enumerate(mine.tolist()) if index in mapped],
        map_steps=np.linspace(0, steps - 1, config.map_steps).round().astype(int).tolist(),
    )
    finals: dict[int, np.ndarray] = {}
    bar = progress_bar(len(mine), desc="sampling", unit="image", enabled=state.is_main_process)
    with recorder, bar:
        for positions, images in generate(
            pipeline,
            labels[mine].tolist(),
            config,
            indices=mine,
            batch_size=config.batch_size,
            on_step=recorder.on_step,
        ):
            bar.update(len(images))
            indices = mine[positions].tolist()
            finals |= {i: image for i, image in zip(indices, images, strict=True) if i in mapped}
    maps = {(int(mine[image]), step): found for (image, step), found in recorder.maps.items()}
    load = recorder.result()
    for some_maps, some_finals in gather_object([(maps, finals)]):
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
    """Draw the patch maps of one layer: a row for each image, a column for each step.

    The last column shows the final images without tint.
    """
    indices, steps = (sorted(set(part)) for part in zip(*maps, strict=True))
    device, heads = pipeline.transformer.device, load.activated[layer].shape[-1]

    def draw_patches(head_map: HeadMap) -> np.ndarray:
        image = decode_noisy(pipeline, head_map.latents[None].to(device))[0]
        return head_load_figures.overlay_heads(image, head_map.heads[layer], heads)

    cells = [
        [*(draw_patches(maps[i, step]) for step in steps), head_load_figures.enlarge(finals[i])]
        for i in indices
    ]
    timesteps = [f"t = {maps[indices[0], step].timestep:.4g}" for step in steps]
    sheet = draw_sheet(np.array(cells), row_labels, [*timesteps, "image"])
    names = [f"head {load.num_shared[layer] + i}" for i in range(heads)]
    return head_load_figures.with_legend(sheet, names)
