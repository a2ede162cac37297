"""WebDataset tar shards as image sources."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from fid_eval.errors import EvaluationError
from fid_eval.sets.archives import expand_tars
from moh_dit.common.errors import UserError
from moh_dit.data.images import load_batch, open_images, read_batches


def picture(seed, size=12):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return Image.fromarray(pixels)


def png(seed):
    file = io.BytesIO()
    picture(seed).save(file, "png")
    return file.getvalue()


def write_tar(path, files, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    for shard in range(2):
        files = []
        for i in range(3 * shard, 3 * shard + 3):
            files += [(f"train/{i:04}.cls", str(i % 3).encode()), (f"train/{i:04}.png", png(i))]
        write_tar(folder / f"train-{shard:03}.tar", files)
    return folder


def test_counted_shards_are_all_there_and_in_order(tmp_path):
    for name in ("a1-8", "a1-9", "a2-8", "a2-9"):
        (tmp_path / f"{name}.tar").touch()
    found = [path.name for path in expand_tars(f"{tmp_path}/a{{1..2}}-{{8..9}}.tar")]
    assert found == ["a1-8.tar", "a1-9.tar", "a2-8.tar", "a2-9.tar"]
    with pytest.raises(EvaluationError, match=r"no such file: .*a1-10\.tar"):
        expand_tars(f"{tmp_path}/a1-{{9..99999999999}}.tar")
    assert len(expand_tars(f"{tmp_path}/a*-{{8..9}}.tar")) == 4
    (tmp_path / "[v2]").mkdir()  # also a valid pattern
    (tmp_path / "[v2]" / "a1.tar").touch()
    assert len(expand_tars(f"{tmp_path}/[v2]/a{{1..1}}.tar")) == 1
    with pytest.raises(EvaluationError, match="the first number 9 is more than the last, 8"):
        expand_tars(f"{tmp_path}/a1-{{9..8}}.tar")


@pytest.mark.parametrize("where", ["", "train-*.tar", "train-{000..001}.tar", "train-000.tar"])
def test_folder_pattern_and_file(shards, where):
    images = open_images(shards / where, 12, progress=False)
    number = 3 if where == "train-000.tar" else 6
    assert len(images) == number
    assert images.class_names == ["0", "1", "2"]
    np.testing.assert_array_equal(images.labels, np.arange(number) % 3)
    pixels, labels = load_batch(images, range(number)[::-1])  # in any order
    for row, i in enumerate(range(number)[::-1]):
        np.testing.assert_array_equal(pixels[row], np.asarray(picture(i)))
        assert labels[row] == i % 3


def test_through_a_loader_process(shards):
    images = open_images(shards, 8, progress=False)
    ((pixels, _),) = read_batches(images, [[5, 0]], num_workers=1)
    np.testing.assert_array_equal(pixels, load_batch(images, [5, 0])[0])


def test_labels_by_name_and_json(tmp_path):
    files = [
        ("a.png", png(0)),
        ("a.json", json.dumps({"label": "dog", "width": 12}).encode()),
        ("b.seg.png", b"another file of the sample"),
        ("b.png", png(1)),
        ("b.cls", b"cat\n"),
        ("readme.txt", b"no image, no sample"),
    ]
    write_tar(tmp_path / "x.tar", files)
    images = open_images(tmp_path / "x.tar", 12, progress=False)
    assert images.class_names == ["cat", "dog"]
    np.testing.assert_array_equal(images.labels, [1, 0])
    (tmp_path / "classes.json").write_text('["dog", "horse", "cat"]')
    images = open_images(tmp_path, 12, progress=False)
    assert images.class_names == ["dog", "horse", "cat"]
    np.testing.assert_array_equal(images.labels, [0, 2])
    (tmp_path / "classes.json").write_text('["dog"]')
    with pytest.raises(UserError, match=r"label 'cat' for b.png; classes\.json does not name"):
        open_images(tmp_path, 12, progress=False)


def test_class_numbers_are_named_by_classes_json(shards):
    (shards / "classes.json").write_text('["x", "y", "z", "unused"]')
    images = open_images(shards, 8, progress=False)
    assert images.class_names == ["x", "y", "z", "unused"]
    np.testing.assert_array_equal(images.labels, np.arange(6) % 3)
    (shards / "classes.json").write_text('["x", "y"]')
    with pytest.raises(UserError, match=r"label '2' for .*0002.png; classes\.json names only 2"):
        open_images(shards, 8, progress=False)


def test_bad_shards_are_named(tmp_path):
    some = [("a.png", png(0)), ("b.png", png(1)), ("b.cls", b"0")]
    write_tar(tmp_path / "unlabelled.tar", some)
    with pytest.raises(UserError, match=r"unlabelled\.tar: a\.png has no label"):
        open_images(tmp_path / "unlabelled.tar", 8, progress=False)
    write_tar(tmp_path / "empty.tar", [("readme.txt", b"")])
    with pytest.raises(UserError, match=r"empty\.tar: holds no images"):
        open_images(tmp_path / "empty.tar", 8, progress=False)
    write_tar(tmp_path / "binary.tar", [("a.png", png(0)), ("a.cls", b"\xff\xfe")])
    with pytest.raises(UserError, match=r"binary\.tar: a\.cls is not UTF-8 text"):
        open_images(tmp_path / "binary.tar", 8, progress=False)
    write_tar(tmp_path / "negative.tar", [("a.png", png(0)), ("a.cls", b"-1")])
    with pytest.raises(UserError, match=r"label '-1' for a.png; class numbers start at 0"):
        open_images(tmp_path / "negative.tar", 8, progress=False)


def test_unreadable_images_are_named_or_skipped(shards):
    write_tar(shards / "train-999.tar", [("bad.jpg", b"not an image"), ("bad.cls", b"0")])
    with pytest.raises(UserError, match=r"bad\.jpg: not an image.* skip_unreadable"):
        load_batch(open_images(shards, 8, progress=False), [6])
    with pytest.raises(UserError, match=r"1 of 7 images cannot be used \(bad\.jpg: not an image"):
        open_images(shards, 8, check=True, progress=False)
    images = open_images(shards, 8, skip_unreadable=True, progress=False)
    assert len(images) == 6
    np.testing.assert_array_equal(load_batch(images, [4])[0][0].shape, (8, 8, 3))


def test_fingerprint_follows_the_content(shards):
    first = open_images(shards, 8, progress=False).fingerprint()
    assert open_images(shards, 8, progress=False).fingerprint() == first
    (shards / "classes.json").write_text('["x", "y", "z"]')
    assert open_images(shards, 8, progress=False).fingerprint() != first
