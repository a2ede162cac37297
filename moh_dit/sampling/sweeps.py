"""Contact sheets over any two of: class, seed, guidance scale, steps, scheduler, weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from ..common.cli import nearest_key
from ..common.errors import UserError
from ..pipeline.pipeline import MoHDiTPipeline
from .config import SamplingSettings
from .engine import generate, use_settings
from .grids import class_name, draw_sheet

# What can be swept: how a value is read, and how it is written on the sheet.
AXES: dict[str, tuple[Callable[[str], Any], str]] = {
    "class_labels": (str, "{}"),
    "seed": (int, "seed {}"),
    "guidance_scale": (float, "guidance {:g}"),
    "num_inference_steps": (int, "{} steps"),
    "scheduler": (str, "{}"),
    "weights": (str, "{}"),
    "index": (int, "{}"),
}
# Settings of an image; the others choose class, weights and index.
SETTINGS = ("seed", "guidance_scale", "num_inference_steps", "scheduler")


@dataclass
class Axis:
    """One side of a sheet: a key of ``AXES`` and the values along it."""

    name: str
    values: list[Any]

    def labels(self, pipeline: MoHDiTPipeline) -> list[str]:
        """What is written beside the rows or above the columns."""
        if self.name == "class_labels":
            return [class_name(pipeline, value) for value in self.values]
        return [AXES[self.name][1].format(value) for value in self.values]


def parse_axis(text: str, parse_labels: Callable[[str], list[int]]) -> Axis:
    """Read ``"guidance_scale=1,2,4"``.

    Args:
        text: name and values.
        parse_labels: reads the values of ``class_labels``.

    Raises:
        UserError: for an unknown name (the nearest is named) or a value of the wrong type.
    """
    name, _, values = text.partition("=")
    name = name.strip()
    known = [axis for axis in AXES if axis != "index"]
    if name not in known:
        nearest = nearest_key(name, known)
        hint = f"did you mean {nearest}?" if nearest else f"one of {', '.join(known)}"
        raise UserError(f"sweep {text!r}: {name!r} cannot be swept ({hint})")
    if not values.strip():
        raise UserError(f"sweep {text!r} has no values; write {name}=VALUE,VALUE")
    if name == "class_labels":
        return Axis(name, parse_labels(values))
    read = AXES[name][0]
    try:
        return Axis(name, [read(value.strip()) for value in values.split(",")])
    except ValueError as error:
        raise UserError(f"sweep {text!r}: {error}") from None


def sample_sweep(
    load: Callable[[str], MoHDiTPipeline],
    settings: SamplingSettings,
    rows: Axis,
    columns: Axis,
    *,
    class_label: int = 0,
    weights: str = "transformer",
    **options: Any,
) -> Image.Image:
    """A sheet in which every cell differs from its neighbours in what is swept alone.

    Args:
        load: gives the pipeline with the named weights.
        settings: what is not swept.
        rows, columns: what is; two different names.
        class_label: the class, unless swept.
        weights: the weights, unless swept.
        options: ``batch_size``, ``decode_batch_size`` and ``guidance_model`` of
            :func:`~moh_dit.sampling.engine.generate`.

    Raises:
        UserError: before any work, for values that do not fit the model or each other.
    """
    if rows.name == columns.name:
        raise UserError(f"rows and columns both sweep {rows.name}; give two different ones")
    jobs: dict[tuple, list[tuple[int, int, int, int]]] = {}
    for row, row_value in enumerate(rows.values):
        for column, column_value in enumerate(columns.values):
            cell = {rows.name: row_value, columns.name: column_value}
            changed = tuple((key, cell[key]) for key in SETTINGS if key in cell)
            place = (row, column, cell.get("class_labels", class_label), cell.get("index", 0))
            jobs.setdefault((cell.get("weights", weights), changed), []).append(place)

    pipelines = {name: load(name) for name in dict.fromkeys(name for name, _ in jobs)}
    todo = []
    for (name, changed), places in jobs.items():
        chosen = replace(settings, **dict(changed))
        use_settings(pipelines[name], chosen, options.get("guidance_model"))
        todo.append((pipelines[name], chosen, places))
    images: np.ndarray | None = None
    for pipeline, chosen, places in todo:
        down, across, labels, indices = (list(part) for part in zip(*places, strict=True))
        batches = generate(pipeline, labels, chosen, indices=indices, **options)
        made = np.concatenate([batch for _, batch in batches])
        if images is None:
            shape = (len(rows.values), len(columns.values), *made.shape[1:])
            images = np.zeros(shape, np.uint8)
        images[down, across] = made
    assert images is not None
    any_pipeline = next(iter(pipelines.values()))
    return draw_sheet(images, rows.labels(any_pipeline), columns.labels(any_pipeline))
