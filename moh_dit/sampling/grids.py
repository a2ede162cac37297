"""Sheets of images with labels: a row per class, an interpolation strip, the denoising itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..common.errors import UserError
from ..pipeline.pipeline import MoHDiTPipeline
from .config import SamplingSettings
from .engine import generate

SMALLEST_CELL = 64  # pixels; smaller images are enlarged by a whole factor
GAP = 2
BACKGROUND, INK = "white", "black"
FRAME_MS, LAST_FRAME_MS = 120, 1500


def sample_grid(
    pipeline: MoHDiTPipeline,
    settings: SamplingSettings,
    class_labels: Sequence[int | str] | None = None,
    images_per_class: int = 8,
    **options: Any,
) -> Image.Image:
    """A row of images for each class, labelled with its name.

    Args:
        pipeline: what to sample from; left as it is.
        settings: steps, guidance, scheduler and seed.
        class_labels: ids or names; ``None`` for all classes.
        images_per_class: columns. The image in row r and column c has index
            ``r * images_per_class + c``.
        options: ``batch_size``, ``decode_batch_size``, ``guidance_model`` and ``on_step`` of
            :func:`~moh_dit.sampling.engine.generate`.

    Raises:
        UserError: before any work, for settings or labels that do not fit the model.
    """
    return draw_sheet(*class_rows(pipeline, settings, class_labels, images_per_class, **options))


def sample_animation(
    pipeline: MoHDiTPipeline,
    settings: SamplingSettings,
    class_labels: Sequence[int | str] | None = None,
    images_per_class: int = 8,
    *,
    frames: int = 24,
    **options: Any,
) -> list[Image.Image]:
    """The grid of :func:`sample_grid` emerging from noise, in at most ``frames`` sheets.

    Frames are decoded states of the process, reduced to unit variance where theirs is larger; the
    last one is the grid.
    """
    options = {**options, "frames": frames}
    images, names = class_rows(pipeline, settings, class_labels, images_per_class, **options)
    return [draw_sheet(images[:, :, frame], names) for frame in range(images.shape[2])]


def class_rows(
    pipeline: MoHDiTPipeline,
    settings: SamplingSettings,
    class_labels: Sequence[int | str] | None,
    images_per_class: int,
    **options: Any,
) -> tuple[np.ndarray, list[str]]:
    """What :func:`sample_grid` draws: uint8 (rows, columns, H, W, 3) and the name of each row."""
    if class_labels is None:
        class_labels = range(pipeline.transformer.config.num_classes)
    rows = pipeline.label_ids(class_labels)
    batches = generate(pipeline, np.repeat(rows, images_per_class).tolist(), settings, **options)
    images = np.concatenate([images for _, images in batches])
    names = [class_name(pipeline, label) for label in rows]
    return images.reshape(len(rows), images_per_class, *images.shape[1:]), names


def sample_strip(
    pipeline: MoHDiTPipeline,
    settings: SamplingSettings,
    class_labels: Sequence[int | str] | None = None,
    steps: int = 9,
    **options: Any,
) -> Image.Image:
    """For each class a row from its image of index 0 to its image of index 1.

    All noise is interpolated on the arc between the two images' (see
    :class:`~moh_dit.diffusion.noise.BlendedNoise`), that of stochastic schedulers too.
    """
    if class_labels is None:
        class_labels = range(pipeline.transformer.config.num_classes)
    rows = pipeline.label_ids(class_labels)
    count = len(rows) * steps
    fractions = np.tile(np.linspace(0, 1, steps), len(rows))
    batches = generate(
        pipeline,
        np.repeat(rows, steps).tolist(),
        settings,
        indices=np.zeros(count, np.int64),
        towards=(np.ones(count, np.int64), fractions),  # type: ignore[arg-type]
        **options,
    )
    images = np.concatenate([images for _, images in batches])
    names = [class_name(pipeline, label) for label in rows]
    columns = [f"{100 * fraction:.0f} %" for fraction in fractions[:steps]]
    return draw_sheet(images.reshape(len(rows), steps, *images.shape[1:]), names, columns)


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


def save_sheet(sheet: Image.Image, file: Path | BinaryIO, settings: str) -> None:
    """Write a PNG with its settings inside (chunk ``settings``), which ``--config`` reads."""
    text = PngInfo()
    text.add_itxt("settings", settings)
    sheet.save(file, format="PNG", pnginfo=text)


ANIMATIONS = (".gif", ".webp", ".mp4")


def check_animation(output: Path) -> None:
    """Raise ``UserError`` where an animation cannot be written."""
    if output.suffix == ".mp4":
        try:
            import imageio_ffmpeg  # noqa: F401
        except ImportError:
            raise UserError(
                f"output {output}: MP4 needs pip install imageio imageio-ffmpeg; .gif and .webp "
                "need nothing more"
            ) from None


def save_animation(frames: Sequence[Image.Image], path: Path) -> None:
    """Write frames as ``.gif``, ``.webp`` or ``.mp4``; the last one stays longer."""
    if path.suffix == ".mp4":
        from imageio.v2 import mimwrite

        stay = [frames[-1]] * (LAST_FRAME_MS // FRAME_MS)
        # An even number of pixels a side, which the codec asks for.
        even = [np.asarray(f)[: f.height // 2 * 2, : f.width // 2 * 2] for f in [*frames, *stay]]
        mimwrite(path, even, format="mp4", fps=1000 / FRAME_MS, macro_block_size=2)  # type: ignore[arg-type]
        return
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    options: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(
        path,
        format=path.suffix[1:].upper(),
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        **options,
    )
