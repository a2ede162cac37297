"""The trainer and ``fid_eval`` read the same images, labels and classes, or give the same error."""

import re

import numpy as np
import pytest
from helpers.odd_sets import ARRAYS, CLASSES, SETS, png, write_folder, write_tar
from PIL import Image

from fid_eval.__main__ import main as fid_eval
from fid_eval.errors import EvaluationError
from fid_eval.sets.opening import open_set
from moh_dit.common.errors import UserError
from moh_dit.data.images import load_batch, open_images

SIDE = ARRAYS.shape[1]


@pytest.fixture(autouse=True)
def own_caches(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("name", [name for name in SETS if len(SETS[name]) == 3])
def test_both_read_the_same(name, tmp_path):
    write, labels, classes = SETS[name]
    path = str(write(tmp_path))
    evaluated, trained = open_set(path), open_images(path, SIDE, progress=False)
    pixels, numbers = load_batch(trained, range(len(trained)))
    order = [int((image == ARRAYS).all((1, 2, 3)).argmax()) for image in pixels]
    assert sorted(order) == list(range(len(ARRAYS)))
    np.testing.assert_array_equal(evaluated.images.read(0, len(ARRAYS)), pixels)
    if labels is None:
        assert evaluated.labels is None
        np.testing.assert_array_equal(numbers, 0)
        assert trained.class_names == ["images"]
    else:
        np.testing.assert_array_equal(numbers, np.array(labels)[order])
        np.testing.assert_array_equal(evaluated.labels, numbers)
        assert trained.class_names == evaluated.names_of_classes() == classes


@pytest.mark.parametrize("name", [name for name in SETS if len(SETS[name]) == 2])
def test_both_give_the_same_error_of_one_line(name, tmp_path, capsys):
    write, message = SETS[name]
    path = str(write(tmp_path))
    with pytest.raises(EvaluationError, match=message) as evaluated:
        open_set(path)
    with pytest.raises(UserError, match=message) as trained:
        open_images(path, SIDE, check=True, progress=False)
    assert "\n" not in f"{evaluated.value}{trained.value}"
    capsys.readouterr()
    assert fid_eval([path, "--check", "--quiet"]) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed)
    assert printed.count("\n") == 1


def test_a_class_in_a_split_or_an_archive_is_chosen_by_its_path(tmp_path):
    write, _ = SETS["two_splits"]
    write(tmp_path)
    assert len(open_images(tmp_path / "val", SIDE, progress=False)) == 4
    (tmp_path / "zip").mkdir()
    archive = SETS["zip_of_class_folders"][0](tmp_path / "zip")
    inner = open_set(f"{archive}/train/a")
    assert inner.images.count == 4
    assert open_images(f"{archive}/train", SIDE, progress=False).class_names == ["a", "b"]
    assert inner.content_hash() != open_set(f"{archive}/train/b").content_hash()
    with pytest.raises(EvaluationError, match="has no images in a folder c"):
        open_set(f"{archive}/train/c")


def test_what_is_skipped_and_chosen_is_said(tmp_path):
    two = tmp_path / "two"
    two.mkdir()
    members = [
        member for i in range(3)
        for member in ((f"{i}.png", png(i)), (f"{i}.mask.png", png(i + 4)), (f"{i}.cls", b"1"))
    ]  # fmt: skip
    opened = open_set(write_tar(two, [*members, *members[:2]]))
    np.testing.assert_array_equal(opened.images.read(0, 3), ARRAYS[:3])
    remarks = " ".join(opened.remarks())
    assert "2 members are stored twice; the last one counts" in remarks
    assert "3 samples have several images; 0.png counts and not 0.mask.png" in remarks
    stray = SETS["stray_files_beside_class_folders"][0](tmp_path / "stray")
    assert "3 with other endings (" in open_set(stray).remarks()[0]


