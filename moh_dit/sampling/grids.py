"""Draw labelled sheets of images: a grid of classes, an interpolation strip, the denoising."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..autoencoder import downsampling_factor
from ..common.errors import UserError
from ..pipeline.pipeline import MoHDiTPipeline
from .config import SamplingSettings
from .engine import generate
from .lettering import Lettering

SMALLEST_CELL = 64  # pixels; smaller images are enlarged by an integer factor
GAP = 2
MAX_PIXELS = 89_000_000  # Pillow warns when it opens a larger picture
PAGE_SHARE = 0.8
ROWS_PER_BLOCK = 20  # sheets with more rows are divided into blocks side by side
ASPECT = 4 / 3  # approximate width / height of a sheet of several blocks
BACKGROUND, INK = "white", "black"


def sample_grid(
    pipeline: MoHDiTPipeline,
    settings: SamplingSettings,
    class_labels: Sequence[int | str] | None = None,
    images_per_class: int = 8,
    **options: Any,
) -> Image.Image:
    """Sample a grid with a row of images for each class, labelled with the class name.

    Args:
        pipeline: the pipeline to sample from; it is not changed.
        settings: steps, guidance, scheduler and seed.
        class_labels: ids or names; ``None`` for all classes.
        images_per_class: number of columns. The image in row r and column c has index
            ``r * images_per_class + c``.
        options: ``batch_size``, ``decode_batch_size``, ``guidance_model`` and ``on_step`` of
            :func:`~moh_dit.sampling.engine.generate`.

    Raises:
        UserError: before any work, for settings or labels that do not fit the model.
    """
    return draw_sheet(*sample_rows(pipeline, settings, class_labels, images_per_class, **options))


def sample_animation(
    pipeline: MoHDiTPipeline,
    settings: SamplingSettings,
    class_labels: Sequence[int | str] | None = None,
    images_per_class: int = 8,
    *,
    frames: int = 24,
    **options: Any,
) -> list[Image.Image]:
    """Sample the grid of :func:`sample_grid` and draw its denoising in ``frames`` sheets.

    Each frame decodes the latents after one step, scaled down to unit variance if theirs is larger.
    The last frame is the grid.
    """
    options = {**options, "frames": frames}
    images, names = sample_rows(pipeline, settings, class_labels, images_per_class, **options)
    return [draw_sheet(images[:, :, frame], names) for frame in range(images.shape[2])]


def sample_strip(
    pipeline: MoHDiTPipeline,
    settings: SamplingSettings,
    class_labels: Sequence[int | str] | None = None,
    steps: int = 9,
    **options: Any,
) -> Image.Image:
    """Sample for each class a row that blends from its image of index 0 to its image of index 1.

    All noise, that of stochastic schedulers included, is interpolated on the arc between the noise
    of the two images (see :class:`~moh_dit.diffusion.noise.BlendedNoise`).
    """
    if class_labels is None:
        class_labels = range(pipeline.transformer.config.num_classes)
    return draw_sheet(*sample_blends(pipeline, settings, class_labels, steps, **options))


def sample_blends(
    pipeline: MoHDiTPipeline,
    settings: SamplingSettings,
    class_labels: Sequence[int | str],
    steps: int,
    **options: Any,
) -> tuple[np.ndarray, list[str], list[str]]:
    """Sample the images of :func:`sample_strip`.

    Returns:
        ``(images, names, columns)``: uint8 (rows, steps, H, W, 3), the class name of each row and
        the label of each column.
    """
    rows = pipeline.label_ids(class_labels)
    fractions = np.linspace(0, 1, steps)
    first = np.zeros(len(rows) * steps, np.int64)
    blend = dict(indices=first, towards=(first + 1, np.tile(fractions, len(rows))))
    images, names = sample_rows(pipeline, settings, rows, steps, **blend, **options)
    return images, names, [f"{100 * fraction:.0f} %" for fraction in fractions]


def sample_rows(
    pipeline: MoHDiTPipeline,
    settings: SamplingSettings,
    class_labels: Sequence[int | str] | None,
    columns: int,
    **options: Any,
) -> tuple[np.ndarray, list[str]]:
    """Sample a row of images for each class.

    Returns:
        ``(images, names)``: uint8 (rows, columns, H, W, 3), or (rows, columns, frames, H, W, 3),
        and the class name of each row.

    Raises:
        UserError: before any work, if a sheet of these images would be too large.
    """
    if class_labels is None:
        class_labels = range(pipeline.transformer.config.num_classes)
    rows = pipeline.label_ids(class_labels)
    check_sheet_size(pipeline, len(rows), columns)
    batches = generate(pipeline, np.repeat(rows, columns).tolist(), settings, **options)
    images = np.concatenate([images for _, images in batches])
    names = [class_name(pipeline, label) for label in rows]
    return images.reshape(len(rows), columns, *images.shape[1:]), names


def class_name(pipeline: MoHDiTPipeline, label: int) -> str:
    """Return the name of a class, or its id if it has no name."""
    names = pipeline.config.class_names
    return names[label] if names and label < len(names) else str(label)


def split_pages(
    pipeline: MoHDiTPipeline, class_labels: Sequence[int], columns: int
) -> list[Sequence[int]]:
    """Divide the rows of a grid larger than ``MAX_PIXELS`` into pages, each with at least one row.

    The images of a page have at most ``PAGE_SHARE`` of ``MAX_PIXELS``; labels need the rest.
    """
    rows, pixels = len(class_labels), _row_pixels(pipeline, columns)
    if rows * pixels > MAX_PIXELS:
        rows = max(1, int(PAGE_SHARE * MAX_PIXELS / pixels))
    return [class_labels[start : start + rows] for start in range(0, len(class_labels), rows)]


def check_sheet_size(pipeline: MoHDiTPipeline, rows: int, columns: int) -> None:
    """Raise ``UserError`` if a sheet of so many images has more than ``MAX_PIXELS`` pixels."""
    if (pixels := rows * _row_pixels(pipeline, columns)) > MAX_PIXELS:
        raise UserError(
            f"{rows} rows of {columns} images would be {pixels / 1e6:,.0f} megapixels; "
            f"a picture has at most {MAX_PIXELS / 1e6:.0f}. Give fewer class_labels or columns, or "
            "give num_samples to write a set"
        )


def _row_pixels(pipeline: MoHDiTPipeline, columns: int) -> int:
    side = pipeline.transformer.config.sample_size * downsampling_factor(pipeline.vae)
    return columns * (side * _zoom(side)) ** 2


def _zoom(side: int) -> int:
    """Return the factor that enlarges images of this side to at least ``SMALLEST_CELL``."""
    return max(1, -(-SMALLEST_CELL // side))


def draw_sheet(
    images: np.ndarray, row_labels: Sequence[str], column_labels: Sequence[str] = ()
) -> Image.Image:
    """Draw images as a sheet with labels at the left and above.

    More than ``ROWS_PER_BLOCK`` rows are divided into blocks side by side, each with its labels.
    Long labels are shortened. Labels may have any script (:mod:`moh_dit.sampling.lettering`).

    Args:
        images: uint8 (rows, columns, H, W, 3).
        row_labels: a label for each row, or none.
        column_labels: a label for each column, or none.
    """
    rows, columns, height, width = images.shape[:4]
    zoom = _zoom(max(height, width))
    height, width = height * zoom, width * zoom
    letters = Lettering([*row_labels, *column_labels], max(11, min(24, height // 6)))
    row_labels = [letters.fit(text) for text in row_labels]
    column_labels = [letters.fit(text) for text in column_labels]
    margin = 6
    left = max(map(letters.width, row_labels), default=0)
    left += 2 * margin if left else 0
    top = letters.height() + margin if column_labels else 0
    step = max([width, *(letters.width(text) + margin for text in column_labels)]) + GAP
    block = left + columns * step + 4 * margin
    blocks = _count_blocks(rows, block, height + GAP)
    per_block = -(-rows // blocks)

    size = (blocks * block - 4 * margin, top + per_block * (height + GAP))
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for x in range(0, blocks * block, block):
        for column, text in enumerate(column_labels):
            centre = x + left + column * step + step / 2
            letters.draw(draw, centre - letters.width(text) / 2, top / 2, text, INK)
    for row in range(rows):
        x, y = row // per_block * block + left, top + row % per_block * (height + GAP)
        if row < len(row_labels):
            text = row_labels[row]
            letters.draw(draw, x - margin - letters.width(text), y + height / 2, text, INK)
        for column in range(columns):
            image = Image.fromarray(images[row, column])
            image = image.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (x + column * step + (step - width) // 2, y))
    return sheet


def _count_blocks(rows: int, block_width: int, row_height: int) -> int:
    """Return the number of blocks with which a sheet comes nearest to ``ASPECT``."""
    if rows <= ROWS_PER_BLOCK:
        return 1

    def distance(blocks: int) -> float:
        return abs(math.log(blocks * block_width / (-(-rows // blocks) * row_height) / ASPECT))

    return min(range(1, rows + 1), key=distance)
