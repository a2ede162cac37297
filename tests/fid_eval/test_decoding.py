"""The decoding policy: which images are converted, how, and which are refused."""

import io

import numpy as np
import pytest
from PIL import Image

from fid_eval.errors import EvaluationError
from fid_eval.sets.decoding import (
    BadImage,
    Preprocess,
    check_contents,
    decode,
    read_header,
    read_plain_header,
)

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
GREY = np.repeat(RAMP[..., None], 3, axis=2)


def picture(width=24, height=16):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, shown turned a quarter clockwise
    return encoded(picture(), kind, exif=exif)


frames = dict(save_all=True, append_images=[picture().rotate(180)])
FILES = {
    "rgb": (encoded(picture()), []),
    "avif": (encoded(picture(), "AVIF"), []),
    "grey": (encoded(Image.fromarray(RAMP)), ["grey converted to RGB"]),
    "pgm": (encoded(Image.fromarray(RAMP), "PPM"), ["grey converted to RGB"]),
    "bits": (encoded(Image.fromarray(RAMP > 9)), ["black and white converted to RGB"]),
    "palette": (encoded(picture().quantize(8)), ["palette converted to RGB"]),
    "cmyk": (encoded(picture().convert("CMYK"), "JPEG"), ["CMYK converted to RGB"]),
    "lab": (encoded(picture().convert("LAB"), "TIFF"), ["LAB converted to RGB"]),
    "deep png": (
        encoded(Image.fromarray(RAMP.astype(np.uint16) * 257)),
        ["16 bits scaled to 8", "grey converted to RGB"],
    ),
    "deep tiff": (
        encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF"),
        ["16 bits scaled to 8", "grey converted to RGB"],
    ),
    "alpha": (encoded(picture().convert("RGBA")), ["transparency composited"]),
    "grey alpha": (
        encoded(picture().convert("LA")),
        ["transparency composited", "grey converted to RGB"],
    ),
    "rgb key": (encoded(picture(), transparency=(1, 2, 3)), ["transparency composited"]),
    "palette key": (
        encoded(picture().quantize(8), transparency=b"\0\x80"),
        ["transparency composited", "palette converted to RGB"],
    ),
    "turned jpeg": (turned("JPEG"), ["EXIF orientation applied"]),
    "turned png": (turned("PNG"), ["EXIF orientation applied"]),
    "gif": (
        encoded(picture(), "GIF", **frames),
        ["first of several frames", "palette converted to RGB"],
    ),
    "apng": (encoded(picture(), **frames), ["first of several frames"]),
    "webp": (encoded(picture(), "WEBP", lossless=True, **frames), ["first of several frames"]),
    "tiff": (encoded(picture(), "TIFF", **frames), ["first of several frames"]),
    "png and more": (encoded(picture()) + bytes(100_000), []),
    "jpeg and more": (encoded(picture(), "JPEG") + bytes(100_000), []),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_headers_and_decoding_agree_on_size_and_conversions(name):
    data, expected = FILES[name]
    pixels, conversions = decode(data)
    assert list(conversions) == expected
    for header in (read_header(data), check_contents(data)):
        assert header == (pixels.shape[1], pixels.shape[0], conversions)
    if plain := read_plain_header(data[:4096], data[-1024:]):
        assert plain == header
    assert (read_plain_header(data[:4096], data[-1024:]) is not None) == (name == "rgb")
    if expected:
        with pytest.raises(BadImage, match=f"--strict refuses it: {expected[0]}"):
            decode(data, Preprocess(strict=True))
    else:
        np.testing.assert_array_equal(decode(data, Preprocess(strict=True))[0], pixels)


@pytest.mark.parametrize("name", ["grey", "pgm", "deep png", "deep tiff"])
def test_grey_of_8_and_16_bits_gives_the_same_pixels(name):
    np.testing.assert_array_equal(decode(FILES[name][0])[0], GREY)


def test_orientation_turns_the_pixels():
    expected = np.rot90(np.asarray(picture()), -1)
    np.testing.assert_array_equal(decode(FILES["turned png"][0])[0], expected)


@pytest.mark.parametrize("name", ["apng", "webp", "tiff"])
def test_the_first_frame_counts(name):
    np.testing.assert_array_equal(decode(FILES[name][0])[0], np.asarray(picture()))


def test_transparency_shows_the_background():
    """colour · α + background · (1 − α), whatever lies hidden beneath."""
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 128]]], np.uint8)
    data = encoded(Image.fromarray(rgba))
    white = decode(data)[0][0].astype(int)
    np.testing.assert_array_equal(white[:2], [[200, 0, 0], [255, 255, 255]])
    assert np.abs(white[2] - (rgba[0, 2, :3] * (128 / 255) + 127)).max() <= 1
    black = decode(data, Preprocess(background="black"))[0][0]
    np.testing.assert_array_equal(black[:2], [[200, 0, 0], [0, 0, 0]])
    assert str(Preprocess(8, background="black")) == "resize to 8 on black"
    with pytest.raises(EvaluationError, match="--background 'none' is not a colour"):
        Preprocess(background="none")
    deep = Image.fromarray(np.array([[0, 7, 65535]], np.uint16))
    key = decode(encoded(deep, transparency=7))[0][0, :, 0]
    np.testing.assert_array_equal(key, [0, 255, 255])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("keep", [0, 0.6, 0.99])
def test_truncated_images_are_refused(kind, keep):
    data = encoded(picture(90, 70), kind)
    data = data[: int(len(data) * keep)]
    for function in (decode, check_contents):
        with pytest.raises(BadImage):
            function(data)


def test_images_of_unknown_range_and_decompression_bombs_are_refused():
    floats = encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")
    integers = encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF")
    bomb = encoded(Image.new("1", (20_000, 10_000)))
    for data, reason in [
        (floats, "floating-point pixels have no known range"),
        (integers, "beyond 16 bits"),
        (bomb, "decompression bomb"),
    ]:
        with pytest.raises(BadImage, match=reason):
            check_contents(data)
