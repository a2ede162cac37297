"""Reconstruction metrics against formulas in NumPy and torchvision's own networks."""

import json

import numpy as np
import pytest
import torch
from helpers.projection_extractor import Projection, draw, features_of
from PIL import Image
from safetensors.torch import save_file

from fid_eval import EvaluationError
from fid_eval.__main__ import main
from fid_eval.metrics.adm import frechet_distance_of_features
from fid_eval.networks.lpips import load_lpips
from fid_eval.reconstruction import evaluate_reconstructions

pytest.importorskip("torchmetrics")
RUN = {"device": "cpu", "quiet": True}


@pytest.fixture(scope="module")
def pair():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (7, 24, 20, 3), np.uint8)
    noise = generator.integers(-20, 21, images.shape)
    return images, (images.astype(int) + noise).clip(0, 255).astype(np.uint8)


def ssim(a, b):
    """Wang et al. 2004, equation 13, averaged over the pixels of one channel; reflected borders."""
    steps = np.arange(11) - 5
    line = np.exp(-(steps**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def average(x):
        x = np.pad(x, 5, mode="reflect")
        return (np.lib.stride_tricks.sliding_window_view(x, (11, 11)) * window).sum((2, 3))

    mean_a, mean_b = average(a), average(b)
    var_a, var_b = average(a * a) - mean_a**2, average(b * b) - mean_b**2
    covariance = average(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()


def test_psnr_and_ssim_equal_their_formulas(pair):
    a, b = (images.astype(float) / 255 for images in pair)
    result = evaluate_reconstructions(*pair, metrics=["psnr", "ssim"], batch_size=3, **RUN)
    errors = ((a - b) ** 2).mean((1, 2, 3))
    assert result["psnr"] == pytest.approx((-10 * np.log10(errors)).mean(), rel=1e-5)
    each = [ssim(x[..., c], y[..., c]) for x, y in zip(a, b, strict=True) for c in range(3)]
    assert result["ssim"] == pytest.approx(np.mean(each), abs=1e-4)
    assert result.higher_is_better == {"psnr": True, "ssim": True}


def save_backbone(path, name):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    features = getattr(torchvision.models, name)(weights=None).features.eval()
    save_file({f"features.{key}": value for key, value in features.state_dict().items()}, path)
    return features


def test_lpips_is_the_weighted_distance_of_normalised_features(tmp_path):
    backbone, layers = "alex", (1, 4, 7, 9, 11)  # indices of the five ReLUs in torchvision
    features = save_backbone(tmp_path / "net.safetensors", "alexnet")
    from torchmetrics.functional.image import lpips as module

    linear = torch.load(
        f"{module.__file__.rpartition('/')[0]}/lpips_models/{backbone}.pth",
        map_location="cpu",
        weights_only=True,
    )
    from fid_eval.sets.hashing import file_sha256

    sha256 = file_sha256(tmp_path / "net.safetensors")
    network, identity = load_lpips(backbone, tmp_path / "net.safetensors", sha256)
    assert identity == sha256
    a, b = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))

    def maps(images):  # Constants of richzhang/PerceptualSimilarity: shift and scale of [-1, 1].
        x = (2 * images - 1 - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / (
            torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        )
        found = []
        for index, layer in enumerate(features):
            x = layer(x)
            if index in layers:
                found.append(x.double() / x.double().norm(dim=1, keepdim=True))
        return found

    with torch.no_grad():
        expected = sum(
            ((x - y) ** 2 * linear[f"lin{i}.model.1.weight"].double()).sum(1).mean((1, 2))
            for i, (x, y) in enumerate(zip(maps(a), maps(b), strict=True))
        )
        found = network(2 * a - 1, 2 * b - 1).flatten()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_wrong_backbones_are_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(EvaluationError, match="the published weights have 397923af"):
        load_lpips("vgg", tmp_path / "other.safetensors")
    from fid_eval.sets.hashing import file_sha256

    with pytest.raises(EvaluationError, match="no weights for the backbone"):
        load_lpips(
            "alex", tmp_path / "other.safetensors", file_sha256(tmp_path / "other.safetensors")
        )


def test_rfid_is_the_distance_to_the_same_images():
    images, others = draw(60, 0)[0], draw(60, 1)[0]
    result = evaluate_reconstructions(
        images, others, metrics=["rfid"], extractor=Projection(), batch_size=7, **RUN
    )
    expected = frechet_distance_of_features(features_of(images), features_of(others))
    assert result.metrics == {"rfd_projection": pytest.approx(expected, rel=1e-6)}
    assert result.extractors["projection"]["preprocessing"] == "its own"


def test_a_function_reconstructs_batches(pair):
    images, decoded = pair
    shown = []

    def reconstruct(batch):
        start = sum(map(len, shown))
        shown.append(batch)
        return torch.from_numpy(decoded[start : start + len(batch)]).permute(0, 3, 1, 2)

    chosen = {"metrics": ["psnr", "ssim"], "batch_size": 3, **RUN}
    by_function = evaluate_reconstructions(images, reconstruct, **chosen)
    assert by_function.metrics == evaluate_reconstructions(images, decoded, **chosen).metrics


def test_identical_pairs_are_counted(pair):
    images, decoded = pair
    some = decoded.copy()
    some[:2] = images[:2]
    chosen = {"metrics": ["psnr"], **RUN}
    result = evaluate_reconstructions(images, some, **chosen)
    expected = evaluate_reconstructions(images[2:], decoded[2:], **chosen)
    assert result["psnr"] == pytest.approx(expected["psnr"])
    assert "2 of 7 pairs are identical" in result.warnings[0]
    assert evaluate_reconstructions(images, images, **chosen)["psnr"] == np.inf


def save_folder(folder, images, names):
    folder.mkdir()
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(folder / name)
    return str(folder)


def test_files_are_paired_by_name(pair, tmp_path, capsys):
    images, decoded = pair
    names = [f"{i}.png" for i in range(7)]
    before = save_folder(tmp_path / "before", images, names)
    after = save_folder(tmp_path / "after", decoded, [n.replace("png", "bmp") for n in names])
    other = save_folder(tmp_path / "other", decoded, ["x" + n for n in names])
    few = save_folder(tmp_path / "few", decoded[:4], names[:4])
    options = ["--metrics", "psnr,ssim", "--device", "cpu", "--quiet"]
    output = tmp_path / "out.json"
    command = ["reconstruction", before, after, *options]
    assert main([*command, "--output", str(output)]) == 0
    found = json.loads(output.read_text())["sets"][0]["metrics"]
    expected = evaluate_reconstructions(*pair, metrics=["psnr", "ssim"], **RUN)
    assert found == pytest.approx(expected.metrics)
    assert "psnr" in capsys.readouterr().out
    for arguments, message in (
        ([*command, "--output", str(output)], "exists"),
        (["reconstruction", before, other, *options], "x0 would be paired with 0 of"),
        (["reconstruction", before, few, *options], "has 7 images and"),
        (["reconstruction", before, after, "--metrics", "PSRN"], "did you mean 'psnr'"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_small_or_different_images_are_refused(pair):
    small = np.zeros((4, 5, 8, 3), np.uint8)
    with pytest.raises(EvaluationError, match="SSIM needs images of at least 6 pixels"):
        evaluate_reconstructions(small, small, metrics=["ssim"], **RUN)
    with pytest.raises(EvaluationError, match="reconstructions of shape"):
        evaluate_reconstructions(small, np.zeros((4, 9, 8, 3), np.uint8), metrics=["psnr"], **RUN)
