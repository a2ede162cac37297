"""A damaged cache never changes a result: bad chunks are computed again and reported."""

import os
import re
import shutil

import datasets
import pytest
import torch
from helpers.projection_extractor import Projection, draw, options
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fid_eval import atomic_write, evaluate
from fid_eval.feature_cache import load_chunk, save_chunk
from fid_eval.sets.loading import CHUNK


def changed(**tensors):
    """Return a function that changes tensors of a file and keeps its checksum."""

    def change(file):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        save_file({**load_file(file), **tensors}, file, metadata)

    return change


def flip_a_byte(file):
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


def zero_the_data(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def drop_checksum(file):
    save_file(load_file(file), file)


def swap_with_another_set(file):
    others = [other for other in file.parent.parent.rglob("*.safetensors") if other != file]
    shutil.copy(others[0], file)


ATTACKS = {
    "flipped byte": (flip_a_byte, "wrong checksum"),
    "zeroed data": (zero_the_data, "wrong checksum"),
    "truncated": (lambda file: os.truncate(file, 200), "is damaged"),
    "emptied": (lambda file: os.truncate(file, 0), "is damaged"),
    "other text": (lambda file: file.write_text("text " * 100), "is damaged"),
    "other values": (changed(pool=torch.zeros(90, 12)), "wrong checksum"),
    "other shape": (changed(pool=torch.zeros(90, 11)), "wrong checksum"),
    "NaN": (changed(pool=torch.full((90, 12), torch.nan)), "wrong checksum"),
    "no checksum": (drop_checksum, "has no checksum, as files of fid-eval 0.1.0"),
    "features of another set": (swap_with_another_set, "wrong checksum"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_damaged_chunk_is_computed_again_and_reported(name, sets, tmp_path):
    (a, _), _ = sets
    b, _ = draw(90, 5)  # as many images as the reference
    first = evaluate(a, b, cache=tmp_path, **options())
    attack, message = ATTACKS[name]
    file = sorted(tmp_path.rglob("*.safetensors"))[0]
    good = file.read_bytes()
    attack(file)
    again = evaluate(a, b, cache=tmp_path, **options())
    assert again.metrics == first.metrics
    (note,) = set(again.warnings) - set(first.warnings)
    assert f"computed 1 cached chunks again: {file.name}" in note
    assert message in note
    assert file.read_bytes() == good  # written anew
    assert evaluate(a, b, cache=tmp_path, **options()).warnings == first.warnings


@pytest.mark.parametrize(
    ("layers", "count", "dimensions", "message"),
    [
        ({"pool": torch.full((4, 3), torch.inf)}, 4, {}, "holds NaN or infinity"),
        ({"pool": torch.zeros(4, 3)}, 5, {}, r"holds pool of shape \(4, 3\)"),
        ({"pool": torch.zeros(4, 3)}, 4, {"pool": 2}, r"holds pool of shape \(4, 3\)"),
        ({"pool": torch.zeros(4, 3, 2)}, 4, {}, r"holds pool of shape \(4, 3, 2\)"),
        ({"pool": torch.zeros(4, 3, dtype=torch.int32)}, 4, {}, "holds pool"),
        ({"spatial": torch.zeros(4, 3)}, 4, {}, "holds no features"),
    ],
)
def test_a_chunk_with_a_right_checksum_is_checked_as_well(
    layers, count, dimensions, message, tmp_path
):
    save_chunk(tmp_path, 0, layers)
    found, reason = load_chunk(tmp_path, 0, count, dimensions)
    assert found is None
    assert re.search(message, reason)


def test_features_with_nan_are_not_cached(sets, tmp_path):
    (a, _), (b, _) = sets

    class Broken(Projection):
        def forward(self, images):
            return {key: value / 0 for key, value in super().forward(images).items()}

    with pytest.raises(ValueError, match="NaN"):
        evaluate(a, b, cache=tmp_path, **options(extractor=Broken()))
    assert not list(tmp_path.rglob("*.safetensors"))
    assert evaluate(a, b, cache=tmp_path, **options()).metrics


def test_a_cache_that_cannot_be_written_is_reported_and_not_an_error(sets, tmp_path, monkeypatch):
    (a, _), _ = sets
    many, _ = draw(2 * CHUNK, 3)
    expected = evaluate(a, many, **options())

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_write.os, "fsync", full)
    result = evaluate(a, many, cache=tmp_path, **options())
    assert result.metrics == expected.metrics
    assert "samples: the cache could not be written: No space left on device" in " ".join(
        result.warnings
    )


def test_equal_images_with_other_labels_share_features_but_not_labels(tmp_path):
    images, _ = draw(40, 1)
    found = []
    for shift in (0, 1):
        labels = [(index + shift) % 2 for index in range(40)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)})
        rows = {"image": [Image.fromarray(image) for image in images], "label": labels}
        made = datasets.Dataset.from_dict(rows, features=features)
        given = {**options(metrics=["class_fid"]), "cache": tmp_path}
        found.append(evaluate((images, [i % 2 for i in range(40)]), made, **given))
    assert found[0]["class_fd_projection"] == pytest.approx(0, abs=1e-9)
    assert found[1]["class_fd_projection"] > 1e-3


def test_features_of_another_decoding_policy_are_computed_again(sets, tmp_path, monkeypatch):
    reference, samples = ((images, labels) for images, labels in sets)
    evaluate(reference, samples, **options(cache=tmp_path))
    monkeypatch.setattr("fid_eval.feature_cache.CHECKSUM", "sha256, decoding policy 99")
    result = evaluate(reference, samples, **options(cache=tmp_path))
    assert sum("decoded by another policy" in warning for warning in result.warnings) == 2
    assert result.samples["images_per_second"] is not None
