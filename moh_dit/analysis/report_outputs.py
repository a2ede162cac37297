"""Embed pictures of runs in a report, and tabulate the sample sets with their metrics."""

import base64
import io
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..checkpoints.outputs import Output
from ..checkpoints.set_results import SetResult
from ..sampling.output_formats import encode_image
from .report_charts import COLORS, Series, line_chart, surface_chart
from .run_reader import Run

MAX_PNG_BYTES = 150_000  # larger pictures are stored as WebP
MAX_ANIMATION_BYTES = 3_000_000  # larger animations are left out
MAX_SIDE = 2400  # pixels; larger pictures are scaled down
WEBP_QUALITY = 85
ANIMATIONS = {".gif": "gif", ".webp": "webp"}
# Settings in the caption of a picture, and their text.
CAPTION = {
    "guidance_scale": "guidance {}",
    "num_inference_steps": "{} steps",
    "scheduler": "{}",
    "seed": "seed {}",
    "weights": "weights {}",
    "class_labels": "classes {}",
    "rows": "rows {}",
    "columns": "columns {}",
}
DEFAULTS = {"weights": "transformer"}  # settings that a caption leaves out
SWEPT = ("guidance_scale", "num_inference_steps", "step", "scheduler", "weights", "seed")
LONGEST_VALUE = 60


@dataclass
class Picture:
    """A picture as a data URI.

    Attributes:
        step: training steps of the model.
        uri: content, for ``src``.
        width, height: size in pixels.
        caption: what the picture shows.
    """

    step: int
    uri: str
    width: int
    height: int
    caption: str = ""


def embed_grids(run: Run, max_grids: int) -> list[Picture]:
    """Return at most ``max_grids`` sample grids of training, evenly spaced, with the last one."""
    steps = list(run.grids)
    if len(steps) > max_grids:
        kept = np.linspace(len(steps) - 1, 0, max_grids).round().astype(int)[::-1]
        run.notes.append(f"{len(steps) - max_grids} of {len(steps)} sample grids are left out")
        steps = [steps[index] for index in kept]
    found = (_embed(run, run.grids[step], step) for step in steps)
    return [picture for picture in found if picture is not None]


def embed_outputs(runs: list[Run], limit: int) -> list[tuple[str, tuple[Picture | None, ...]]]:
    """Return pictures that were made from the runs: at most the newest ``limit`` of each run.

    Returns:
        Rows of ``(caption, pictures)`` in order of kind and seed. A row has the pictures of all
        runs with the same settings, ``None`` for a run without one. Later steps have later rows.
    """
    rows: dict[tuple[Any, ...], list[list[Picture]]] = {}
    for index, run in enumerate(runs):
        outputs = [output for output in run.outputs if output.path.suffix in (".png", *ANIMATIONS)]
        if len(outputs) > limit:
            run.notes.append(f"{len(outputs) - limit} of {len(outputs)} pictures are left out")
        for output in sorted(outputs[-limit:], key=lambda output: output.step):
            if picture := _embed(run, output.path, output.step):
                picture.caption = describe(output)
                key = output.kind, output.settings.get("seed") or 0, ", ".join(_settings(output))
                rows.setdefault(key, [[] for _ in runs])[index].append(picture)
    return [
        (f"{kind}, {settings}", pictures)
        for (kind, _, settings), columns in sorted(rows.items(), key=lambda row: row[0])
        for pictures in zip_longest(*columns)
    ]


def describe(output: Output) -> str:
    """Return the caption of an output: its kind, checkpoint and settings."""
    return ", ".join([f"{output.kind} after step {output.step:,}", *_settings(output)])


def _settings(output: Output) -> list[str]:
    values = {key: output.settings.get(key) for key in CAPTION}
    values = {k: v for k, v in values.items() if v is not None and v != DEFAULTS.get(k)}
    texts = [CAPTION[key].format(_short(value)) for key, value in values.items()]
    if blend := output.settings.get("interpolate"):
        texts.insert(0, f"{blend} images")
    return texts


