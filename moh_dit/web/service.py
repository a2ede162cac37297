"""Check requests of the page and sample their images."""

import json
import math
import re
import reprlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..analysis.head_load import HeadLoad, HeadLoadRecorder
from ..checkpoints.runs import checkpoint_step, resolve_checkpoint
from ..common.cli import nearest_key
from ..common.errors import UserError
from ..diffusion.samplers import samplers_for
from ..pipeline.pipeline import MoHDiTPipeline
from ..sampling.config import SampleConfig
from ..sampling.engine import use_settings
from ..sampling.grids import class_name, draw_sheet, sample_blends, sample_rows
from ..sampling.output_formats import encode_sheet, to_png
from ..sampling.sample import parse_labels, provenance_comments, settings_yaml
from ..sampling.sweeps import Axis, parse_axis, sample_cells
from .config import DemoConfig
from .job_progress import JobProgress, tile
from .job_queue import Job

MAX_NAME_LENGTH = 200
# Names of samplers on the page; others appear by the name of the option.
SAMPLER_NAMES = {
    "ddpm": "DDPM, stochastic",
    "ddim": "DDIM",
    "dpmsolver++": "DPM-Solver++ (2nd order)",
    "sde-dpmsolver++": "DPM-Solver++ SDE, stochastic",
    "unipc": "UniPC",
    "euler": "Euler",
    "heun": "Heun (two evaluations per step)",
    "euler-ancestral": "Euler ancestral, stochastic",
    "flow-euler": "Euler (flow)",
    "flow-heun": "Heun (flow, two evaluations per step)",
    "flow-dpmsolver++": "DPM-Solver++ (flow)",
    "flow-unipc": "UniPC (flow)",
}


