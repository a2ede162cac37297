"""Preprocess images to square RGB pixels, and convert pixels to and from the model's range."""

from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp"),
    *(".gif", ".jp2", ".pgm", ".ppm", ".tif", ".tiff"),
)
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side of an RGB image to ``size`` and crop the centre, as ADM and DiT do.

    A box filter halves the image while its shorter side is at least twice ``size``. Bicubic
    interpolation then resizes (or enlarges) it. The result is uint8 (size, size, 3).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB.

    The EXIF orientation is applied. Transparent images are blended onto white. 16-bit grey is
    scaled to 8 bits (65535 → 255). An animation is reduced to its first frame.

    Raises:
        ValueError: the range of the pixel values is unknown (floats, integers above 16 bits).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError(
            "floating-point pixels have no known range; convert the image to 8 or 16 bits"
        )
    if image.mode.startswith("I"):  # 16-bit grey; Pillow may open it as 32-bit integers
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(
                "integer pixels beyond 16 bits have no known range; convert the image to 16 bits"
            )
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_float(images: np.ndarray | Tensor) -> Tensor:
    """Convert uint8 (B, H, W, 3) in 0 … 255 to float32 (B, 3, H, W) in −1 … 1."""
    pixels = torch.as_tensor(images).permute(0, 3, 1, 2).to(torch.float32)
    return pixels / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Convert float (B, 3, H, W) in −1 … 1 to uint8 (B, H, W, 3) on the CPU; clip and round."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def read_pixels(file: IO[bytes], size: int) -> np.ndarray:
    """Decode an image file and preprocess it to uint8 (size, size, 3).

    Raises:
        ValueError: the file cannot be read, or its pixel values have no known range.
    """
    try:
        with Image.open(file) as image:
            return center_crop(to_rgb(image), size)
    except PILLOW_ERRORS as error:
        raise ValueError(_error_text(error)) from None


def find_defect(file: IO[bytes]) -> str | None:
    """Return why an image cannot be read, or ``None`` if it can.

    PNG and JPEG files are checked quickly. Other formats are decoded completely.
    """
    try:
        with Image.open(file) as image:
            if image.format == "PNG" and not image.mode.startswith(("I", "F")):
                image.verify()  # compares the checksums of the whole file
            elif image.format != "JPEG" or not _has_jpeg_end(file):
                to_rgb(image)
    except PILLOW_ERRORS as error:
        return _error_text(error)
    return None


def _has_jpeg_end(file: IO[bytes]) -> bool:
    """Return whether a JPEG file contains the end-of-image marker near its end.

    A truncated file does not. Pillow has already read up to the pixels, so an earlier marker, which
    ends the embedded thumbnail, is not counted.
    """
    position = file.tell()
    size = file.seek(0, 2)
    file.seek(max(position, size - 65536))
    found = b"\xff\xd9" in file.read()
    file.seek(position)
    return found


def _error_text(error: Exception) -> str:
    text = " ".join(str(error).split())
    return "not an image" if "cannot identify" in text else text or type(error).__name__
