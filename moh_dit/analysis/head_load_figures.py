"""Draw head load as bar charts and heat maps (matplotlib) and as maps of patches (PIL)."""

from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from fid_eval.fonts import plain_text

from ..sampling.grids import BACKGROUND, INK
from ..sampling.lettering import Lettering
from .head_load import HALVES, HeadLoad

COLUMNS = 5
MAX_BAR_CHARTS = 20
MAX_NUMBERED_CELLS = 240
MIN_MAP_SIZE = 128  # pixels; smaller images are enlarged by an integer factor
OPACITY = 0.45
LEGEND_SWATCH = 14


def class_bars(load: HeadLoad, class_names: Sequence[str], layer: int) -> Figure:
    """Draw the figure of the papers: a bar chart of the routed heads for each class.

    Only evaluations with the class are counted, because the null class hides differences between
    classes. The figure shows the first ``MAX_BAR_CHARTS`` classes; :func:`class_map` shows all.
    """
    with plain_text(class_names):
        return _class_bars(load, class_names, layer)


def _class_bars(load: HeadLoad, class_names: Sequence[str], layer: int) -> Figure:
    shares = load.share(layer, "class", "half")[:MAX_BAR_CHARTS, 0]
    heads = _head_numbers(load, layer)
    columns = min(COLUMNS, len(shares))
    rows = -(-len(shares) // columns)
    figure = Figure(figsize=(max(4.5, 2.1 * columns), 1.7 * rows + 1), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    colors = [rgb / 255 for rgb in head_colors(len(heads))]
    for axis, name, share in zip(axes.flat, class_names, shares, strict=False):
        axis.bar(range(len(heads)), share, color=colors)
        axis.axhline(load.balanced_share(layer), color="gray", linewidth=0.8, linestyle="--")
        axis.set_title(name, fontsize=9)
        axis.set_xticks(range(len(heads)), heads, fontsize=8)
    for axis in axes.flat[len(shares) :]:
        axis.set_axis_off()
    title = f"layer {layer}: share of tokens per routed head, by class (dashed: balanced routing)"
    figure.suptitle(title, fontsize=10)
    for axis in axes[:, 0]:
        axis.tick_params(axis="y", labelsize=8)
    figure.supxlabel("head", fontsize=9)
    figure.supylabel("share of tokens", fontsize=9)
    return figure


def class_map(load: HeadLoad, class_names: Sequence[str], layer: int) -> Figure:
    """Draw classes × routed heads of one layer, counting evaluations with the class."""
    panels = [("", load.share(layer, "class", "half")[:, 0])]
    heads = _head_numbers(load, layer)
    with plain_text(class_names):
        return _heat_maps(f"layer {layer}, by class", panels, list(class_names), heads, "class")


def layer_map(load: HeadLoad) -> Figure:
    """Draw layers × heads for each half of guidance; shared and missing heads are blank."""
    first = min(load.num_shared.values())
    end = max(load.num_shared[i] + load.activated[i].shape[-1] for i in load.layers)
    shares = np.full((len(HALVES), len(load.layers), end - first), np.nan)
    for row, layer in enumerate(load.layers):
        found, start = load.share(layer, "half"), load.num_shared[layer] - first
        shares[:, row, start : start + found.shape[1]] = found
    heads = [str(head) for head in range(first, end)]
    rows = [
        f"layer {i}: {load.num_active[i]} of {load.activated[i].shape[-1]}" for i in load.layers
    ]
    title = "by layer (active routed heads per token of all routed heads)"
    return _heat_maps(title, _halves(shares), rows, heads, "")


def timestep_map(load: HeadLoad, layer: int) -> Figure:
    """Draw timestep ranges × routed heads of one layer for each half of guidance."""
    shares = load.share(layer, "half", "timestep")[:, ::-1]  # in sampling order: noise first
    edges = load.timestep_edges
    ranges = [f"{low:g}–{high:g}" for low, high in pairwise(edges)][::-1]
    return _heat_maps(
        f"layer {layer}, by timestep", _halves(shares), ranges, _head_numbers(load, layer),
        "timesteps (noise first)",
    )  # fmt: skip


def _halves(shares: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return title and shares (rows, E) of each half of guidance that has tokens."""
    titled = zip(("with the class", "null class"), shares, strict=True)
    return [(title, part) for title, part in titled if not np.isnan(part).all()]


def _head_numbers(load: HeadLoad, layer: int) -> list[str]:
    """Return the numbers of a layer's routed heads among all its heads."""
    first = load.num_shared[layer]
    return [str(first + i) for i in range(load.activated[layer].shape[-1])]


def _heat_maps(
    title: str,
    panels: list[tuple[str, np.ndarray]],
    rows: list[str],
    heads: list[str],
    ylabel: str,
    xlabel: str = "head",
) -> Figure:
    """Draw panels of (rows, heads) side by side on one colour scale."""
    height = 1.5 + min(12, 0.28 * len(rows))
    width = 2.2 + len(panels) * max(2.2, 0.45 * len(heads))
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    high = max(float(np.nanmax(shares)) for _, shares in panels)
    for axis, (name, shares) in zip(axes, panels, strict=True):
        picture = axis.imshow(shares, vmin=0, vmax=high, aspect="auto", interpolation="nearest")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(xlabel, fontsize=9)
        axis.set_xticks(range(len(heads)), heads, fontsize=8)
        ticks = range(0, len(rows), -(-len(rows) // 50))
        axis.set_yticks(ticks, [rows[row] for row in ticks], fontsize=8)
        if shares.size <= MAX_NUMBERED_CELLS:
            for (row, head), share in np.ndenumerate(shares):
                if not np.isnan(share):
                    ink = "white" if share < high / 2 else "black"
                    text = f"{100 * share:.0f}"
                    axis.text(head, row, text, ha="center", va="center", color=ink, fontsize=7)
    axes[0].set_ylabel(ylabel, fontsize=9)
    bar = figure.colorbar(picture, ax=list(axes))
    bar.set_label("share of tokens", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def to_bytes(figure: Figure, format: str) -> bytes:
    """Encode a figure as ``"png"`` or ``"svg"``; equal figures give equal bytes."""
    buffer = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "moh-dit", "svg.fonttype": "none"}):
        metadata = {"Date": None} if format == "svg" else None
        figure.savefig(buffer, format=format, dpi=130, metadata=metadata)
    return buffer.getvalue()


def head_colors(count: int) -> np.ndarray:
    """Return uint8 (count, 3), a colour for each routed head, the same in bars and maps."""
    palette = matplotlib.colormaps["tab10" if count <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    return np.array([palette[i % len(palette)] for i in range(count)]) * 255


def enlarge(image: np.ndarray) -> np.ndarray:
    """Enlarge an image (H, W, 3) by an integer factor to at least ``MIN_MAP_SIZE`` pixels."""
    zoom = max(1, -(-MIN_MAP_SIZE // len(image)))
    return image.repeat(zoom, 0).repeat(zoom, 1)


def overlay_heads(image: np.ndarray, heads: np.ndarray, count: int) -> np.ndarray:
    """Tint each patch of an image with the colour of its head.

    Args:
        image: uint8 (H, W, 3), H = W.
        heads: int (N,), the routed head of each of the √N × √N patches, in raster order.
        count: number E of routed heads of the layer.

    Returns:
        uint8 (H', W', 3), enlarged as by :func:`enlarge`.
    """
    enlarged = enlarge(image)
    grid = round(len(heads) ** 0.5)
    patch = len(enlarged) // grid
    colors = head_colors(count)[heads.reshape(grid, grid)].repeat(patch, 0).repeat(patch, 1)
    gray = enlarged.mean(-1, keepdims=True)
    return ((1 - OPACITY) * gray + OPACITY * colors).round().astype(np.uint8)


def with_legend(sheet: Image.Image, names: list[str]) -> Image.Image:
    """Add a legend of colours and names below a sheet, in as many lines as needed."""
    letters = Lettering(names, 13)
    corners, x, y = [], 8, 8
    for name in names:
        width = LEGEND_SWATCH + 6 + letters.width(name) + 14
        if x + width > sheet.width and x > 8:
            x, y = 8, y + LEGEND_SWATCH + 8
        corners.append((x, y))
        x += width
    extended = Image.new("RGB", (sheet.width, sheet.height + y + LEGEND_SWATCH + 8), BACKGROUND)
    extended.paste(sheet, (0, 0))
    draw = ImageDraw.Draw(extended)
    for (x, y), name, color in zip(corners, names, head_colors(len(names)), strict=True):
        y += sheet.height
        fill = tuple(color.round().astype(int).tolist())
        draw.rectangle((x, y, x + LEGEND_SWATCH, y + LEGEND_SWATCH), fill=fill)
        letters.draw(draw, x + LEGEND_SWATCH + 6, y + LEGEND_SWATCH / 2, name, INK)
    return extended