class ImageService:
    """Samples images for requests, within limits.

    Args:
        pipeline: the pipeline to sample from, on its device.
        config: limits and defaults. Its ``checkpoint`` is part of the settings of each sheet, so it
            must name one checkpoint, not a run folder.

    Raises:
        UserError: the defaults do not fit the model.
    """

    def __init__(self, pipeline: MoHDiTPipeline, config: DemoConfig):
        self.pipeline, self.config = pipeline, config
        trained = pipeline.scheduler.config.num_train_timesteps
        self.max_inference_steps = min(config.max_inference_steps, trained)
        self.name = run_name(config.checkpoint)
        self.first_picture = find_picture(config.checkpoint)
        defaults = config.to_sample_config()
        steps = min(defaults.num_inference_steps, self.max_inference_steps)
        self.defaults = replace(defaults, num_inference_steps=steps)
        use_settings(pipeline, self.defaults)
        # Computed once, because it hashes all weights.
        self.comments = provenance_comments(self.defaults, pipeline)

    def model_info(self) -> dict[str, Any]:
        """Return classes, schedulers, defaults and limits for the page, as JSON."""
        classes = range(self.pipeline.transformer.config.num_classes)
        return {
            "name": self.name,
            "classes": [class_name(self.pipeline, label) for label in classes],
            "schedulers": [
                {"value": name, "name": SAMPLER_NAMES.get(name, name)}
                for name in samplers_for(self.pipeline.config.prediction_type)
            ],
            "first_picture": self.first_picture is not None,
            "guidance_scale": self.defaults.guidance_scale,
            "num_inference_steps": self.defaults.num_inference_steps,
            "max_inference_steps": self.max_inference_steps,
            "max_images": self.config.max_images,
        }

    def parse_request(self, request: Any) -> SampleConfig:
        """Return the settings of a request, checked against the model and the limits.

        Args:
            request: decoded JSON. Settings that are missing, ``null`` or ``""`` keep their default.

        Raises:
            UserError: the request is invalid.
        """
        if not isinstance(request, dict):
            raise UserError('a request must be a JSON object, such as {"class_labels": [0]}')
        for key in request:
            if key not in SETTINGS:
                nearest = nearest_key(key, list(SETTINGS))
                hint = f"did you mean {nearest}?" if nearest else f"one of {', '.join(SETTINGS)}"
                raise UserError(f"unknown setting {key!r} ({hint})")
        given = {
            key: parse_value(key, value) for key, value in request.items() if value or value == 0
        }
        labels = self.pipeline.label_ids(given.pop("class_labels", []))
        if not labels:
            raise UserError("no class is chosen; choose at least one")
        text, scales = self._labels_text(labels), given.pop("guidance_scales", None)
        if scales is not None:
            given |= dict(rows=f"class_labels={text}", columns=f"guidance_scale={scales}")
            values = self._axis(given["columns"]).values
            if infinite := [value for value in values if not math.isfinite(value)]:
                raise UserError(f"guidance_scale is {infinite[0]}; give finite numbers")
            given["images_per_class"] = len(values)
        if "interpolate" in given:
            given["images_per_class"] = given["interpolate"]
        config = replace(self.defaults, **given)
        config.check()
        count = len(labels) * config.images_per_class
        if count > self.config.max_images:
            raise UserError(
                f"{config.images_per_class} images of each of {len(labels)} classes are {count} "
                f"images; at most {self.config.max_images} are allowed per request"
            )
        if config.num_inference_steps > self.max_inference_steps:
            raise UserError(
                f"num_inference_steps is {config.num_inference_steps}; at most "
                f"{self.max_inference_steps} are allowed"
            )
        use_settings(self.pipeline, config)
        output = f"{self.name}-seed{config.seed}.png"
        return replace(config, class_labels=text, output=output)

    def run_job(self, job: Job) -> dict[str, Any]:
        """Sample the images of ``job.request``, which comes from :meth:`parse_request`.

        During sampling the job has the file ``preview.jpg``. At the end it has ``grid.png`` (the
        labelled sheet with its settings inside), ``cells.png`` (the images without labels or gaps),
        ``settings.yaml``, and ``head_load.json`` if the model has routed heads.

        Returns:
            For JSON: ``name`` of the sheet, ``rows`` (class names), ``columns`` (their number),
            ``column_names`` (empty for images of each class) and ``head_load``.

        Raises:
            Cancelled: the job was cancelled; raised within one step.
            UserError: the GPU has not enough memory.
        """
        config: SampleConfig = job.request
        labels = parse_labels(self.pipeline, config.class_labels)
        model = self.pipeline.transformer
        trained = self.pipeline.scheduler.config.num_train_timesteps
        recording: Any = nullcontext()
        if model.routed_layers:
            recording = HeadLoadRecorder(model, num_train_timesteps=trained)
        shape = (len(labels), config.images_per_class)
        chosen, _ = use_settings(self.pipeline, config)
        previews = 0 if config.columns else self.config.previews  # a sweep has several samplings
        try:
            with recording as recorder:
                images, names, columns = self._sample(
                    config,
                    labels,
                    batch_size=config.batch_size,
                    decode_batch_size=config.batch_size,
                    on_step=JobProgress(chosen, config, shape, job, recorder, previews),
                )
        except torch.OutOfMemoryError:
            raise UserError("the GPU has not enough memory; request fewer images") from None
        job.raise_if_cancelled()
        settings = settings_yaml(config, self.comments)
        job.files = {
            "grid.png": encode_sheet(draw_sheet(images, names, columns), settings),
            "cells.png": to_png(tile(images)),
            "settings.yaml": settings.encode(),
        }
        details = {
            "name": config.output,
            "rows": names,
            "columns": config.images_per_class,
            "column_names": columns,
        }
        if recorder is None:
            return details
        load = recorder.result()
        all_names = [class_name(self.pipeline, label) for label in load.classes]
        job.files["head_load.json"] = json.dumps(load.to_dict(all_names)).encode()
        return {**details, "head_load": summarize(load, all_names)}

    def _sample(
        self, config: SampleConfig, labels: list[int], **options: Any
    ) -> tuple[np.ndarray, list[str], list[str]]:
        """Return images (rows, columns, H, W, 3) and the labels of rows and columns."""
        if config.columns is not None and config.rows is not None:
            axes = self._axis(config.rows), self._axis(config.columns)
            return sample_cells(lambda weights: self.pipeline, config, *axes, **options)
        if config.interpolate:
            return sample_blends(self.pipeline, config, labels, config.interpolate, **options)
        return *sample_rows(self.pipeline, config, labels, config.images_per_class, **options), []

    def _axis(self, text: str) -> Axis:
        return parse_axis(text, partial(parse_labels, self.pipeline))

    def _labels_text(self, labels: list[int]) -> str:
        """Return classes as text for the settings: by name if that is unambiguous, else by id."""
        names = ",".join(class_name(self.pipeline, label) for label in labels)
        try:
            if parse_labels(self.pipeline, names) == labels:
                return names
        except UserError:
            pass  # two classes have the same name, or a name contains a comma
        return ",".join(map(str, labels))


