"""Evaluate small sets: names, compatibility of inputs, references, wrong input."""

import json

import numpy as np
import pytest
import torch
from helpers.projection_extractor import SIDE, Projection, features_of, options
from safetensors.torch import save_file

from fid_eval import EvaluationError, evaluate
from fid_eval.features import Runtime
from fid_eval.metric_registry import METRICS
from fid_eval.metrics.adm import frechet_distance_of_features, precision_recall
from fid_eval.metrics.moments import Moments
from fid_eval.networks.extractors import (
    EXTRACTORS,
    wrap_extractor,
)
from fid_eval.references import save_reference


def test_results_equal_those_of_the_metric_functions(sets):
    (a, _), (b, _) = sets
    result = evaluate(a, b, **options())
    fa, fb = features_of(a), features_of(b)
    assert list(result.metrics) == [
        "fd_projection", "sfd_projection", "class_score_projection", "precision_projection",
        "recall_projection",
    ]  # fmt: skip
    expected = frechet_distance_of_features(fa, fb)
    assert result["fd_projection"] == pytest.approx(expected, rel=1e-9)
    precision, recall = precision_recall(fa, fb)
    assert (result["precision_projection"], result["recall_projection"]) == (precision, recall)
    assert result.details["precision_projection"]["distances"] == "fp32"


def test_every_metric_can_be_computed_and_names_the_extractor(sets):
    names = [name for name in METRICS if METRICS[name].extractor is None and name != "accuracy"]
    result = evaluate(*sets, metrics=names, bootstrap=4, **options())
    assert len(result.metrics) == len(names)
    for key, value in result.metrics.items():
        assert key.endswith("_projection")
        assert np.isfinite(value)
    assert {"fd_projection", "precision_projection"} <= set(result.intervals)
    low, high = result.intervals["fd_projection"]
    assert low < result["fd_projection"] < high
    json.dumps(result.to_dict())


def test_only_the_published_inception_gets_the_papers_names():
    published = EXTRACTORS["inception"]("inception", None, None)
    keys = [METRICS[name].key(published) for name in ("fid", "sfid", "is", "precision", "kid")]
    assert keys == ["fid", "sfid", "inception_score", "precision", "kid"]
    digits = EXTRACTORS["digits"]("digits", None, None)
    keys = [METRICS[name].key(digits) for name in ("fid", "sfid", "is", "precision", "kid")]
    assert keys == ["fd_digits", "sfd_digits", "class_score_digits", "precision_digits",
                    "kd_digits"]  # fmt: skip
    assert not any(METRICS[n].key(digits) == METRICS[n].key(published) for n in METRICS
                   if METRICS[n].extractor is None)  # fmt: skip


def test_metrics_defined_with_another_extractor_use_it(sets, monkeypatch):
    def fake(name, weights, sha256):
        extractor = wrap_extractor(Projection(5), name)
        extractor.name = extractor.label = name
        return extractor

    for name in ("dinov2", "clip"):
        monkeypatch.setitem(EXTRACTORS, name, fake)
    result = evaluate(*sets, metrics=["fid", "fd_dinov2", "cmmd"], **options())
    assert list(result.metrics) == ["fd_projection", "fd_dinov2", "cmmd"]
    assert set(result.extractors) == {"projection", "dinov2", "clip"}
    assert result["fd_dinov2"] != result["fd_projection"]


def test_result_does_not_depend_on_batch_size_or_container(sets, tmp_path):
    (a, al), (b, bl) = sets
    np.savez_compressed(tmp_path / "b.npz", b, bl)
    one = evaluate(sets[0], sets[1], **options())
    live = ((torch.from_numpy(b[i : i + 7]).permute(0, 3, 1, 2), bl[i : i + 7])
            for i in range(0, len(b), 7))  # fmt: skip
    for other in (
        evaluate(a, str(tmp_path / "b.npz"), **options()),
        evaluate((a, al), live, **options()),
    ):
        assert other.metrics == one.metrics
    small = evaluate(sets[0], sets[1], batch_size=5, **options())
    assert small.metrics == pytest.approx(one.metrics, rel=1e-5)


def test_a_saved_reference_holds_statistics_of_all_and_some_images(sets, tmp_path):
    (a, _), (b, _) = sets
    np.savez(tmp_path / "train.npz", *sets[0])
    extractor = wrap_extractor(Projection())
    path = save_reference(
        tmp_path / "train.npz", tmp_path / "ref.npz", extractor,
        Runtime(torch.device("cpu"), quiet=True), images=40,
    )  # fmt: skip
    stored = np.load(path)
    assert stored["arr_0"].shape == (40, SIDE, SIDE, 3)
    np.testing.assert_allclose(stored["mu"], features_of(a).double().mean(0), rtol=1e-6)
    chosen = {image.tobytes(): label for image, label in zip(*sets[0], strict=True)}
    assert [chosen[i.tobytes()] for i in stored["arr_0"]] == stored["arr_1"].tolist()

    result = evaluate(path, b, **options())
    assert result["fd_projection"] == pytest.approx(evaluate(a, b, **options())["fd_projection"])
    assert result.reference["frechet_from"] == "statistics"
    assert result.reference["statistics_count"] == len(a)
    assert result.reference["image_count"] == 40
    images = evaluate(path, b, reference_kind="images", **options())
    assert images["fd_projection"] != pytest.approx(result["fd_projection"], rel=0.01)

    with pytest.raises(EvaluationError, match="exists and is not overwritten"):
        save_reference(a, path, extractor, Runtime(torch.device("cpu")))
    with pytest.raises(EvaluationError, match=r"made with the extractor projection .* this run"):
        evaluate(path, b, **options(extractor=Projection(7)))
    with pytest.raises(EvaluationError, match=r"made with resize 'none'.*'resize to 8'"):
        evaluate(path, b, resize=8, **options())


