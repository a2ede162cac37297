"""Draw the charts of a report as SVG that follows the light or dark colours of the page."""

from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from math import ceil
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

COLORS = [matplotlib.colors.to_hex(color) for color in matplotlib.colormaps["tab10"].colors]  # type: ignore[attr-defined]
INK = "#0a0b0c"  # replaced by currentColor, the text colour of the page
MAX_POINTS = 400
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moh-dit",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}


class Series(NamedTuple):
    """Values of one run over its steps, both (n,)."""

    color: str
    steps: Sequence[float]
    values: Sequence[float]


def colored_series(values: Iterable[tuple[Sequence[float], Sequence[float]]]) -> list[Series]:
    """Give the ``(steps, values)`` of each run the colour of the run."""
    return [Series(color, *each) for color, each in zip(COLORS, values, strict=False)]


def line_chart(title: str, series: Sequence[Series], *, log: bool = False) -> str:
    """Draw one line per run as an SVG element; return ``""`` if there are no values.

    Values that are not finite are left out. Long lines are averaged down to ``MAX_POINTS`` points.
    """
    lines = [line for line in map(downsample, series) if len(line.steps)]
    if not lines:
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.subplots()
        for line in lines:
            marker = "o" if len(line.steps) < 30 else ""
            axes.plot(line.steps, line.values, color=line.color, marker=marker, ms=3, lw=1.4)
        if log and all(min(line.values) > 0 for line in lines):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("step")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return _svg(figure, title)


def head_load_chart(title: str, steps: Sequence[int], load: np.ndarray, spread: float) -> str:
    """Draw the head load of one layer over training as a heat map, an SVG element.

    Args:
        title: label of the chart for screen readers.
        steps: (n,), steps of the entries.
        load: float (n, E), load of each routed head divided by its load at balanced routing.
        spread: colours run from ``1 - spread`` (blue) to ``1 + spread`` (red).
    """
    columns = _average_rows(load, MAX_POINTS // 2)
    heads = columns.shape[1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 0.7 + 0.16 * max(heads, 4)), layout="constrained")
        axes = figure.subplots()
        end = steps[-1] + (steps[0] == steps[-1])
        axes.imshow(
            columns.T, cmap="coolwarm", vmin=1 - spread, vmax=1 + spread, aspect="auto",
            interpolation="nearest", extent=(steps[0], end, heads - 0.5, -0.5),
        )  # fmt: skip
        axes.set_yticks(range(0, heads, ceil(heads / 6)))
        axes.set_ylabel("head")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return _svg(figure, title)


def downsample(series: Series) -> Series:
    """Drop values that are not finite and average the rest down to ``MAX_POINTS`` points."""
    values = np.asarray(series.values, float)
    finite = np.isfinite(values)
    pairs = np.stack([np.asarray(series.steps, float)[finite], values[finite]], axis=-1)
    steps, kept = _average_rows(pairs, MAX_POINTS).T
    return series._replace(steps=steps, values=kept)


def _average_rows(rows: np.ndarray, limit: int) -> np.ndarray:
    """Average consecutive rows of (n, …) so that at most ``limit`` rows remain."""
    if len(rows) <= limit:
        return rows
    return np.stack([part.mean(0) for part in np.array_split(rows, limit)])


def _svg(figure: Figure, title: str) -> str:
    """Return the figure as an SVG element without a fixed size."""
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().decode()
    head, _, body = text[text.index("<svg") :].partition(">")
    box = head.partition('viewBox="')[2].partition('"')[0]
    body = body[body.index("</metadata>") + len("</metadata>") :]
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    opening = f'<svg {names} viewBox="{box}" role="img" aria-label="{escape(title)}">'
    return opening + body.strip().replace(INK, "currentColor")
