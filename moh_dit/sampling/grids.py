"""Draw labelled sheets of images: a grid of classes, an interpolation strip, the denoising."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..pipeline.pipeline import MoHDiTPipeline
from .config import SamplingSettings
from .engine import generate

SMALLEST_CELL = 64  # pixels; smaller images are enlarged by an integer factor
GAP = 2
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
    rows = pipeline.label_ids(class_labels)
    fractions = np.linspace(0, 1, steps)
    first = np.zeros(len(rows) * steps, np.int64)
    blend = dict(indices=first, towards=(first + 1, np.tile(fractions, len(rows))))
    images, names = sample_rows(pipeline, settings, rows, steps, **blend, **options)
    return draw_sheet(images, names, [f"{100 * fraction:.0f} %" for fraction in fractions])


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
    """
    if class_labels is None:
        class_labels = range(pipeline.transformer.config.num_classes)
    rows = pipeline.label_ids(class_labels)
    batches = generate(pipeline, np.repeat(rows, columns).tolist(), settings, **options)
    images = np.concatenate([images for _, images in batches])
    names = [class_name(pipeline, label) for label in rows]
    return images.reshape(len(rows), columns, *images.shape[1:]), names


def class_name(pipeline: MoHDiTPipeline, label: int) -> str:
    """Return the name of a class, or its id if it has no name."""
    names = pipeline.config.class_names
    return names[label] if names and label < len(names) else str(label)


def draw_sheet(
    images: np.ndarray, row_labels: Sequence[str], column_labels: Sequence[str] = ()
) -> Image.Image:
    """Draw images, uint8 (rows, columns, H, W, 3), as a sheet with labels at the left and above."""
    rows, columns, height, width = images.shape[:4]
    zoom = max(1, -(-SMALLEST_CELL // max(height, width)))
    height, width = height * zoom, width * zoom
    font = ImageFont.load_default(max(11, min(24, height // 6)))
    margin = 6
    left = max((int(font.getlength(text)) for text in row_labels), default=0)
    left += 2 * margin if left else 0
    top = int(font.getbbox("Ag")[3]) + 2 * margin if column_labels else 0
    wide = [int(font.getlength(text)) + margin for text in column_labels]
    step = max([width, *wide]) + GAP

    sheet = Image.new("RGB", (left + columns * step, top + rows * (height + GAP)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(column_labels):
        centre = left + column * step + step // 2
        draw.text((centre, margin), text, fill=INK, font=font, anchor="ma")
    for row in range(rows):
        y = top + row * (height + GAP)
        if row < len(row_labels):
            middle = (left - margin, y + height // 2)
            draw.text(middle, row_labels[row], fill=INK, font=font, anchor="rm")
        for column in range(columns):
            image = Image.fromarray(images[row, column])
            image = image.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (left + column * step + (step - width) // 2, y))
    return sheet
