"""Parse Hugging Face URLs and open data sets."""

import numpy as np
import pytest
from helpers.image_sources import COUNT, hugging_face

from fid_eval.errors import EvaluationError
from fid_eval.sets.hugging_face import HubUrl, is_hub_url, parse_hub_url
from fid_eval.sets.opening import open_set


def test_hugging_face_data_sets_are_read_from_disk_and_by_url(images, labels, tmp_path):
    dataset = hugging_face(images, labels)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "hub" / "train.parquet")
    saved = open_set(tmp_path / "saved")
    named = open_set(f"hf://{tmp_path / 'hub'}?split=train&image=picture&label=kind")
    for opened in (saved, named):
        np.testing.assert_array_equal(opened.images.read(0, COUNT), images)
        np.testing.assert_array_equal(opened.images.labels, labels)
    assert saved.content_hash() == named.content_hash()
    with pytest.raises(EvaluationError, match="no column 'photo' of images; it has picture"):
        open_set(f"hf://{tmp_path / 'hub'}?image=photo")
    with pytest.raises(EvaluationError, match=r"unknown option 'splitt'"):
        open_set(f"hf://{tmp_path / 'hub'}?splitt=train")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("hf://a/b", HubUrl("a/b")),
        ("hf://a/b/c?split=test&streaming=true", HubUrl("a/b", "c", "test", True)),
        ("hf://mnist?image=x&label=y", HubUrl("mnist", image="x", label="y")),
        ("hf://a/b?config=c&streaming=0", HubUrl("a/b", "c")),  # form of 0.1.0
        ("hf:a/b/c@test", HubUrl("a/b", "c", "test")),  # form of 0.1.0
        ("hf-stream:a/b", HubUrl("a/b", streaming=True)),  # form of 0.1.0
        ("hf:///tmp/folder", HubUrl("/tmp/folder")),
        ("hf:./some/folder", HubUrl("./some/folder")),
    ],
)
def test_hub_urls_are_parsed_in_the_new_and_the_old_forms(url, expected):
    assert is_hub_url(url)
    assert parse_hub_url(url) == expected


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("hf://a/b?splitt=test", "unknown option 'splitt'; choose from split,"),
        ("hf://a/b?streaming=yes", "streaming is 'yes'; give true or false"),
        ("hf://?split=test", "no data set is named"),
    ],
)
def test_wrong_hub_urls_are_refused(url, reason):
    with pytest.raises(EvaluationError, match=reason):
        parse_hub_url(url)


def test_hugging_face_datasets_are_an_optional_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(EvaluationError, match="pip install datasets"):
        open_set("hf://mnist?split=test")
