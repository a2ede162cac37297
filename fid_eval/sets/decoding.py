"""Convert an encoded image of any kind to 8-bit RGB pixels: the decoding policy.

Training and evaluation decode with these functions. docs/data.md states the policy as a table.
"""

import io
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from ..errors import EvaluationError, describe_error

try:
    import pyspng
except ImportError:  # optional (extra "png"): Pillow decodes to the same pixels, more slowly
    pyspng = None

EXTENSIONS = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".jp2"),
    *(".pbm", ".pgm", ".ppm", ".pnm", ".tif", ".tiff"),
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_RGB = b"\x08\x02"  # 8 bits per channel, colour type RGB
PNG_END = b"IEND\xaeB`\x82"
# Chunks of a PNG that may change its pixels: transparency, orientation (also as text), animation.
PNG_MARKS = (b"tRNS", b"eXIf", b"acTL", b"tEXt", b"zTXt", b"iTXt")
MAX_BYTES = 1 << 30  # of one encoded image
POLICY_VERSION = 2  # raise it when an image decodes to other pixels; features are then recomputed

# Conversions, as counted in logs and results.
ORIENTED = "EXIF orientation applied"
FLATTENED = "transparency composited"
SCALED = "16 bits scaled to 8"
FIRST_FRAME = "first of several frames"
COLOUR_OF_MODE = {"1": "black and white", "P": "palette", "PA": "palette", "L": "grey"} | {
    "LA": "grey", "La": "grey"
}  # fmt: skip


def describe_conversions(counts: Mapping[str, int]) -> str:
    """Return the numbers of converted images as one line; empty without any."""
    counted = [f"{count:,} × {kind}" for kind, count in sorted(counts.items())]
    return f"conversions: {', '.join(counted)}" if counted else ""


class BadImage(ValueError):
    """One image cannot be used; the text says why in a few words."""


def bad_image(error: Exception) -> BadImage:
    """Convert any error of reading or decoding an image to a BadImage."""
    return error if isinstance(error, BadImage) else BadImage(describe_error(error))


@dataclass(frozen=True)
class Preprocess:
    """How images become pixels; by default they keep their size.

    Attributes:
        size: side of the square result in pixels, or None to keep images as they are.
        crop: keep the aspect ratio and crop the centre, as ADM does for training data: halve with
            a box filter while the short side is at least twice ``size``, resize with a bicubic
            filter, crop. False: stretch with a bicubic filter.
        background: colour behind transparent pixels, a name or ``#rrggbb``.
        strict: refuse every image that is not 8-bit RGB as it is.
    """

    size: int | None = None
    crop: bool = False
    background: str = "white"
    strict: bool = False

    def __post_init__(self) -> None:
        if self.crop and self.size is None:
            raise EvaluationError("--crop needs --resize SIZE")
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise EvaluationError(
                f"--background {self.background!r} is not a colour; give a name or #rrggbb"
            ) from None

    def __str__(self) -> str:
        kind = f"{'centre crop' if self.crop else 'resize'} to {self.size}"
        behind = "" if self.background == "white" else f" on {self.background}"
        return ("none" if self.size is None else kind) + behind

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.size is None or image.size == (self.size, self.size):
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
        if self.size is None or images.shape[1:3] == (self.size, self.size):
            return images
        return np.stack([np.asarray(self(Image.fromarray(image))) for image in images])

    def check(self, conversions: tuple[str, ...]) -> None:
        """Raise BadImage if ``strict`` refuses an image with these conversions."""
        if self.strict and conversions:
            raise BadImage(f"--strict refuses it: {', '.join(conversions)}")


AS_IS = Preprocess()


class Header(NamedTuple):
    """Size of an image in pixels, after its orientation is applied, and its conversions."""

    width: int
    height: int
    conversions: tuple[str, ...]


