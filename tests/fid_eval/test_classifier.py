"""Train a small classifier with its command, and use it as an extractor."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fid_eval import evaluate
from fid_eval.__main__ import main
from fid_eval.networks.classifier import load_classifier, residual_classifier
from fid_eval.networks.classifier_training import AUGMENTATION_NUMBERS, augment
from fid_eval.networks.extractors import DIGITS_WEIGHTS, get_extractor
from fid_eval.networks.weight_files import load_state

SMALL = ["--epochs", "12", "--width", "16", "--batch_size", "16"]


def stripes(count, seed=0):
    """Return 16 × 16 images of horizontal (label 0) and vertical (label 1) stripes."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count)
    rows = generator.integers(0, 256, (count, 8, 1, 1)).astype(np.uint8).repeat(2, 1)
    images = np.broadcast_to(rows[..., None, :], (count, 16, 16, 1, 1))[..., 0].repeat(3, 3)
    return np.where(labels[:, None, None, None] == 1, images.swapaxes(1, 2), images), labels


def write_folder(root, images, labels, names=("rows", "columns")):
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = root / names[label] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "stripes.npz"
    np.savez(path, *stripes(120))
    return path


def test_a_trained_classifier_is_an_extractor_for_its_data(data, tmp_path, capsys):
    output = tmp_path / "stripes.safetensors"
    arguments = ["classifier", str(data), "--output", str(output), *SMALL]
    assert main(arguments) == 0
    assert "held-out accuracy" in capsys.readouterr().out
    _, metadata = load_classifier(output)
    assert metadata["held_out_images"] == 24
    assert metadata["held_out_accuracy"] > 0.9
    assert "--held_out 0.2 --epochs 12 --seed 0 --batch_size 16 --width 16" in metadata["command"]

    before = output.read_bytes()
    assert main(arguments) == 2
    assert "is not overwritten" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert main([*arguments[:3], str(tmp_path / "again.safetensors"), *SMALL]) == 0
    first, again = load_state(output), load_state(tmp_path / "again.safetensors")
    assert all(torch.equal(first[key], again[key]) for key in first)

    result = evaluate(str(data), str(data), extractor="classifier", weights=output, quiet=True)
    assert result["accuracy_stripes"] > 0.9
    assert result["fd_stripes"] == pytest.approx(0, abs=1e-6)
    json.dumps(result.to_dict())


