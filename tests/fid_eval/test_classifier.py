"""Train a small classifier with its command, and use it as an extractor."""

import json

import numpy as np
import pytest
import torch

from fid_eval import evaluate
from fid_eval.__main__ import main
from fid_eval.networks.classifier import augment, load_classifier


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Make 16 × 16 images of horizontal and vertical stripes."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 120)
    rows = generator.integers(0, 256, (120, 8, 1, 1)).astype(np.uint8).repeat(2, 1)
    images = np.broadcast_to(rows[..., None, :], (120, 16, 16, 1, 1))[..., 0].repeat(3, 3)
    images = np.where(labels[:, None, None, None] == 1, images.swapaxes(1, 2), images)
    path = tmp_path_factory.mktemp("data") / "stripes.npz"
    np.savez(path, images, labels)
    return path


def test_a_trained_classifier_is_an_extractor_for_its_data(data, tmp_path, capsys):
    output = tmp_path / "stripes.safetensors"
    arguments = ["classifier", str(data), "--output", str(output), "--epochs", "6", "--width", "16"]
    assert main(arguments) == 0
    assert "held-out accuracy" in capsys.readouterr().out
    _, metadata = load_classifier(output)
    assert metadata["held_out_images"] == 24
    assert metadata["held_out_accuracy"] > 0.9
    assert "--epochs 6 --seed 0 --width 16" in metadata["command"]

    before = output.read_bytes()
    assert main(arguments) == 2
    assert "is not overwritten" in capsys.readouterr().err
    assert output.read_bytes() == before

    result = evaluate(str(data), str(data), extractor="classifier", weights=output, quiet=True)
    assert result["accuracy_stripes"] > 0.9
    assert result["fd_stripes"] == pytest.approx(0, abs=1e-6)
    json.dumps(result.to_dict())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([np.zeros((20, 8, 8, 3), np.uint8)], "needs images arr_0 and labels arr_1"),
        ([np.zeros((20, 8, 8, 3)), np.zeros(20, int)], "uint8 (N, H, W, 3) is needed"),
        ([np.zeros((20, 8, 8, 3), np.uint8), np.zeros(3, int)], "must be 20 labels"),
        ([np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, int)], "too few"),
    ],
)
def test_unsuitable_training_data_is_refused(arrays, message, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", *arrays)
    output = str(tmp_path / "o.safetensors")
    assert main(["classifier", str(tmp_path / "a.npz"), "--output", output]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o.safetensors").exists()


def test_augmentation_keeps_shape_and_dtype_and_depends_only_on_its_generator():
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    first, again = (augment(images, torch.Generator().manual_seed(0)) for _ in range(2))
    assert first.dtype == torch.uint8
    assert first.shape == images.shape
    assert torch.equal(first, again)
    assert not torch.equal(first, images)
