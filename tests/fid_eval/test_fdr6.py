"""FDr6: its networks, its divisors and its mean."""

import json

import numpy as np
import pytest
import torch
from helpers.projection_extractor import Projection, draw
from PIL import Image
from safetensors.torch import save_file

from fid_eval import EvaluationError, evaluate
from fid_eval.__main__ import main
from fid_eval.fdr6 import PUBLISHED_DIVISORS, load_divisors
from fid_eval.networks import extractors, timm_models
from fid_eval.networks.timm_models import TimmFeatures, TimmModel

timm = pytest.importorskip("timm")
SIZE = 40  # not a multiple of the patch size 16
TINY = {
    "class token": TimmModel("test_vit.r160_in1k", SIZE, "class token"),
    "attention pooling": TimmModel("test_vit3.r160_in1k", SIZE, "attention pooling"),
    "spatial mean": TimmModel("test_convnext.r160_in1k", SIZE, "spatial mean"),
}


def random_state(model):
    torch.manual_seed(0)
    return timm.create_model(model.name, num_classes=1000).state_dict()  # as published: with head


@pytest.mark.parametrize("pooling", TINY)
def test_features_equal_those_of_timm_on_images_that_pillow_resized(pooling):
    model = TINY[pooling]
    state = random_state(model)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    found = TimmFeatures(model, dict(state)).eval()(torch.from_numpy(images).permute(0, 3, 1, 2))

    config = timm.get_pretrained_cfg(model.name)
    planes = [
        [
            np.asarray(Image.fromarray(image[..., c].astype(np.float32)).resize(
                (SIZE, SIZE), Image.Resampling.BICUBIC
            ))
            for c in range(3)
        ]
        for image in images
    ]  # fmt: skip
    mean, deviation = (np.array(v).reshape(3, 1, 1) for v in (config.mean, config.std))
    pixels = torch.from_numpy((np.array(planes) / 255 - mean) / deviation).float()
    options = {} if pooling == "spatial mean" else dict(dynamic_img_size=True, dynamic_img_pad=True)
    net = timm.create_model(model.name, num_classes=1000, **options).eval()
    net.load_state_dict(state)
    features = net.forward_features(pixels)
    expected = {
        "class token": lambda: features[:, 0],
        "attention pooling": lambda: net.attn_pool(features),
        "spatial mean": lambda: features.flatten(2).mean(2),
    }[pooling]()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_networks_of_fdr6_exist_in_timm_with_the_poolings_they_need():
    for model in timm_models.MODELS.values():
        assert timm.is_model(model.name.split(".")[0])
        assert timm.get_pretrained_cfg(model.name).hf_hub_id == f"timm/{model.name}"


def test_weights_come_by_path_and_are_hashed(tmp_path, monkeypatch):
    model = TINY["class token"]
    monkeypatch.setitem(timm_models.MODELS, "r6-mae", model)
    save_file(random_state(model), tmp_path / "mae.safetensors")
    cut = dict(list(random_state(model).items())[:-4])
    save_file(cut, tmp_path / "other.safetensors")
    images = draw(60, 0)[0], draw(60, 1)[0]
    run = {"metrics": ["fd_r6_mae"], "device": "cpu", "quiet": True}
    result = evaluate(*images, weights={"r6-mae": str(tmp_path / "mae.safetensors")}, **run)
    assert list(result.metrics) == ["fd_r6_mae"]
    assert len(result.extractors["r6-mae"]["sha256"]) == 64
    with pytest.raises(EvaluationError, match="not those of test_vit"):
        evaluate(*images, weights={"r6-mae": str(tmp_path / "other.safetensors")}, **run)


def test_missing_weights_name_the_repository_and_the_option(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EvaluationError, match=r"timm/vit_large_patch16_224.mae .*--weights"):
        extractors.get_extractor("r6-mae")


@pytest.fixture
def representations(monkeypatch):
    """Replace the six networks by random projections."""

    def fake(name, weights, sha256):
        extractor = extractors.wrap_extractor(Projection(len(name)), name)
        extractor.name = name
        extractor.label = None if name == "inception" else extractors.label_of(name)
        return extractor

    for name in PUBLISHED_DIVISORS:
        monkeypatch.setitem(extractors.EXTRACTORS, name, fake)


