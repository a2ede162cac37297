"""Image sets read, crop and convert images, and refuse unreadable ones."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fid_eval.sets.decoding import Preprocess
from moh_dit.common.errors import UserError
from moh_dit.data.digits import load_digit_images
from moh_dit.data.images import load_batch, open_images, read_batches
from moh_dit.data.pixels import to_float, to_pixels


def center_crop(image, size):
    return np.asarray(Preprocess(size, crop=True)(image))


def picture(width, height, mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 7, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for path in ("b/2.png", "b/10.png", "a/deep/er/1.JPG", "a/0.webp"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        picture(20, 16, seed=len(path)).save(root / path)
    (root / "a" / "notes.txt").write_text("not an image")
    (root / "a" / ".hidden.png").write_text("not an image")
    (root / ".cache").mkdir()
    return root


def test_digits_as_they_are():
    images = open_images("digits", 32)
    pixels, labels = load_digit_images()
    assert len(images) == 1797
    assert images.class_names == [str(i) for i in range(10)]
    np.testing.assert_array_equal(images.labels, labels)
    batch, batch_labels = load_batch(images, [3, 1700])
    np.testing.assert_array_equal(batch, pixels[[3, 1700]])
    np.testing.assert_array_equal(batch_labels, labels[[3, 1700]])
    assert open_images("digits", 8)[0][0].shape == (8, 8, 3)


def test_folder_order_and_labels(folder):
    images = open_images(folder, 8, progress=False)
    assert images.class_names == ["a", "b"]
    np.testing.assert_array_equal(images.labels, [0, 0, 1, 1])
    assert images.labels.dtype == np.int64
    expected = ["a/0.webp", "a/deep/er/1.JPG", "b/10.png", "b/2.png"]
    for (pixels, label), path in zip(map(images.__getitem__, range(4)), expected, strict=True):
        assert pixels.shape == (8, 8, 3)
        assert pixels.dtype == np.uint8
        assert label == "ab".index(path[0])
        np.testing.assert_array_equal(
            pixels, center_crop(Image.open(folder / path).convert("RGB"), 8)
        )


def test_classes_json_sets_the_labels(folder):
    (folder / "classes.json").write_text(json.dumps(["b", "a"]))
    images = open_images(str(folder), 8, progress=False)
    assert images.class_names == ["b", "a"]
    np.testing.assert_array_equal(images.labels, [0, 0, 1, 1])
    (folder / "classes.json").write_text(json.dumps(["b", "c"]))
    with pytest.raises(UserError, match=r"classes\.json does not name the class folder a"):
        open_images(folder, 8)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (129, 96), (50, 67), (33, 300), (9, 12)])
def test_crop_halves_then_bicubic_then_centre(width, height):
    """Compare with the definition on arrays, where box halving is the mean of 2×2 pixels."""
    image = picture(width, height)
    size = 16
    expected = image
    while min(expected.size) >= 2 * size:
        if expected.width % 2 == 0 and expected.height % 2 == 0:
            pixels = np.asarray(expected).astype(np.float64)
            means = pixels.reshape(expected.height // 2, 2, expected.width // 2, 2, 3).mean((1, 3))
            halved = np.floor(means + 0.5).astype(np.uint8)
            ours = expected.resize(
                (expected.width // 2, expected.height // 2), Image.Resampling.BOX
            )
            assert np.abs(halved.astype(int) - np.asarray(ours)).max() <= 1  # rounds per axis
            expected = ours
        else:
            expected = expected.resize(
                (expected.width // 2, expected.height // 2), Image.Resampling.BOX
            )
    short = min(expected.size)
    shape = (round(expected.width * size / short), round(expected.height * size / short))
    pixels = np.asarray(expected.resize(shape, Image.Resampling.BICUBIC))
    top, left = (shape[1] - size) // 2, (shape[0] - size) // 2
    result = center_crop(image, size)
    assert result.shape == (size, size, 3)
    np.testing.assert_array_equal(result, pixels[top : top + size, left : left + size])


def test_exact_size_is_untouched():
    image = picture(24, 24)
    np.testing.assert_array_equal(center_crop(image, 24), np.asarray(image))


def test_float_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    images = to_float(pixels)
    assert images.shape == (1, 3, 16, 16)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    np.testing.assert_array_equal(to_pixels(images).numpy(), pixels)
    assert to_pixels(torch.full((1, 3, 1, 1), 7.0)).max() == 255


def test_bad_folders_are_named(folder, tmp_path, capsys):
    with pytest.raises(UserError, match=r"nowhere does not exist.*digits"):
        open_images(tmp_path / "nowhere", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no images"):
        open_images(tmp_path / "empty", 8)
    picture(8, 8).save(folder / "loose.png")
    with pytest.raises(UserError, match=r"outside its class folders, for example loose\.png"):
        open_images(folder, 8)
    (folder / "loose.png").unlink()
    (folder / "c").mkdir()
    (folder / "c" / "readme.md").write_text("")
    assert open_images(folder, 8).class_names == ["a", "b"]
    assert "1 folders without images are not classes, as c" in capsys.readouterr().err
    with pytest.raises(UserError, match="image_size is 0"):
        open_images("digits", 0)


def cut(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.bmp", "x.gif", "x.tif"])
@pytest.mark.parametrize("keep", [0.0, 0.6])
def test_cut_off_images_are_named_or_skipped(folder, name, keep, capsys):
    bad = folder / "b" / name
    picture(90, 70).save(bad)
    cut(bad, keep)
    with pytest.raises(UserError, match=f"{folder}: 1 of 5 images .*b/{name}: .*skip_unreadable"):
        open_images(folder, 8, check=True, progress=False)
    images = open_images(folder, 8, progress=False)
    with pytest.raises(UserError, match=f"{folder}: b/{name}: .*skip_unreadable"):
        load_batch(images, range(5))
    images = open_images(folder, 8, skip_unreadable=True, progress=False)
    assert len(images) == len(load_batch(images, range(4))[1]) == 4
    assert f"1 of 5 images cannot be used (b/{name}" in capsys.readouterr().err


def test_other_unreadable_images(folder, capsys):
    (folder / "b" / "text.png").write_text("this is no image")
    damaged = folder / "b" / "damaged.png"
    picture(64, 64).save(damaged)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 0xFF  # found by its checksum
    damaged.write_bytes(data)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "b" / "float.tif")
    assert len(open_images(folder, 8, skip_unreadable=True, progress=False)) == 4
    said = capsys.readouterr().err
    assert all(f"b/{name}: " in said for name in ("damaged.png", "float.tif", "text.png"))


def test_a_class_with_nothing_readable_is_an_error(folder):
    (folder / "c").mkdir()
    (folder / "c" / "bad.png").write_text("")
    with pytest.raises(UserError, match="no image of the class c is readable"):
        open_images(folder, 8, skip_unreadable=True, progress=False)


def test_an_image_lost_later_is_named(folder):
    images = open_images(folder, 8, progress=False)
    (folder / "b" / "2.png").unlink()
    with pytest.raises(UserError, match=r"b/2\.png: No such file"):
        images[3]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_ahead_of_time(folder, num_workers):
    images = open_images(folder, 8, progress=False)
    batches = [[3, 0], [1, 2]]
    for (pixels, labels), indices in zip(
        read_batches(images, batches, num_workers), batches, strict=True
    ):
        np.testing.assert_array_equal(pixels, load_batch(images, indices)[0])
        np.testing.assert_array_equal(labels, images.labels[indices])
    (folder / "b" / "2.png").unlink()
    with pytest.raises(UserError) as error:
        list(read_batches(images, batches, num_workers))
    assert str(error.value).count("\n") == 0


def test_jpeg_with_trailing_data_is_kept(folder):
    path = folder / "b" / "phone.jpg"
    picture(40, 30).save(path)
    path.write_bytes(path.read_bytes() + bytes(100_000))  # as some cameras append
    assert len(open_images(folder, 8, progress=False)) == 5


def test_links_are_followed_but_not_in_circles(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    picture(20, 16).save(elsewhere / "far.png")
    (folder / "b" / "linked").symlink_to(elsewhere)
    (folder / "b" / "near.png").symlink_to(elsewhere / "far.png")
    (folder / "b" / "circle").symlink_to(folder / "b")
    (elsewhere / "back").symlink_to(folder)
    images = open_images(folder, 8, progress=False)
    b = [images.name(i) for i in range(len(images)) if images.labels[i] == 1]
    assert len(b) == len({name.removeprefix(str(folder)) for name in b})
    assert [name for name in b if "circle" in name] == []
    assert {f"{folder}/b/{name}" for name in ("linked/far.png", "near.png", "2.png")} <= set(b)


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_image(folder):
    picture(8, 8).save(folder / "thumbnail.jpg")
    thumbnail = (folder / "thumbnail.jpg").read_bytes()
    (folder / "thumbnail.jpg").unlink()
    path = folder / "a" / "photo.jpg"
    exif = b"Exif\0\0" + thumbnail
    picture(200, 160).save(path, exif=exif)
    assert len(open_images(folder, 8, progress=False)) == 5
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"photo\.jpg: truncated"):
        open_images(folder, 8, check=True, progress=False)