def parse_value(key: str, value: Any) -> Any:
    """Convert one setting of a request to its type; raise ``UserError`` if that is impossible."""
    parse, expected = SETTINGS[key]
    try:
        return parse(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{key} is {reprlib.repr(value)}; give {expected}") from None


def _of_type(value: Any, *types: type) -> Any:
    if type(value) not in types:  # isinstance would accept True as a number
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
    if len(_of_type(value, str)) > MAX_NAME_LENGTH:
        raise ValueError
    return value


def _labels(value: Any) -> list[int | str]:
    return [item if type(item) is int else _name(item) for item in _of_type(value, list)]


# Settings of a request, with parser and expected value. Numbers may be given as text, because
# JavaScript represents integers exactly only below 2^53.
SETTINGS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "class_labels": (_labels, "a list of class names or ids"),
    "images_per_class": (_whole_number, "a whole number"),
    "guidance_scale": (_number, "a number"),
    "num_inference_steps": (_whole_number, "a whole number"),
    "scheduler": (_name, "the name of a sampler"),
    "seed": (_whole_number, "a whole number"),
    "interpolate": (_whole_number, "a whole number"),
    "guidance_scales": (_name, "numbers, separated by commas"),
}


def find_picture(checkpoint: str) -> Path | None:
    """Return the newest sample grid of a run up to its checkpoint, or that of a model card."""
    path = Path(checkpoint)
    if (path / "model_index.json").is_file():
        return next(path.glob("samples.png"), None)
    run, folder = resolve_checkpoint(path)
    grids = {
        int(name[1]): grid
        for grid in (run / "samples").glob("step-*.png")
        if (name := re.fullmatch(r"step-(\d+)\.png", grid.name))
    }
    steps = [step for step in grids if step <= checkpoint_step(folder)]
    return grids[max(steps)] if steps else None


def run_name(checkpoint: str) -> str:
    """Return a name for files sampled from a checkpoint: run and step, or the pipeline folder."""
    path = Path(checkpoint).resolve()
    if (path / "model_index.json").is_file():
        name = path.name
    else:
        run, step = resolve_checkpoint(path)
        name = f"{run.name}-{step.name}"
    return re.sub(r"[^\w.-]+", "-", name)


def summarize(load: HeadLoad, class_names: list[str]) -> dict[str, Any]:
    """Return the head load for the page: a share for each view, layer and routed head.

    The views are all classes, each class, and the null class of guidance. The first two count only
    evaluations with the class.
    """
    layers = load.layers
    with_class, without = zip(*(load.share(layer, "half") for layer in layers), strict=True)
    views = {"all classes": with_class}
    if len(class_names) > 1:
        by_class = [load.share(layer, "class", "half")[:, 0] for layer in layers]
        for row, name in enumerate(class_names):
            views[name] = tuple(shares[row] for shares in by_class)
    if not any(shares.size and math.isnan(shares[0]) for shares in without):
        views["null class (other half of guidance)"] = without
    return {
        "layers": [
            {
                "index": layer,
                "shared_heads": load.num_shared[layer],
                "active_routed_heads": load.num_active[layer],
                "even": load.balanced_share(layer),
            }
            for layer in layers
        ],
        "views": [
            {"name": name, "shares": [shares.round(4).tolist() for shares in view]}
            for name, view in views.items()
        ],
    }