def save_sets(folder, **seeds):
    for name, seed in seeds.items():
        np.savez(folder / f"{name}.npz", draw(90, seed)[0])


def run(folder, *arguments):
    paths = [str(folder / a) if a.endswith((".npz", ".json")) else a for a in arguments]
    return main([*paths, "--metrics", "fdr6", "--device", "cpu", "--quiet"])


def test_fdr6_is_the_mean_of_the_distances_over_those_of_a_held_out_set(
    representations, tmp_path, capsys
):
    save_sets(tmp_path, train=0, held_out=1, samples=2, other=3)
    assert run(tmp_path, "train.npz", "held_out.npz", "--output", "divisors.json") == 0
    assert "fdr6 has no mean without --divisors" in capsys.readouterr().out
    held_out = json.loads((tmp_path / "divisors.json").read_text())["sets"][0]["metrics"]
    assert len(held_out) == 6

    given = ("--divisors", "divisors.json")
    assert run(tmp_path, "train.npz", "samples.npz", *given, "--output", "results.json") == 0
    entry = json.loads((tmp_path / "results.json").read_text())["sets"][0]
    ratios = [entry["metrics"][key] / held_out[key] for key in held_out]
    assert entry["metrics"]["fdr6"] == pytest.approx(np.mean(ratios), rel=1e-12)
    assert entry["details"]["fdr6"]["divisors_from"].endswith("divisors.json")

    capsys.readouterr()
    assert run(tmp_path, "other.npz", "samples.npz", *given) == 0
    assert "made with another reference" in capsys.readouterr().out


def test_published_divisors_are_used_only_on_request(representations):
    images = draw(90, 0)[0], draw(90, 1)[0]
    options = {"metrics": ["fdr6"], "device": "cpu", "quiet": True}
    assert "fdr6" not in evaluate(*images, **options).metrics
    result = evaluate(*images, divisors="imagenet256", **options)
    keys = ["fid", "fd_r6_convnext", "fd_r6_dinov2", "fd_r6_mae", "fd_r6_siglip", "fd_r6_clip"]
    published = [1.68, 56.87, 14.19, 0.04, 0.60, 5.60]
    expected = np.mean([result[key] / value for key, value in zip(keys, published, strict=True)])
    assert result["fdr6"] == pytest.approx(expected)


def test_divisors_of_other_weights_and_wrong_files_are_refused(
    representations, tmp_path, monkeypatch
):
    save_sets(tmp_path, train=0, held_out=1)
    run(tmp_path, "train.npz", "held_out.npz", "--output", "divisors.json")

    def changed(name, weights, sha256):
        return extractors.wrap_extractor(Projection(99), "r6-mae")

    monkeypatch.setitem(extractors.EXTRACTORS, "r6-mae", changed)
    with pytest.raises(EvaluationError, match="made with other weights of r6-mae"):
        evaluate(
            tmp_path / "train.npz", tmp_path / "held_out.npz", metrics=["fdr6"], device="cpu",
            divisors=tmp_path / "divisors.json",
        )  # fmt: skip
    for content, message in (
        ("{}", "holds no results of --metrics fdr6"),
        ('{"sets": [1, 2]}', "holds 2 sets"),
        ("[1", "holds no results"),
    ):
        (tmp_path / "wrong.json").write_text(content)
        with pytest.raises(EvaluationError, match=message):
            load_divisors(tmp_path / "wrong.json")
    with pytest.raises(EvaluationError, match="No such file"):
        load_divisors(tmp_path / "missing.json")


def test_one_reference_holds_statistics_of_several_extractors(
    representations, tmp_path, monkeypatch
):
    monkeypatch.setenv("FID_EVAL_HOME", str(tmp_path / "home"))
    save_sets(tmp_path, train=0, samples=1)
    command = ["stats", str(tmp_path / "train.npz"), "--name", "six", "--extractor", "fdr6"]
    assert main([*command, "--images", "5", "--device", "cpu", "--quiet"]) == 0
    options = {"metrics": ["fdr6"], "device": "cpu", "quiet": True}
    stored = evaluate("six", tmp_path / "samples.npz", **options)
    computed = evaluate(tmp_path / "train.npz", tmp_path / "samples.npz", **options)
    assert stored.metrics == pytest.approx(computed.metrics, rel=1e-9)