def test_a_tar_cut_between_members_is_a_warning_and_an_error_if_strict(tmp_path, capsys):
    path = SETS["tar"][0](tmp_path)
    data = path.read_bytes()
    end = data.rindex(b"006.cls") + 1024  # the header and the block of this member
    path.write_bytes(data[:end])
    message = r"set.tar has no end mark, so members after 006.cls may be lost"
    assert re.search(message, open_set(path).remarks()[0])
    assert fid_eval([str(path), "--check", "--quiet", "--strict"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_strict_and_background_reach_every_image(tmp_path, capsys):
    for index in range(2):
        image = Image.fromarray(ARRAYS[index]).convert("RGBA")
        image.putalpha(0)
        image.save(tmp_path / f"{index}.png")
    assert fid_eval([str(tmp_path), "--check", "--quiet"]) == 0
    assert "conversions: 2 × transparency composited" in capsys.readouterr().out
    assert fid_eval([str(tmp_path), "--check", "--quiet", "--strict"]) == 2
    assert "--strict refuses it: transparency composited" in capsys.readouterr().err


def test_the_order_of_an_earlier_run_is_kept_for_the_same_folders(tmp_path):
    path = SETS["class_folders_named_by_numbers"][0](tmp_path)
    earlier = sorted(folder.name for folder in path.iterdir())
    assert earlier[:4] == ["0", "1", "10", "100"]
    images = open_images(path, SIDE, earlier_classes=earlier, progress=False)
    assert images.class_names == earlier
    for index in range(len(images)):
        assert images.name(index).endswith(f"/{earlier[images.labels[index]]}.png")
    others = open_images(path, SIDE, earlier_classes=["x"], progress=False)
    assert others.class_names == ["0", "1", "2", "3", "9", "10", "11", "100"]


def test_samples_of_a_few_classes_have_the_labels_of_the_reference(tmp_path):
    reference = open_set(write_folder(tmp_path / "a", CLASSES))
    one = open_set(write_folder(tmp_path / "b", ["b/0.png", "b/1.png"]))
    assert one.labels is None  # one folder alone is a set without classes
    one.number_classes_as(reference)
    np.testing.assert_array_equal(one.labels, [1, 1])
    few = open_set(write_folder(tmp_path / "c", ["b/0.png", "c/1.png", "b/2.png"]))
    few.number_classes_as(reference)
    assert "(c is missing there), so labels are compared by number" in few.notes[0]
    larger = open_set(write_folder(tmp_path / "d", ["a/0.png", "b/1.png", "c/2.png"]))
    few.notes.clear()
    few.number_classes_as(larger)
    np.testing.assert_array_equal(few.labels, [1, 1, 2])
    assert few.class_names == ["a", "b", "c"]
    assert not few.notes


def test_a_kept_listing_is_valid_until_a_folder_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("FID_EVAL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("fid_eval.sets.folders.CACHED_FROM", 1)
    monkeypatch.setattr("fid_eval.sets.folders.SETTLED", -(10**12))
    root = write_folder(tmp_path / "set", CLASSES)
    (root / "Thumbs.db").write_text("")
    first = open_set(root)
    assert len(list((tmp_path / "home" / "listings").iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr("fid_eval.sets.folders._walk", None)  # not called
        again = open_set(root)
        images = open_images(root, SIDE, progress=False)
    assert list(again.images.names) == list(first.images.names)
    assert again.remarks() == first.remarks()
    assert images.fingerprint() == open_images(root, SIDE, progress=False).fingerprint()
    (root / "b" / "new.png").write_bytes(png(0))
    assert open_set(root).images.count == len(CLASSES) + 1
    (next((tmp_path / "home" / "listings").iterdir())).write_bytes(b"damaged")
    assert open_set(root).images.count == len(CLASSES) + 1


def test_rows_without_an_image_are_skipped_if_asked(tmp_path, capsys):
    path = SETS["dataset_with_a_missing_image"][0](tmp_path)
    images = open_images(path, SIDE, skip_unreadable=True, progress=False)
    np.testing.assert_array_equal(load_batch(images, range(7))[1], images.labels)
    assert "(row 7: the row has no image); they are skipped" in capsys.readouterr().err
