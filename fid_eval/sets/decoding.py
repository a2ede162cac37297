"""Check, decode, resize and crop one image."""

import io
import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import EvaluationError, describe_error

try:
    import pyspng
except ImportError:  # optional (extra "png"): Pillow decodes to the same pixels, more slowly
    pyspng = None

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif"}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_RGB = b"\x08\x02"  # 8 bits per channel, colour type RGB
PNG_END = b"IEND\xaeB`\x82"
MAX_BYTES = 1 << 30  # of one encoded image
POLICY_VERSION = 2  # raise it when an image decodes to other pixels; features are then recomputed
CONVERTED_MODES = {"L", "1", "P"}  # converted to RGB without loss


class BadImage(ValueError):
    """One image cannot be used; the text says why in a few words."""


def bad_image(error: Exception) -> BadImage:
    """Convert any error of reading or decoding an image to a BadImage."""
    return error if isinstance(error, BadImage) else BadImage(describe_error(error))


@dataclass(frozen=True)
class Preprocess:
    """Resizing of images before the extractor; by default images stay as they are.

    Attributes:
        size: side of the square result in pixels, or None to keep images as they are.
        crop: keep the aspect ratio and crop the centre, as ADM does for training data: halve with
            a box filter while the short side is at least twice ``size``, resize with a bicubic
            filter, crop. False: stretch with a bicubic filter.
    """

    size: int | None = None
    crop: bool = False

    def __post_init__(self) -> None:
        if self.crop and self.size is None:
            raise EvaluationError("--crop needs --resize SIZE")

    def __str__(self) -> str:
        if self.size is None:
            return "none"
        return f"{'centre crop' if self.crop else 'resize'} to {self.size}"

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.size is None or (not self.crop and image.size == (self.size, self.size)):
            return image
        if not self.crop:
            return image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        while min(image.size) >= 2 * self.size:
            half = (image.width // 2, image.height // 2)
            image = image.resize(half, Image.Resampling.BOX)
        scale = self.size / min(image.size)
        scaled = (round(image.width * scale), round(image.height * scale))
        image = image.resize(scaled, Image.Resampling.BICUBIC)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))

    def arrays(self, images: np.ndarray) -> np.ndarray:
        """Resize a batch of images, uint8 (n, H, W, 3)."""
        if self.size is None:
            return images
        return np.stack([np.asarray(self(Image.fromarray(image))) for image in images])


AS_IS = Preprocess()


def check_header(head: bytes, tail: bytes, size: int, whole: bytes | None = None) -> tuple:
    """Return (width, height, mode) of an encoded image.

    Args:
        head: first bytes of the image; PNG needs at least 33.
        tail: last bytes of the image.
        size: length of the encoded image in bytes.
        whole: all bytes, for formats other than PNG whose header is longer than ``head``.

    Raises:
        BadImage: the image is truncated or has a colour mode that is not supported.
    """
    if size == 0:
        raise BadImage("empty file")
    if size > MAX_BYTES:
        raise BadImage(f"{size} bytes are too many for an image")
    if head.startswith(PNG_SIGNATURE) and len(head) >= 33:
        if PNG_END not in tail:
            raise BadImage("truncated")
        width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
        if width * height > 2 * (Image.MAX_IMAGE_PIXELS or width * height):  # Pillow's limit
            raise BadImage(f"{width}×{height} pixels are too many for an image")
        depth, colour = head[24], head[25]
        if depth == 16:
            raise BadImage("16 bits per channel")
        modes = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}
        return width, height, check_mode(modes.get(colour, "unknown"))
    is_cut_jpeg = head.startswith(b"\xff\xd8") and b"\xff\xd9" not in tail
    is_cut_webp = head.startswith(b"RIFF") and int.from_bytes(head[4:8], "little") + 8 > size
    if is_cut_jpeg or is_cut_webp:
        raise BadImage("truncated")
    try:
        with Image.open(io.BytesIO(whole if whole is not None else head)) as image:
            return image.width, image.height, check_mode(image.mode)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise BadImage("not an image that Pillow can read") from error
    except Exception as error:  # DecompressionBombError, and others for foreign files
        raise bad_image(error) from error


def check_mode(mode: str) -> str:
    """Return ``mode``, a Pillow mode; raise BadImage unless it converts to RGB without loss."""
    if mode == "RGB" or mode in CONVERTED_MODES:
        return mode
    if mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        raise BadImage("transparency (flatten it onto a background first)")
    if mode.startswith(("I", "F")):
        raise BadImage("more than 8 bits per channel")
    raise BadImage(f"colour mode {mode} (convert it to RGB first)")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to RGB; raise BadImage where that would lose information."""
    check_mode(image.mode)
    return image if image.mode == "RGB" else image.convert("RGB")


def check_file(path: str | Path) -> tuple:
    """Apply ``check_header`` to a file, reading only the first and last bytes of a PNG."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # Opening a FIFO would wait for a writer.
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a regular file")
        size = status.st_size
        if size > MAX_BYTES:
            raise BadImage(f"{size} bytes are too many for an image")
        head = os.pread(file, 64, 0)
        tail = os.pread(file, 1024, max(0, size - 1024))
        whole = None if head.startswith(PNG_SIGNATURE) else os.pread(file, size, 0)
    finally:
        os.close(file)
    return check_header(head, tail, size, whole)


def check_chunks(data: bytes) -> None:
    """Raise BadImage unless the checksum of each chunk of a PNG is right."""
    view, start = memoryview(data), len(PNG_SIGNATURE)
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(view[start : start + 4], "big")
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            break
        if view[start + 4 : end] == b"IEND":
            return
        start = end + 4
    raise BadImage("truncated or damaged (wrong checksum of a chunk)")


def decode(data: bytes, preprocess: Preprocess) -> np.ndarray:
    """Decode an image to uint8 (H, W, 3); grey and palette images become RGB."""
    try:
        if data.startswith(PNG_SIGNATURE) and data[24:26] == PNG_RGB and preprocess.size is None:
            check_chunks(data)  # Neither pyspng nor Pillow verifies all checksums.
            if pyspng is not None:
                return pyspng.load(data, "RGB")
        with Image.open(io.BytesIO(data)) as image:
            check_mode(image.mode)
            image.load()
            return np.asarray(preprocess(to_rgb(image)))
    except BadImage:
        raise
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:
        raise BadImage(f"truncated or damaged ({error})") from error