def set_rows(runs: list[Run]) -> list[dict[str, Any]]:
    """Return name, settings and metrics of each sample set; one row per result of ``fid-eval``."""
    rows = []
    for index, run in enumerate(runs):
        measured = {result.path for result in run.results}
        unmeasured = [o for o in run.outputs if o.kind == "set" and o.path not in measured]
        pairs: list[tuple[Output | None, SetResult | None]] = [
            *((_output_of(run, result), result) for result in run.results),
            *((output, None) for output in unmeasured),
        ]
        for output, result in pairs:
            name = _relative(output.path, run.folder) if output else result.name if result else ""
            count = output.settings.get("num_samples") if output else None
            rows.append(
                {
                    "run": index,
                    "name": name,
                    "settings": describe(output).partition(" ")[2] if output else "",
                    "count": format_number(result.samples.get("count") if result else count),
                    "values": {k: _value(result, k) for k in result.metrics} if result else {},
                    "reference": result.reference.get("name", "–") if result else "–",
                    "warnings": result.warnings if result else [],
                }
            )
    return rows


def sweep_charts(runs: list[Run]) -> list[tuple[str, str]]:
    """Return title and chart of each metric over the settings in which sets of a run differ.

    One differing setting gives a line. Of several, the first two in ``SWEPT`` give a heat map.
    """
    charts = []
    for index, run in enumerate(runs):
        points = []
        for result in run.results:
            if output := _output_of(run, result):
                points.append(({**output.settings, "step": output.step}, result.metrics))
        varied = [key for key in SWEPT if len({str(each.get(key)) for each, _ in points}) > 1]
        if not varied:
            continue
        x, y = varied[0], varied[1] if len(varied) > 1 else None
        for metric in dict.fromkeys(key for _, metrics in points for key in metrics):
            found = [
                (settings, metrics[metric]) for settings, metrics in points if metric in metrics
            ]
            title = f"{metric} of {run.name}"
            if y is not None:
                chart = _surface(title, found, x, y)
            else:
                numbers = [(each.get(x), value) for each, value in found]
                if not all(isinstance(position, int | float) for position, _ in numbers):
                    continue  # the table shows settings that are no numbers
                line = Series(COLORS[index], *zip(*sorted(numbers), strict=True))
                chart = line_chart(title, [line], xlabel=x)
            charts.append((title, chart))
    return charts


def _surface(title: str, points: list[tuple[dict[str, Any], float]], x: str, y: str) -> str:
    columns, rows = (_values(points, key) for key in (x, y))
    grid = np.full((len(rows), len(columns)), np.nan)
    for settings, value in points:
        grid[rows.index(settings.get(y)), columns.index(settings.get(x))] = value
    return surface_chart(title, [*map(str, columns)], [*map(str, rows)], grid, (x, y))


def format_number(value: float | None) -> str:
    """Return a number with four digits, an integer with separators, or a dash for ``None``."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _values(points: list[tuple[dict[str, Any], Any]], key: str) -> list[Any]:
    found = dict.fromkeys(settings.get(key) for settings, _ in points)
    return sorted(found, key=lambda value: (isinstance(value, str), value is None, value or 0))


def _output_of(run: Run, result: SetResult) -> Output | None:
    return next((o for o in run.outputs if result.path is not None and o.path == result.path), None)


def _value(result: SetResult, key: str) -> str:
    text, interval = format_number(result.metrics[key]), result.intervals.get(key)
    return f"{text} ± {(interval[1] - interval[0]) / 2:.2g}" if interval else text


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "…"


def _embed(run: Run, path: Path, step: int) -> Picture | None:
    """Return a picture for the report; note in ``run.missing`` a picture that cannot be read."""
    name = _relative(path, run.folder)
    try:
        content, kind = path.read_bytes(), ANIMATIONS.get(path.suffix, "png")
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            if path.suffix in ANIMATIONS:
                if len(content) > MAX_ANIMATION_BYTES:
                    run.notes.append(f"{name} is too large for the report")
                    return None
            else:
                image.load()
                if len(content) > MAX_PNG_BYTES or max(image.size) > MAX_SIDE:
                    image.thumbnail((MAX_SIDE, MAX_SIDE))
                    smaller = encode_image(image.convert("RGB"), "WEBP", quality=WEBP_QUALITY)
                    if len(smaller) < len(content):
                        content, kind = smaller, "webp"
                        width, height = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        run.missing.append(f"{name} (cannot be read)")
        return None
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Picture(step, uri, width, height)
