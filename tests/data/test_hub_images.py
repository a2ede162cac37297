"""Hugging Face data sets as image sources (the ``datasets`` library comes with the dev extra)."""

import datasets
import numpy as np
import pytest
from PIL import Image

from moh_dit.common.errors import UserError
from moh_dit.data.images import load_batch, open_images, read_batches


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def pictures(number):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)) for _ in range(number)]


@pytest.fixture
def saved(tmp_path):
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    rows = {"id": range(5), "picture": pictures(5), "kind": [0, 1, 1, 0, 1]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(tmp_path / "dict")
    return tmp_path


def test_saved_data_set(saved):
    images = open_images(f"hf://{saved / 'one'}", 12, progress=False)
    assert images.class_names == ["cat", "dog"]
    np.testing.assert_array_equal(images.labels, [0, 1, 1, 0, 1])
    pixels, labels = load_batch(images, [4, 0])
    np.testing.assert_array_equal(pixels[0], np.asarray(pictures(5)[4]))
    np.testing.assert_array_equal(labels, [1, 0])
    assert images.fingerprint() == open_images(f"hf://{saved / 'one'}", 12).fingerprint()
    ((again, _),) = read_batches(images, [[4, 0]], num_workers=1)
    np.testing.assert_array_equal(again, pixels)


def test_splits(saved):
    assert len(open_images(f"hf://{saved / 'dict'}", 8, progress=False)) == 5
    assert len(open_images(f"hf://{saved / 'dict'}?split=test", 8, progress=False)) == 1
    with pytest.raises(UserError, match="nothing"):
        open_images(f"hf://{saved / 'dict'}?split=nothing", 8)


def test_image_folder_read_by_datasets(tmp_path):
    for i, picture in enumerate(pictures(4)):
        path = tmp_path / "data" / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    images = open_images(f"hf://{tmp_path / 'data'}", 12, progress=False)
    assert images.class_names == ["a", "b"]
    assert len(images) == 4


def test_mistakes(saved):
    import datasets

    with pytest.raises(UserError, match="nobody/nothing: the data set cannot be opened"):
        open_images("hf://nobody/nothing", 8)
    plain = datasets.Dataset.from_dict({"text": ["x"]})
    plain.save_to_disk(saved / "plain")
    with pytest.raises(UserError, match=r"no column of images .*; it has text \(Value\)"):
        open_images(f"hf://{saved / 'plain'}", 8)
    data = datasets.load_from_disk(saved / "one")
    data = data.map(lambda row: {"kind": -1})
    data.save_to_disk(saved / "unlabelled")
    with pytest.raises(UserError, match=r"has no labels .*as many test splits"):
        open_images(f"hf://{saved / 'unlabelled'}", 8)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        open_images("hf://ylecun/mnist", 8)


def test_the_syntax_of_version_0_1_is_accepted(saved):
    assert len(open_images(f"hf:{saved / 'dict'}", 8, progress=False)) == 5
    assert len(open_images(f"hf:{saved / 'dict'}@test", 8, progress=False)) == 1


def test_columns_are_chosen_by_the_url(saved):
    url = f"hf://{saved / 'one'}?image=picture&label=kind"
    assert len(open_images(url, 8, progress=False)) == 5
    numbered = open_images(f"hf://{saved / 'one'}?label=id", 8, progress=False)
    assert numbered.class_names == ["0", "1", "2", "3", "4"]
    with pytest.raises(UserError, match=r"no column 'picture' of labels; it has id \(Value\), pic"):
        open_images(f"hf://{saved / 'one'}?label=picture", 8)
    with pytest.raises(UserError, match="unknown option 'splitt'"):
        open_images(f"hf://{saved / 'one'}?splitt=test", 8)
