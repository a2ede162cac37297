"""What may be asked of the page, and the making of it: a request in, files out."""

import io
import json
import math
import re
import reprlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..analysis.head_load import HeadLoad, HeadLoadRecorder
from ..checkpoints.opening import resolve_checkpoint
from ..common.cli import nearest_key
from ..common.errors import UserError
from ..diffusion.samplers import samplers_for
from ..pipeline.pipeline import MoHDiTPipeline
from ..sampling.config import SampleConfig
from ..sampling.engine import use_settings
from ..sampling.grids import class_name, class_rows, draw_sheet, save_sheet
from ..sampling.output_formats import to_png
from ..sampling.program import facts, parse_labels, record
from .config import DemoConfig
from .jobs import Job
from .watcher import Watcher, edge_to_edge

LONGEST_NAME = 200


class ImageService:
    """Makes images for requests, within limits.

    Args:
        pipeline: where they come from, on its device.
        config: limits and defaults; ``checkpoint`` resolved, since it goes into every record.

    Raises:
        UserError: when the defaults do not fit the model.
    """

    def __init__(self, pipeline: MoHDiTPipeline, config: DemoConfig):
        self.pipeline, self.config = pipeline, config
        trained = pipeline.scheduler.config.num_train_timesteps
        self.max_inference_steps = min(config.max_inference_steps, trained)
        self.name = run_name(config.checkpoint)
        defaults = config.sampling()
        steps = min(defaults.num_inference_steps, self.max_inference_steps)
        self.defaults = replace(defaults, num_inference_steps=steps)
        use_settings(pipeline, self.defaults)
        self.facts = facts(self.defaults, pipeline)  # once: it hashes all weights

    def describe(self) -> dict[str, Any]:
        """What the page needs to know of the model, for JSON."""
        classes = range(self.pipeline.transformer.config.num_classes)
        return {
            "name": self.name,
            "classes": [class_name(self.pipeline, label) for label in classes],
            "schedulers": samplers_for(self.pipeline.config.prediction_type),
            "guidance_scale": self.defaults.guidance_scale,
            "num_inference_steps": self.defaults.num_inference_steps,
            "max_inference_steps": self.max_inference_steps,
            "max_images": self.config.max_images,
        }

    def read(self, asked: Any) -> SampleConfig:
        """The configuration that a request (decoded JSON) means, checked against model and limits.

        What it leaves out, or gives as ``null`` or ``""``, is the default's.

        Raises:
            UserError: in words for whoever asked.
        """
        if not isinstance(asked, dict):
            raise UserError('a request is a JSON object, such as {"class_labels": [0]}')
        for key in asked:
            if key not in SETTINGS:
                nearest = nearest_key(key, list(SETTINGS))
                hint = f"did you mean {nearest}?" if nearest else f"there are {', '.join(SETTINGS)}"
                raise UserError(f"unknown setting {key!r} ({hint})")
        given = {key: read_value(key, value) for key, value in asked.items() if value or value == 0}
        labels = self.pipeline.label_ids(given.pop("class_labels", []))
        if not labels:
            raise UserError("no class is chosen; choose at least one")
        config = replace(self.defaults, **given)
        config.check()
        count = len(labels) * config.images_per_class
        if count > self.config.max_images:
            raise UserError(
                f"{config.images_per_class} images of each of {len(labels)} classes are {count}; "
                f"at most {self.config.max_images} are made at once"
            )
        if config.num_inference_steps > self.max_inference_steps:
            raise UserError(
                f"num_inference_steps is {config.num_inference_steps}; at most "
                f"{self.max_inference_steps} are taken here"
            )
        use_settings(self.pipeline, config)
        output = f"{self.name}-seed{config.seed}.png"
        return replace(config, class_labels=self._written(labels), output=output)

    def make(self, job: Job) -> dict[str, Any]:
        """Make the images that ``job.request``, a configuration from :meth:`read`, asks for.

        The job gets the files ``preview.jpg`` on the way and in the end ``grid.png``, the labelled
        sheet with its settings inside; ``cells.png``, the images alone, edge to edge;
        ``settings.yaml``; and ``head_load.json`` where the model has routed heads.

        Returns:
            For JSON: name of the sheet, ``rows`` (class names), ``columns`` and ``head_load``.

        Raises:
            Cancelled: within a step of the job being cancelled.
            UserError: when the memory of the GPU is not enough.
        """
        config: SampleConfig = job.request
        labels = parse_labels(self.pipeline, config.class_labels)
        model = self.pipeline.transformer
        trained = self.pipeline.scheduler.config.num_train_timesteps
        looking: Any = nullcontext()
        if model.routed_layers:
            looking = HeadLoadRecorder(model, num_train_timesteps=trained)
        shape = (len(labels), config.images_per_class)
        chosen, _ = use_settings(self.pipeline, config)
        try:
            with looking as recorder:
                images, names = class_rows(
                    self.pipeline,
                    config,
                    labels,
                    config.images_per_class,
                    batch_size=config.batch_size,
                    decode_batch_size=config.batch_size,
                    on_step=Watcher(chosen, config, shape, job, recorder, self.config.previews),
                )
        except torch.OutOfMemoryError:
            raise UserError("not enough memory on the GPU; ask for fewer images") from None
        job.stop_if_unwanted()
        settings, sheet = record(config, self.facts), io.BytesIO()
        save_sheet(draw_sheet(images, names), sheet, settings)
        job.files = {
            "grid.png": sheet.getvalue(),
            "cells.png": to_png(edge_to_edge(images)),
            "settings.yaml": settings.encode(),
        }
        news = {"name": config.output, "rows": names, "columns": config.images_per_class}
        if recorder is None:
            return news
        load = recorder.result()
        all_names = [class_name(self.pipeline, label) for label in load.classes]
        job.files["head_load.json"] = json.dumps(load.to_dict(all_names)).encode()
        return {**news, "head_load": summarize(load, all_names)}

    def _written(self, labels: list[int]) -> str:
        """Classes as in a configuration: by name where that means the same ones, else by id."""
        names = ",".join(class_name(self.pipeline, label) for label in labels)
        try:
            if parse_labels(self.pipeline, names) == labels:
                return names
        except UserError:
            pass  # two classes of one name, or a comma that misleads
        return ",".join(map(str, labels))


