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
    """Values of one run over its steps, both (n,), and matplotlib's style of the line."""

    color: str
    steps: Sequence[float]
    values: Sequence[float]
    dashes: str = "-"


class Marks(NamedTuple):
    """Steps of one run to mark at the lower edge of a chart: pauses and restarts."""

    color: str
    pauses: Sequence[float]
    restarts: Sequence[float]


def colored_series(
    values: Iterable[tuple[Sequence[float], Sequence[float]]], dashes: str = "-"
) -> list[Series]:
    """Give the ``(steps, values)`` of each run the colour of the run."""
    return [Series(color, *each, dashes) for color, each in zip(COLORS, values, strict=False)]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    marks: Sequence[Marks] = (),
    xlabel: str = "step",
) -> str:
    """Draw lines as an SVG element; return ``""`` if there are no values.

    Values that are not finite are left out. Long lines are averaged down to ``MAX_POINTS`` points.
    The axis is logarithmic only if the values differ by a factor of 10 or more.
    """
    lines = [line for line in map(downsample, series) if len(line.steps)]
    if not lines:
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.subplots()
        for line in lines:
            marker = "o" if len(line.steps) < 30 else ""
            axes.plot(line.steps, line.values, line.dashes, color=line.color, marker=marker, ms=3,
                      lw=1.4)  # fmt: skip
        low, high = min(min(line.values) for line in lines), max(max(li.values) for li in lines)
        if log and low > 0 and high >= 10 * low:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        for color, pauses, restarts in marks:
            edge = axes.get_xaxis_transform()
            axes.plot(pauses, [0.03] * len(pauses), "^", color=color, ms=5, transform=edge)
            axes.vlines(restarts, 0, 1, color, "dotted", linewidth=1, transform=edge)
        axes.set_xlabel(xlabel)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=xlabel == "step", min_n_ticks=2))
        axes.xaxis.set_major_formatter("{x:,.0f}" if xlabel == "step" else "{x:g}")
        return _svg(figure, title)


def surface_chart(
    title: str, x: Sequence[str], y: Sequence[str], values: np.ndarray, labels: tuple[str, str]
) -> str:
    """Draw a metric over two settings as a heat map with numbers, an SVG element.

    Args:
        title: label of the chart for screen readers.
        x, y: values of the two settings.
        values: float (len(y), len(x)); NaN where no set was measured.
        labels: names of the settings on the two axes.
    """
    with matplotlib.rc_context(STYLE):
        size = (1.6 + 0.6 * max(len(x), 3), 1.1 + 0.34 * max(len(y), 3))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.imshow(values, cmap="Blues", alpha=0.6, aspect="auto", interpolation="nearest")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                axes.text(column, row, f"{value:.4g}", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(x)), x)
        axes.set_yticks(range(len(y)), y)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        return _svg(figure, title)


def head_load_chart(
    title: str, steps: Sequence[int], load: np.ndarray, spread: float, first_head: int = 0
) -> str:
    """Draw the head load of one layer over training as a heat map, an SVG element.

    Args:
        title: label of the chart for screen readers.
        steps: (n,), steps of the entries.
        load: float (n, E), load of each routed head divided by its load at balanced routing.
        spread: colours run from ``1 - spread`` (blue) to ``1 + spread`` (red).
        first_head: number of the first routed head.
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
        ticks = range(0, heads, ceil(heads / 6))
        axes.set_yticks(ticks, [str(first_head + tick) for tick in ticks])
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
