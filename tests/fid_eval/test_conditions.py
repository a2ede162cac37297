"""Warnings and notes where a convention, not the samples, decides a number."""

import numpy as np
import pytest
import torch
from helpers.projection_extractor import SIDE, Projection, draw, options
from safetensors.torch import save_file

from fid_eval import EvaluationError, evaluate
from fid_eval.conditions import convention_warnings, describe_labels
from fid_eval.features import Features, Runtime
from fid_eval.metric_registry import INCEPTION_SCORE_SPLIT, METRICS, Comparison
from fid_eval.networks.extractors import get_extractor, wrap_extractor
from fid_eval.references import save_reference


def warnings_of(result, *words):
    return [text for text in result.warnings if all(word in text for word in words)]


def inception_score(logits):
    features = Features(len(logits), logits=logits)
    comparison = Comparison(
        features, features, get_extractor("digits"), torch.device("cpu"), "fp32"
    )
    value = METRICS["is"].compute(comparison)
    return value, comparison.details["shuffled"], comparison.warnings


def test_inception_score_of_a_set_sorted_by_class_gives_a_warning():
    count, classes = 2 * INCEPTION_SCORE_SPLIT, 10
    labels = torch.arange(count) % classes
    logits = 12.0 * torch.nn.functional.one_hot(labels, classes)
    value, shuffled, warnings = inception_score(logits)
    assert value == pytest.approx(10, rel=0.01)
    assert not warnings
    value, shuffled, (warning,) = inception_score(logits[labels.argsort()])
    assert value == pytest.approx(5, rel=0.01)  # each of two chunks has half of the classes
    assert shuffled == pytest.approx(10, rel=0.01)
    assert "the set is sorted" in warning


def test_a_short_last_chunk_of_the_inception_score_gives_a_warning():
    logits = torch.randn(INCEPTION_SCORE_SPLIT + 1, 4, generator=torch.Generator().manual_seed(0))
    _, _, warnings = inception_score(3 * logits)
    assert any("only 1 images" in warning for warning in warnings)
    assert not inception_score(3 * logits[:-1])[2]


def test_missing_classes_are_named_and_the_mean_says_over_how_many_it_is(sets):
    (a, al), _ = sets
    b, bl = draw(120, 5)
    kept = bl != 1
    result = evaluate((a, al), (b[kept], bl[kept]), metrics=["class_fid"], **options())
    assert warnings_of(result, "mean over 2 of 3 classes", "reference: 1")
    assert result.details["class_fd_projection"]["missing"] == ["1"]
    full = evaluate((a, al), (b, bl), metrics=["class_fid"], **options())
    assert not warnings_of(full, "mean over")


def test_statistics_against_statistics_do_not_claim_zero_samples(tmp_path):
    for name in ("a", "b"):
        save_file({"mu": torch.zeros(12), "sigma": torch.eye(12)}, tmp_path / f"{name}.safetensors")
    a, b = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    result = evaluate(a, b, **options())
    assert result.samples["count"] is None
    assert result["fd_projection"] == pytest.approx(0, abs=1e-9)
    assert "0 samples" not in " ".join(result.warnings)


def test_a_saved_reference_compared_with_itself_gives_0(sets, tmp_path):
    np.savez(tmp_path / "train.npz", *sets[0])
    runtime = Runtime(torch.device("cpu"), quiet=True)
    path = save_reference(
        tmp_path / "train.npz", tmp_path / "ref.npz", wrap_extractor(Projection()), runtime,
        images=40,
    )  # fmt: skip
    result = evaluate(path, path, **options())
    assert result["fd_projection"] == pytest.approx(0, abs=1e-9)
    assert result["sfd_projection"] == pytest.approx(0, abs=1e-9)
    assert result["precision_projection"] == result["recall_projection"] == 1
    assert result.samples["frechet_from"] == "statistics"
    assert result.samples["statistics_count"] == len(sets[0][0])