def read_value(key: str, value: Any) -> Any:
    """One setting of a request in its type; a ``UserError`` where it is none."""
    read, form = SETTINGS[key]
    try:
        return read(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{key} is {reprlib.repr(value)}; give {form}") from None


def _of_type(value: Any, *types: type) -> Any:
    if type(value) not in types:  # not isinstance: True is no number
        raise TypeError
    return value


def _whole_number(value: Any) -> int:
    return int(_of_type(value, int, str))


def _number(value: Any) -> float:
    number = float(_of_type(value, int, float, str))
    if not math.isfinite(number):
        raise ValueError
    return number


def _name(value: Any) -> str:
    if len(_of_type(value, str)) > LONGEST_NAME:
        raise ValueError
    return value


def _labels(value: Any) -> list[int | str]:
    return [item if type(item) is int else _name(item) for item in _of_type(value, list)]


# What a request may hold. Numbers may come as text: a browser's own are exact below 2^53 only.
SETTINGS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "class_labels": (_labels, "a list of class names or ids"),
    "images_per_class": (_whole_number, "a whole number"),
    "guidance_scale": (_number, "a number"),
    "num_inference_steps": (_whole_number, "a whole number"),
    "scheduler": (_name, "the name of a sampler"),
    "seed": (_whole_number, "a whole number"),
}


def run_name(checkpoint: str) -> str:
    """What files of a checkpoint are called: the run and the step, or the pipeline's folder."""
    path = Path(checkpoint).resolve()
    if (path / "model_index.json").is_file():
        name = path.name
    else:
        run, step = resolve_checkpoint(path)
        name = f"{run.name}-{step.name}"
    return re.sub(r"[^\w.-]+", "-", name)


def summarize(load: HeadLoad, class_names: list[str]) -> dict[str, Any]:
    """Head load as the page shows it: a share for each view, layer and routed head.

    Views are all classes, each class (both as seen by the half of guidance that is given the
    class), and the half that is given none.
    """
    layers = load.layers
    with_class, without = zip(*(load.share(layer, "half") for layer in layers), strict=True)
    views = {"all classes": with_class}
    if len(class_names) > 1:
        by_class = [load.share(layer, "class", "half")[:, 0] for layer in layers]
        for row, name in enumerate(class_names):
            views[name] = tuple(shares[row] for shares in by_class)
    if not any(shares.size and math.isnan(shares[0]) for shares in without):
        views["no class (the other half of guidance)"] = without
    return {
        "layers": [
            {
                "index": layer,
                "shared_heads": load.num_shared[layer],
                "active_routed_heads": load.num_active[layer],
                "even": load.even(layer),
            }
            for layer in layers
        ],
        "views": [
            {"name": name, "shares": [shares.round(4).tolist() for shares in view]}
            for name, view in views.items()
        ],
    }