def test_references_are_found_by_saved_name(sets, tmp_path, monkeypatch):
    monkeypatch.setenv("FID_EVAL_HOME", str(tmp_path))
    runtime = Runtime(torch.device("cpu"), quiet=True)
    output = tmp_path / "references" / "noise.npz"
    save_reference(sets[0], output, wrap_extractor(Projection()), runtime)
    assert evaluate("noise", sets[1], **options()).reference["name"] == "noise"
    with pytest.raises(EvaluationError, match=r"no saved reference .*did you mean 'noise'"):
        evaluate("niose", sets[1], **options())


def test_features_and_statistics_from_safetensors(sets, tmp_path):
    (a, _), (b, _) = sets
    save_file({"pool": features_of(b)}, tmp_path / "b.safetensors")
    moments = Moments(12)
    moments.add(features_of(a))
    mean, covariance = moments.mean_and_covariance()
    save_file({"mu": mean, "sigma": covariance.contiguous()}, tmp_path / "a.safetensors")
    expected = evaluate(a, b, **options())
    result = evaluate(str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), **options())
    assert result["fd_projection"] == pytest.approx(expected["fd_projection"], rel=1e-9)
    assert "precision_projection" not in result.metrics
    assert any("precision not computed" in warning for warning in result.warnings)
    with pytest.raises(EvaluationError, match=r"precision cannot be computed: reference .*a.safe"):
        evaluate(str(tmp_path / "a.safetensors"), b, **options(metrics=["precision"]))


def test_accuracy_counts_conditional_samples_recognised():
    class Brightness(Projection):
        knows_labels = True
        has_spatial = False

        def forward(self, images):
            value = images.float().mean((1, 2, 3))
            return torch.stack((255 - value, value), 1)

        def logits(self, pool):
            return pool

    dark, bright = (
        np.zeros((10, SIDE, SIDE, 3), np.uint8),
        np.full((10, SIDE, SIDE, 3), 250, np.uint8),
    )
    images = np.concatenate((dark, bright)) + np.random.default_rng(0).integers(
        0, 5, (20, 1, 1, 1), np.uint8
    )
    labels = np.array([0] * 8 + [1] * 12)
    result = evaluate(images, (images, labels), **options(extractor=Brightness()))
    assert result["accuracy_projection"] == 18 / 20
    unlabelled = evaluate(images, [images], **options(extractor=Brightness()))
    assert "accuracy_projection" not in unlabelled.metrics
    with pytest.raises(EvaluationError, match="accuracy needs batches with labels"):
        evaluate(images, [images], metrics=["accuracy"], **options(extractor=Brightness()))


BLACK = np.zeros((6, SIDE, SIDE, 3), np.uint8)


@pytest.mark.parametrize(
    ("samples", "more", "message"),
    [
        (BLACK[:1], {"metrics": ["fid"]}, "holds 1 image; at least 2"),
        (BLACK[:3], {"metrics": ["recall"]}, "samples samples: holds 3 images; at least 4"),
        (np.zeros((6, 9, 9, 3), np.uint8), {}, "image sizes differ: reference is 8×8 and samples"),
        (BLACK, {"metrics": ["class_fid"]}, "has no labels"),
        (BLACK, {"metrics": ["accuracy"]}, "classes of the extractor projection are not"),
        (BLACK, {"metrics": ["fidd"]}, "did you mean 'fid'"),
        (BLACK, {"crop": True}, "--crop needs --resize"),
    ],
)
def test_bad_input_is_refused_before_the_network_runs(sets, samples, more, message):
    network = Projection()
    with pytest.raises(EvaluationError, match=message):
        evaluate(sets[0][0], samples, **options(extractor=network, **more))
    assert network.images_seen == 0


def test_swapped_arguments_give_a_warning(sets, tmp_path):
    path = save_reference(
        sets[0], tmp_path / "ref.npz", wrap_extractor(Projection()),
        Runtime(torch.device("cpu"), quiet=True),
    )  # fmt: skip
    result = evaluate(sets[1], path, **options())
    assert any("swapped?" in warning for warning in result.warnings)
    assert not any("swapped?" in w for w in evaluate(path, sets[1], **options()).warnings)


def test_an_adm_reference_of_inception_is_not_used_with_another_extractor(tmp_path, sets):
    np.savez(tmp_path / "adm.npz", mu=np.zeros(12), sigma=np.eye(12))
    with pytest.raises(EvaluationError, match="statistics of Inception features, but"):
        evaluate(tmp_path / "adm.npz", sets[1], **options())


def test_features_of_unknown_origin_give_a_warning(sets, tmp_path):
    save_file({"pool": features_of(sets[0][0])}, tmp_path / "a.safetensors")
    result = evaluate(str(tmp_path / "a.safetensors"), sets[1], **options(metrics=["fid"]))
    assert any("does not name the extractor" in warning for warning in result.warnings)
