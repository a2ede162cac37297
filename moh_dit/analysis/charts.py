"""Charts of a report: matplotlib's, as SVG that takes its ink from the page, light or dark."""

from collections.abc import Sequence
from io import BytesIO
from math import ceil
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

COLORS = [matplotlib.colors.to_hex(color) for color in matplotlib.colormaps["tab10"].colors]  # type: ignore[attr-defined]
INK = "#0a0b0c"  # becomes the text colour of the page
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
    """One run's values over its steps, both (n,)."""

    run: str
    color: str
    steps: Sequence[float]
    values: Sequence[float]


def line_chart(title: str, series: Sequence[Series], *, log: bool = False) -> str:
    """Values over steps, a line for each run, as an SVG element; empty where there are none.

    More than ``MAX_POINTS`` are averaged down to so many; what is not finite is left out.
    """
    lines = [line for line in map(_thinned, series) if len(line.steps)]
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
        _by_step(axes)
        return _svg(figure, title)


def load_chart(title: str, steps: Sequence[int], load: np.ndarray, spread: float) -> str:
    """Head load of one layer over training as a heat map, an SVG element.

    Args:
        title: what the chart is called to those who cannot see it.
        steps: (n,), steps of the entries.
        load: float (n, E), the load of each routed head over that of even routing.
        spread: the distance from 1 at which the colours end, blue below and red above.
    """
    shown = _means(load, MAX_POINTS // 2)
    heads = shown.shape[1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 0.7 + 0.16 * max(heads, 4)), layout="constrained")
        axes = figure.subplots()
        end = steps[-1] + (steps[0] == steps[-1])
        axes.imshow(
            shown.T, cmap="coolwarm", vmin=1 - spread, vmax=1 + spread, aspect="auto",
            interpolation="nearest", extent=(steps[0], end, heads - 0.5, -0.5),
        )  # fmt: skip
        axes.set_yticks(range(0, heads, ceil(heads / 6)))
        axes.set_ylabel("head")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return _svg(figure, title)


def _by_step(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _thinned(series: Series) -> Series:
    values = np.asarray(series.values, float)
    finite = np.isfinite(values)
    pairs = np.stack([np.asarray(series.steps, float)[finite], values[finite]], axis=-1)
    steps, kept = _means(pairs, MAX_POINTS).T
    return series._replace(steps=steps, values=kept)


def _means(rows: np.ndarray, limit: int) -> np.ndarray:
    """At most ``limit`` means of consecutive rows of (n, …)."""
    if len(rows) <= limit:
        return rows
    return np.stack([part.mean(0) for part in np.array_split(rows, limit)])


def _svg(figure: Figure, title: str) -> str:
    """The SVG element alone, as wide as the page allows."""
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().decode()
    head, _, body = text[text.index("<svg") :].partition(">")
    box = head.partition('viewBox="')[2].partition('"')[0]
    body = body[body.index("</metadata>") + len("</metadata>") :]
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    opening = f'<svg {names} viewBox="{box}" role="img" aria-label="{label}">'
    return opening + body.strip().replace(INK, "currentColor")