def decode(
    data: bytes | Image.Image, preprocess: Preprocess = AS_IS
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Decode an image to RGB and preprocess it.

    Returns:
        Pixels, uint8 (H, W, 3), and the conversions that were applied.

    Raises:
        BadImage: the image is truncated, damaged or too large, or the range of its pixel values
            is unknown.
    """
    try:
        if not isinstance(data, bytes):
            return _convert(data, b"", preprocess)
        chunks = None
        if data.startswith(PNG_SIGNATURE):
            check_size(len(data))
            chunks = _checked_chunks(data)  # Neither pyspng nor Pillow verifies all checksums.
        else:
            check_end(data)
        if chunks is not None and pyspng is not None and _is_plain(data, chunks):
            _png_size(data)
            pixels = pyspng.load(data, "RGB")
            if preprocess.size is not None:
                pixels = np.asarray(preprocess(Image.fromarray(pixels)))
            return pixels, ()
        with Image.open(io.BytesIO(data)) as image:
            return _convert(image, data, preprocess)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:
        raise BadImage(f"truncated or damaged ({' '.join(str(error).split())})") from error
    except Exception as error:  # DecompressionBombError, and others for foreign files
        raise bad_image(error) from error


def _convert(
    image: Image.Image, data: bytes, preprocess: Preprocess
) -> tuple[np.ndarray, tuple[str, ...]]:
    found = header_of(image, data).conversions
    preprocess.check(found)
    return np.asarray(preprocess(to_rgb(image, preprocess.background))), found


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Convert the first frame of an image of any mode to RGB, as docs/data.md states.

    Raises:
        BadImage: the range of the pixel values is unknown (floats, integers above 16 bits).
    """
    if ORIENTED in _orientation(image):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; Pillow may open it as 32-bit integers
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise BadImage("integer pixels beyond 16 bits have no known range")
        key = image.info.get("transparency")
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
        if isinstance(key, int):
            image.putalpha(Image.fromarray(np.where(grey == key, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def header_of(image: Image.Image, data: bytes = b"") -> Header:
    """Return the size and the conversions of an opened image, from its header.

    Args:
        image: an image whose pixels need not be decoded yet.
        data: its encoded bytes, if there are any.

    Raises:
        BadImage: floating-point pixels, whose range is unknown.
    """
    mode = image.mode
    if mode == "F":
        raise BadImage("floating-point pixels have no known range; save it with 8 or 16 bits")
    # Pillow searches a PNG for its orientation by decoding it, so look for the words first.
    is_plain = data.startswith(PNG_SIGNATURE) and not any(mark in data for mark in PNG_MARKS)
    found = [] if is_plain else _orientation(image)
    if getattr(image, "is_animated", False):
        found.append(FIRST_FRAME)
    if image.has_transparency_data:
        found.append(FLATTENED)
    bits = getattr(image, "tag_v2", {}).get(258, 8)  # BitsPerSample of TIFF
    deep_png = data.startswith(PNG_SIGNATURE) and data[24] == 16
    if mode.startswith("I") or deep_png or max(bits if isinstance(bits, tuple) else (bits,)) == 16:
        found.append(SCALED)
    if mode not in ("RGB", "RGBA", "RGBa"):
        colour = "grey" if mode.startswith("I") else COLOUR_OF_MODE.get(mode, mode)
        found.append(f"{colour} converted to RGB")
    is_turned = ORIENTED in found and image.getexif().get(0x0112, 1) >= 5
    width, height = reversed(image.size) if is_turned else image.size
    return Header(width, height, tuple(found))


def _orientation(image: Image.Image) -> list[str]:
    if image.format == "JPEG" and not image.info.keys() & {"exif", "xmp"}:
        return []
    return [ORIENTED] if 2 <= image.getexif().get(0x0112, 1) <= 8 else []


def read_header(data: bytes) -> Header:
    """Return the header of a complete encoded image without decoding its pixels.

    Raises:
        BadImage: the image is empty, truncated or too large, or not an image.
    """
    try:
        check_end(data)
        with Image.open(io.BytesIO(data)) as image:
            return header_of(image, data)
    except UnidentifiedImageError as error:
        raise BadImage("not an image that Pillow can read") from error
    except Exception as error:  # DecompressionBombError, and others for foreign files
        raise bad_image(error) from error


def read_plain_header(head: bytes, tail: bytes) -> Header | None:
    """Return the header of an 8-bit RGB PNG that needs no conversion, from a part of its bytes.

    Args:
        head: first bytes of the file, 33 or more.
        tail: last bytes of the file.

    Returns:
        None if all bytes are needed to be certain.
    """
    start = head.find(b"IDAT")
    if start < 0 or PNG_END not in tail or not head.startswith(PNG_SIGNATURE):
        return None
    marks = [mark for mark in PNG_MARKS if mark in tail or mark in head[:start]]
    return Header(*_png_size(head), ()) if _is_plain(head, marks) else None


def _is_plain(data: bytes, chunks: Collection[bytes]) -> bool:
    """Return whether a PNG with these chunks holds 8-bit RGB pixels that need no conversion."""
    return data[24:26] == PNG_RGB and not any(mark in chunks for mark in PNG_MARKS)


def _png_size(data: bytes) -> tuple[int, int]:
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if width * height > 2 * (Image.MAX_IMAGE_PIXELS or width * height):  # Pillow's limit
        raise BadImage(f"{width}×{height} pixels are too many for an image")
    return width, height


def check_end(data: bytes) -> None:
    """Raise BadImage if an encoded image is empty or lacks its end; bytes behind it are allowed."""
    if not data:
        raise BadImage("empty file")
    check_size(len(data))
    is_cut = False
    if data.startswith(PNG_SIGNATURE):
        is_cut = PNG_END not in data
    elif data.startswith(b"\xff\xd8"):
        is_cut = data.find(b"\xff\xd9", _start_of_scan(data)) < 0
    elif data.startswith(b"RIFF"):
        is_cut = int.from_bytes(data[4:8], "little") + 8 > len(data)
    if is_cut:
        raise BadImage("truncated")


def check_size(size: int) -> None:
    """Raise BadImage if an encoded image has too many bytes."""
    if size > MAX_BYTES:
        raise BadImage(f"{size} bytes are too many for an image")


def _start_of_scan(data: bytes) -> int:
    """Return where the pixels of a JPEG start: the end of its thumbnail lies before."""
    position = 2
    while data[position : position + 1] == b"\xff" and data[position + 1 : position + 2] != b"\xda":
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return position


def check_contents(data: bytes, preprocess: Preprocess = AS_IS) -> Header:
    """Return the header of an encoded image, and find damage as fast as its format allows.

    Checksums are compared for PNG, the end marker is searched for JPEG, and other formats are
    decoded.

    Raises:
        BadImage: as ``decode``.
    """
    header = read_header(data)
    preprocess.check(header.conversions)
    if data.startswith(PNG_SIGNATURE):
        _checked_chunks(data)
    if SCALED in header.conversions or not data.startswith((PNG_SIGNATURE, b"\xff\xd8")):
        decode(data, preprocess)
    return header


def _checked_chunks(data: bytes) -> set[bytes]:
    """Return the types of the chunks of a PNG; raise BadImage if a checksum is wrong."""
    types: set[bytes] = set()
    view, start = memoryview(data), len(PNG_SIGNATURE)
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(view[start : start + 4], "big")
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            break
        types.add(data[start + 4 : start + 8])
        if view[start + 4 : end] == b"IEND":
            return types
        start = end + 4
    raise BadImage("truncated or damaged (wrong checksum of a chunk)")