def test_held_out_images_come_from_a_folder_or_a_list(tmp_path, capsys):
    images, labels = stripes(60)
    folder = write_folder(tmp_path / "train", images, labels)
    other = write_folder(tmp_path / "other", *stripes(20, seed=1))
    Image.fromarray(images[0]).save(other / "rows" / "copy.png")
    command = ["classifier", str(folder), *SMALL, "--output"]
    assert main([*command, str(tmp_path / "a.safetensors"), "--held_out", str(other)]) == 0
    printed = capsys.readouterr()
    assert "60 training images and 21 held-out images of 2 classes, 16×16 px" in printed.out
    assert "warning: 1 of 21 held-out images are also training images" in printed.err
    assert load_classifier(tmp_path / "a.safetensors")[1]["held_out_accuracy"] > 0.9

    listed = tmp_path / "list.txt"
    rows = [path.name for path in (folder / "rows").iterdir()][:10]
    listed.write_text("".join(f"rows/{name}\n" for name in rows))
    assert main([*command, str(tmp_path / "b.safetensors"), "--held_out", str(listed)]) == 0
    printed = capsys.readouterr()
    assert "50 training images and 10 held-out images" in printed.out
    assert "warning: no held-out images of class columns" in printed.err

    refused = [*command, str(tmp_path / "c.safetensors"), "--held_out"]
    everything = "".join(f"{number}\n" for number in range(60))
    for text, message in (
        ("60\n", "1 lines name no image, for example '60'"),
        ("\n", "names no image"),
        (everything, "names all images, so none is left to train on"),
    ):
        listed.write_text(text)
        assert main([*refused, str(listed)]) == 2
        assert message in capsys.readouterr().err
    write_folder(tmp_path / "more", *stripes(20, seed=2), names=("rows", "dots"))
    for value, message in (
        ("1.5", "1.5 is not a share between 0 and 1"),
        ("nowhere", "nowhere: no such file or folder"),
        (str(tmp_path / "more"), "has the class dots, which the training images lack"),
    ):
        assert main([*refused, value]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([np.zeros((20, 8, 8, 3), np.uint8)], "has no labels ≥ 0"),
        ([np.zeros((20, 8, 8, 3)), np.zeros(20, int)], "uint8 is needed"),
        ([np.zeros((20, 8, 8, 3), np.uint8), np.zeros(3, int)], "labels of shape (3,)"),
        ([np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, int)], "too few"),
    ],
)
def test_unsuitable_training_data_is_refused(arrays, message, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", *arrays)
    output = str(tmp_path / "o.safetensors")
    assert main(["classifier", str(tmp_path / "a.npz"), "--output", output]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o.safetensors").exists()


def test_augmentation_depends_on_its_numbers_and_mirrors_only_on_request():
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    numbers = torch.rand(4, AUGMENTATION_NUMBERS, generator=torch.Generator().manual_seed(0))
    first = augment(images, numbers, flip=True)
    assert first.shape == images.shape
    assert first.abs().max() <= 1
    assert torch.equal(first, augment(images, numbers, flip=True))
    unchanged = torch.full((4, AUGMENTATION_NUMBERS), 0.5)
    unchanged[:, 5] = 0.6  # contrast 1
    plain = images.float() / 127.5 - 1
    torch.testing.assert_close(augment(images, unchanged, flip=True), plain, atol=1e-4, rtol=0)
    unchanged[:2, 2] = 0.0
    mirrored = torch.cat((plain[:2].flip(3), plain[2:]))
    torch.testing.assert_close(augment(images, unchanged, flip=True), mirrored, atol=1e-4, rtol=0)
    torch.testing.assert_close(augment(images, unchanged, flip=False), plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("side", "stride"), [(16, 2), (32, 4), (64, 8), (128, 16), (256, 32)])
def test_the_last_map_of_a_residual_network_has_8_by_8_positions(side, stride):
    model = residual_classifier(side, side, 64, 3).eval()
    assert model.stride == stride
    features = model(torch.zeros(1, 3, side, side, dtype=torch.uint8))
    assert {key: value.shape[1] for key, value in features.items()} == {"pool": 64, "spatial": 256}
    assert model.dimensions(side, side) == {"pool": 64, "spatial": 256}


def test_folding_the_normalization_changes_only_the_rounding(data, tmp_path):
    output = tmp_path / "folded.safetensors"
    assert main(["classifier", str(data), "--output", str(output), *SMALL]) == 0
    folded, _ = load_classifier(output)
    trained = residual_classifier(16, 16, 16, 2).eval()
    trained.load_state_dict(load_state(output))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    images = torch.from_numpy(stripes(8)[0]).permute(0, 3, 1, 2)
    torch.testing.assert_close(folded(images), trained(images), rtol=1e-4, atol=1e-4)


def test_the_built_in_weights_are_those_of_version_0_1_0():
    """Their bytes, the names of their tensors and their features do not change."""
    sha256 = hashlib.sha256(DIGITS_WEIGHTS.read_bytes()).hexdigest()
    assert sha256 == "1b6314aafff77c695f37955a11a5758726a58d9c9a4e284c343773c0752bd48f"
    extractor = get_extractor("digits")
    state = load_state(DIGITS_WEIGHTS)
    assert extractor.dimensions == {"pool": 64, "spatial": 256}
    images = torch.arange(2 * 3 * 32 * 32).remainder(251).byte().view(2, 3, 32, 32)
    x = images.float() / 127.5 - 1
    for layer, stride in enumerate((1, 2, 1, 2, 1)):
        name = f"trunk.{3 * layer}"
        x = torch.nn.functional.conv2d(x, state[f"{name}.weight"], None, stride, 1)
        norm = [state[f"trunk.{3 * layer + 1}.{key}"]
                for key in ("running_mean", "running_var", "weight", "bias")]  # fmt: skip
        x = torch.nn.functional.batch_norm(x, *norm).relu()
    features = extractor.build()(images)
    assert torch.equal(features["pool"], x.mean((2, 3)))
    assert torch.equal(features["spatial"], x[:, :4].permute(0, 2, 3, 1).flatten(1))
