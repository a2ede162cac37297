"""Load extractors with local weights, and use the digits classifier."""

import pytest
import torch
from helpers.projection_extractor import options
from safetensors.torch import save_file

from fid_eval import EvaluationError, evaluate
from fid_eval.networks.extractors import (
    get_extractor,
    network_precision,
)


def test_dinov2_from_a_local_repository_and_weights(tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "facebookresearch_dinov2_main"
    repository.mkdir(parents=True)
    (repository / "hubconf.py").write_text(
        "import torch\n"
        "def dinov2_vitl14(pretrained=True):\n"
        "    assert not pretrained\n"
        "    return torch.nn.Sequential(torch.nn.AvgPool2d(56), torch.nn.Flatten(),\n"
        "                               torch.nn.Linear(48, 6))\n"
    )
    state = {"2.weight": torch.randn(6, 48), "2.bias": torch.zeros(6)}
    save_file(state, tmp_path / "dino.safetensors")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    extractor = get_extractor("dinov2", tmp_path / "dino.safetensors")
    extractor.load(torch.device("cpu"))
    images = torch.full((2, 3, 300, 300), 255, dtype=torch.uint8)
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    expected = white.repeat_interleave(16) @ state["2.weight"].T
    torch.testing.assert_close(extractor(images)["pool"][0], expected, rtol=1e-4, atol=1e-4)


def test_clip_archives_are_run_only_if_their_hash_is_known(tmp_path):
    (tmp_path / "clip.pt").write_bytes(b"something else")
    with pytest.raises(EvaluationError, match="the published weights have 3035c92b"):
        get_extractor("clip", tmp_path / "clip.pt")


def test_the_digit_classifier_recognises_digits():
    from moh_dit.data.digits import load_digit_scans

    scans, labels = load_digit_scans()
    grey = torch.from_numpy(scans / 16 * 255)[:, None]
    images = torch.nn.functional.interpolate(grey, (32, 32), mode="bicubic").round().clamp(0, 255)
    images, labels = images.byte().expand(-1, 3, -1, -1)[:600], labels[:600]
    result = evaluate(images[300:], (images[:300], labels[:300]), extractor="digits", quiet=True)
    assert result["accuracy_digits"] > 0.98
    noise = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    worse = evaluate(images[300:], (noise[:300], labels[:300]), extractor="digits", quiet=True)
    assert worse["accuracy_digits"] < 0.3
    assert worse["fd_digits"] > 10 * result["fd_digits"]


def test_precision_settings_and_random_state_are_restored(sets):
    before = torch.get_rng_state(), torch.backends.cudnn.conv.fp32_precision
    with network_precision("tf32"):
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    evaluate(*sets, bootstrap=2, metrics=["fid", "kid", "fid_infinity"], **options())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.backends.cudnn.conv.fp32_precision == before[1]
