"""Sheets of images with labels."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..pipeline import MoHDiTPipeline
from .config import SamplingSettings
from .engine import generate

SMALLEST_CELL = 64  # pixels; smaller images are enlarged by a whole factor
GAP = 2
BACKGROUND, INK = "white", "black"


def sample_grid(
    pipeline: MoHDiTPipeline,
    settings: SamplingSettings,
    class_labels: Sequence[int | str] | None = None,
    images_per_class: int = 8,
    *,
    batch_size: int = 64,
    decode_batch_size: int | None = None,
) -> Image.Image:
    """A row of images for each class, labelled with its name.

    Args:
        pipeline: what to sample from; left as it is.
        settings: steps, guidance, scheduler and seed.
        class_labels: ids or names; ``None`` for all classes.
        images_per_class: columns. The image in row r and column c has index
            ``r * images_per_class + c``.
        batch_size: images at once.
        decode_batch_size: images decoded at once.

    Raises:
        UserError: before any work, for settings or labels that do not fit the model.
    """
    if class_labels is None:
        class_labels = range(pipeline.transformer.config.num_classes)
    rows = pipeline.label_ids(class_labels)
    batches = generate(
        pipeline,
        np.repeat(rows, images_per_class).tolist(),
        settings,
        batch_size=batch_size,
        decode_batch_size=decode_batch_size,
    )
    images = np.concatenate([images for _, images in batches])
    names = [class_name(pipeline, label) for label in rows]
    return draw_sheet(images.reshape(len(rows), images_per_class, *images.shape[1:]), names)


def class_name(pipeline: MoHDiTPipeline, label: int) -> str:
    """The name of a class, its id where it has none."""
    names = pipeline.config.class_names
    return names[label] if names and label < len(names) else str(label)


def draw_sheet(
    images: np.ndarray, row_labels: Sequence[str], column_labels: Sequence[str] = ()
) -> Image.Image:
    """A contact sheet of uint8 (rows, columns, H, W, 3) with labels at the left and above."""
    rows, columns, height, width = images.shape[:4]
    zoom = max(1, -(-SMALLEST_CELL // max(height, width)))
    height, width = height * zoom, width * zoom
    font = ImageFont.load_default(max(11, min(24, height // 6)))
    margin = 6
    left = max((int(font.getlength(text)) for text in row_labels), default=0)
    left += 2 * margin if left else 0
    top = int(font.getbbox("Ag")[3]) + 2 * margin if column_labels else 0
    wide = [max(width, int(font.getlength(text)) + margin) for text in column_labels]
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
