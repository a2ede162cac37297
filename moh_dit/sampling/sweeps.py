"""Draw contact sheets over one or two settings, such as seed, guidance scale and weights."""

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

# For each name that a sheet can vary: the function that reads a value, and the label of a value.
AXES: dict[str, tuple[Callable[[str], Any], str]] = {
    "class_labels": (str, "{}"),
    "seed": (int, "seed {}"),
    "guidance_scale": (float, "guidance {:g}"),
    "num_inference_steps": (int, "{} steps"),
    "scheduler": (str, "{}"),
    "cache_threshold": (float, "threshold {:g}"),
    "cache_interval": (int, "interval {}"),
    "weights": (str, "{}"),
    "index": (int, "{}"),
}
# Names in AXES that are fields of SamplingSettings.
SETTINGS = (
    "seed", "guidance_scale", "num_inference_steps", "scheduler", "cache_threshold",
    "cache_interval",
)  # fmt: skip


@dataclass
class Axis:
    """One side of a sheet: a name in ``AXES`` and its values."""

    name: str
    values: list[Any]

    def labels(self, pipeline: MoHDiTPipeline) -> list[str]:
        """Return the labels of the rows or columns."""
        if self.name == "class_labels":
            return [class_name(pipeline, value) for value in self.values]
        return [AXES[self.name][1].format(value) for value in self.values]


def parse_axis(text: str, parse_labels: Callable[[str], list[int]]) -> Axis:
    """Parse an axis such as ``"guidance_scale=1,2,4"``.

    Args:
        text: name and values.
        parse_labels: parses the values of ``class_labels``.

    Raises:
        UserError: for an unknown name (the message suggests the nearest) or an invalid value.
    """
    name, _, values = text.partition("=")
    name = name.strip()
    known = [axis for axis in AXES if axis != "index"]
    if name not in known:
        nearest = nearest_key(name, known)
        hint = f"did you mean {nearest}?" if nearest else f"one of {', '.join(known)}"
        raise UserError(f"rows/columns {text!r}: {name!r} cannot be varied ({hint})")
    if not values.strip():
        raise UserError(f"rows/columns {text!r} has no values; write {name}=VALUE,VALUE")
    if name == "class_labels":
        return Axis(name, parse_labels(values))
    read = AXES[name][0]
    try:
        return Axis(name, [read(value.strip()) for value in values.split(",")])
    except ValueError:
        kind = "whole numbers" if read is int else "numbers"
        raise UserError(f"rows/columns {text!r}: the values of {name} must be {kind}") from None


def sample_sweep(*arguments: Any, **options: Any) -> Image.Image:
    """Draw the images of :func:`sample_cells`, which takes the same arguments, as a sheet."""
    return draw_sheet(*sample_cells(*arguments, **options))


def sample_cells(
    load: Callable[[str], MoHDiTPipeline],
    settings: SamplingSettings,
    rows: Axis,
    columns: Axis,
    *,
    class_label: int = 0,
    weights: str = "transformer",
    **options: Any,
) -> tuple[np.ndarray, list[str], list[str]]:
    """Sample images that differ only in the values of ``rows`` and ``columns``.

    Args:
        load: returns the pipeline with the given weights.
        settings: settings of all cells, apart from the two axes.
        rows, columns: the two axes, with different names.
        class_label: class of all cells unless an axis varies it.
        weights: weights of all cells unless an axis varies them.
        options: ``batch_size``, ``decode_batch_size``, ``guidance_model`` and ``on_step`` of
            :func:`~moh_dit.sampling.engine.generate`.

    Returns:
        ``(images, rows, columns)``: uint8 (rows, columns, H, W, 3), and the labels of the axes.

    Raises:
        UserError: before any work, for values that do not fit the model or each other.
    """
    if rows.name == columns.name:
        raise UserError(f"rows and columns both vary {rows.name}; give two different settings")
    # Cells with the same weights and settings are sampled together.
    groups: dict[tuple, list[tuple[int, int, int, int]]] = {}
    for row, row_value in enumerate(rows.values):
        for column, column_value in enumerate(columns.values):
            varied = {rows.name: row_value, columns.name: column_value}
            changed = tuple((key, varied[key]) for key in SETTINGS if key in varied)
            cell = (row, column, varied.get("class_labels", class_label), varied.get("index", 0))
            groups.setdefault((varied.get("weights", weights), changed), []).append(cell)

    pipelines = {name: load(name) for name in dict.fromkeys(name for name, _ in groups)}
    jobs = []
    for (name, changed), cells in groups.items():
        cell_settings = replace(settings, **dict(changed))
        use_settings(pipelines[name], cell_settings, options.get("guidance_model"))
        jobs.append((pipelines[name], cell_settings, cells))
    images: dict[tuple[int, int], np.ndarray] = {}
    for pipeline, cell_settings, cells in jobs:
        labels, indices = [label for _, _, label, _ in cells], [index for *_, index in cells]
        batches = generate(pipeline, labels, cell_settings, indices=indices, **options)
        sampled = (image for _, batch in batches for image in batch)
        images |= zip(((row, column) for row, column, *_ in cells), sampled, strict=True)
    sheet = [
        [images[row, column] for column, _ in enumerate(columns.values)]
        for row, _ in enumerate(rows.values)
    ]
    any_pipeline = next(iter(pipelines.values()))
    return np.array(sheet), rows.labels(any_pipeline), columns.labels(any_pipeline)