def test_default_metrics_that_cannot_be_computed_are_left_out_with_a_note(sets):
    few = sets[1][0][:3]
    result = evaluate(sets[0][0], few, **options())
    assert "precision_projection" not in result.metrics
    assert warnings_of(result, "precision not computed", "holds 3 images; at least 4 are needed")
    with pytest.raises(EvaluationError, match="precision cannot be computed"):
        evaluate(sets[0][0], few, metrics=["precision"], **options())


def test_every_result_says_whether_labels_are_balanced_or_drawn(sets):
    images, drawn = sets[1]
    balanced = np.arange(len(images)) % 3
    found = {}
    for name, samples in {
        "balanced": (images, balanced), "drawn": (images, drawn), "unknown": images,
    }.items():  # fmt: skip
        result = evaluate(sets[0][0], samples, metrics=["fid"], **options())
        found[name] = result.samples["labels"], result.samples["classes"]
    assert found == {
        "balanced": ("balanced", 3), "drawn": ("drawn", 3), "unknown": ("unknown", None),
    }  # fmt: skip
    assert describe_labels(torch.tensor([4, 4, 4, 7, 7]))["labels"] == "balanced"


def test_an_adm_reference_keeps_its_statistics_beside_another_extractor(tmp_path, monkeypatch):
    def fake(name, weights, sha256):
        extractor = wrap_extractor(Projection(len(name)), name)
        extractor.name, extractor.label = name, None if name == "inception" else name
        return extractor

    from fid_eval.networks import extractors

    for name in ("inception", "dinov2"):
        monkeypatch.setitem(extractors.EXTRACTORS, name, fake)
    images = draw(60, 0)[0]
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=np.zeros(12), sigma=np.eye(12))
    run = {"device": "cpu", "quiet": True}
    alone = evaluate(tmp_path / "adm.npz", draw(80, 1)[0], metrics=["fid"], **run)
    both = evaluate(tmp_path / "adm.npz", draw(80, 1)[0], metrics=["fid", "fd_dinov2"], **run)
    assert both["fid"] == alone["fid"]
    assert both.reference["frechet_from"] == "statistics"
    images_only = evaluate(images, draw(80, 1)[0], metrics=["fd_dinov2"], **run)
    assert both["fd_dinov2"] == pytest.approx(images_only["fd_dinov2"])


def test_conditions_that_differ_from_papers_give_warnings():
    def warn(count, used, images):
        samples = {"frechet_from": "images", "count": count}
        reference = {"frechet_from": used, "image_count": images}
        five = ["fid", "sfid", "is", "precision", "recall"]
        return convention_warnings(five, samples, reference)

    assert warn(50_000, "statistics", 10_000) == []
    said = " ".join(warn(5_000, "images", 5_000))
    for words in ("5,000 samples; papers use 50,000", "statistics of the training set",
                  "5,000 reference images; papers use 10,000"):  # fmt: skip
        assert words in said
    stored = convention_warnings(
        ["fid"],
        {"frechet_from": "statistics", "statistics_count": None},
        {"frechet_from": "statistics", "image_count": None},
    )
    assert "unknown number" in stored[0]


def test_own_weights_of_inception_do_not_claim_the_statistics_of_adm(tmp_path, monkeypatch):
    def own(name, weights, sha256):
        extractor = wrap_extractor(Projection(), name)
        extractor.name, extractor.label = "inception", "inception_12345678"
        return extractor

    from fid_eval.networks import extractors

    monkeypatch.setitem(extractors.EXTRACTORS, "inception", own)
    np.savez(tmp_path / "adm.npz", mu=np.zeros(12), sigma=np.eye(12))
    black = np.zeros((6, SIDE, SIDE, 3), np.uint8)
    result = evaluate(tmp_path / "adm.npz", black, metrics=["fid"], device="cpu", quiet=True)
    assert warnings_of(result, "does not record the weights")
