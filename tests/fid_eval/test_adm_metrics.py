"""Compare metric functions with ADM's results, float64 definitions and torch-fidelity."""

import mpmath
import numpy as np
import pytest
import torch
from helpers.reference_arrays import load_reference

from fid_eval.errors import EvaluationError
from fid_eval.metrics import adm as metrics
from fid_eval.metrics import extras
from fid_eval.metrics.moments import Moments
from fid_eval.metrics.neighbours import PairDistances, nearest

CASES = ["evaluation_full_rank", "evaluation_rank_deficient"]


@pytest.fixture(params=CASES)
def case(request):
    return load_reference(request.param)


# The float64 values were taken with sqrtm, whose rounding on singular matrices is 2e-8; where the
# covariances are singular this module is held to more digits by the 40-digit test below.
FLOAT64 = {"evaluation_full_rank": 1e-9, "evaluation_rank_deficient": 5e-8}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("metric", "layer"), [("fid", "pool"), ("sfid", "spatial")])
def test_frechet_distance_equals_adm_and_float64(name, metric, layer):
    arrays, expected = load_reference(name)
    reference, samples = arrays[f"ref_{layer}"], arrays[f"sample_{layer}"]
    statistics = []
    for features in (reference, samples):
        statistics += metrics.mean_and_covariance(features.numpy())
    for value in (
        metrics.frechet_distance_of_features(reference, samples),
        metrics.frechet_distance(*statistics),
    ):
        assert value == pytest.approx(expected[f"{metric}_float64"], rel=FLOAT64[name])
        assert value == pytest.approx(expected[metric], rel=1e-6)


def test_fewer_images_than_dimensions_is_exact_to_12_digits():
    generator = torch.Generator().manual_seed(4)
    a, b = (torch.randn(n, 14, generator=generator, dtype=torch.float64) for n in (6, 9))
    mpmath.mp.dps = 40
    rows = [mpmath.matrix((x - x.mean(0)).tolist()) for x in (a, b)]
    product = rows[0] * rows[1].T
    eigenvalues = mpmath.eigsy(product * product.T, eigvals_only=True)
    cross = sum(mpmath.sqrt(abs(value)) for value in eigenvalues) / mpmath.sqrt(5 * 8)
    traces = sum(float(x.var(0).sum()) for x in (a, b))
    exact = float((a.mean(0) - b.mean(0)).square().sum()) + traces - 2 * float(cross)
    assert metrics.frechet_distance_of_features(a, b) == pytest.approx(exact, rel=1e-12)


def test_eigenvalues_give_the_same_distance_for_large_matrices(case, monkeypatch):
    arrays, _ = case
    by_svd = metrics.frechet_distance_of_features(arrays["ref_pool"], arrays["sample_pool"])
    monkeypatch.setattr(metrics, "SVD_LIMIT", 1)
    by_eigenvalues = metrics.frechet_distance_of_features(arrays["ref_pool"], arrays["sample_pool"])
    assert by_eigenvalues == pytest.approx(by_svd, rel=1e-6)


def test_inception_score_equals_adm(case):
    arrays, expected = case
    logits = arrays["sample_pool"] @ arrays["softmax_weight"]
    value = metrics.inception_score(logits, expected["inception_score_split"])
    assert value == pytest.approx(expected["inception_score"], rel=1e-5)


def test_inception_score_survives_logits_that_underflow_float32():
    logits = torch.eye(10).repeat(10, 1) * 1e4
    assert metrics.inception_score(logits) == pytest.approx(10, rel=1e-9)


def test_precision_and_recall_equal_float64_exactly(case):
    arrays, expected = case
    value = metrics.precision_recall(arrays["ref_pool"], arrays["sample_pool"], "fp32")
    assert value == (expected["precision_float64"], expected["recall_float64"])


def test_float16_precision_and_recall_differ_from_adm_by_at_most_one_image(case):
    arrays, expected = case
    precision, recall = metrics.precision_recall(
        arrays["ref_pool"], arrays["sample_pool"], "adm-fp16"
    )
    one_sample, one_reference = 1 / len(arrays["sample_pool"]), 1 / len(arrays["ref_pool"])
    assert abs(precision - expected["precision_adm_fp16"]) <= one_sample * 1.001
    assert abs(recall - expected["recall_adm_fp16"]) <= one_reference * 1.001


def sets_with_ties(kind):
    """Make float32 features of two sets with many equal distances."""
    random = np.random.default_rng(0)
    if kind == "whole numbers":
        return (random.integers(0, 3, (n, 8)).astype(np.float32) for n in (200, 300))
    if kind == "copies":
        few = random.standard_normal((40, 64)).astype(np.float32)
        return few[random.integers(0, 40, 200)], few[random.integers(0, 40, 100)]
    far = (random.standard_normal((150, 64)) + 1000).astype(np.float32)
    return far, np.concatenate([far[:20], far[20:] + random.standard_normal((130, 64))], 0)


@pytest.mark.parametrize("kind", ["whole numbers", "copies", "far from the origin"])
def test_ties_are_not_decided_by_rounding(kind):
    """Compare with distances from differences, where ties stay equal."""
    reference, samples = (np.asarray(x, np.float32) for x in sets_with_ties(kind))
    a, b = reference.astype(np.float64), samples.astype(np.float64)

    def distances(x, y):
        return np.square(x[:, None] - y[None]).sum(2)

    def radii(x, k):
        return np.sort(distances(x, x), 1)[:, k]  # index 0 is the row itself

    across = distances(a, b)
    precision = (across <= radii(a, 3)[:, None]).any(0).mean()
    recall = (across <= radii(b, 3)[None]).any(1).mean()
    assert metrics.precision_recall(reference, samples) == (precision, recall)
    inside = across < radii(a, 5)[:, None]
    expected = inside.sum() / (5 * len(b)), inside.any(1).mean()
    assert extras.density_coverage(reference, samples) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("mode", ["fp32", "adm-fp16"])
def test_precision_and_recall_do_not_depend_on_the_tile(case, mode, monkeypatch):
    arrays, _ = case
    whole = metrics.precision_recall(arrays["ref_pool"], arrays["sample_pool"], mode)
    monkeypatch.setattr("fid_eval.metrics.neighbours.TILE", {"cpu": 37})
    assert metrics.precision_recall(arrays["ref_pool"], arrays["sample_pool"], mode) == whole


def test_blocks_that_overflow_float16_are_computed_in_float32():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 16, generator=generator) * 100  # ‖a‖² ~ 160,000 > 65,504
    block, _ = PairDistances(a, a, "adm-fp16").block(slice(0, 40), slice(0, 40))
    exact = torch.cdist(a.double(), a.double()).square()
    assert block.isfinite().all()
    torch.testing.assert_close(block.double(), exact, rtol=1e-5, atol=0.5)


def test_float16_distances_are_rounded_after_every_step():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, 24, generator=generator).half() for n in (7, 9))
    block, _ = PairDistances(a.float(), b.float(), "adm-fp16").block(slice(0, 7), slice(0, 9))
    for i in range(7):
        for j in range(9):
            u, v = a[i].numpy(), b[j].numpy()
            product = np.float16(np.dot(u.astype(np.float64), v.astype(np.float64)))
            norms = [np.float16((x * x).astype(np.float64).sum()) for x in (u, v)]
            step = np.float16(norms[0] - np.float16(2) * product)
            expected = max(np.float16(step + norms[1]), 0)
            assert abs(float(block[i, j]) - float(expected)) <= float(np.spacing(expected)) * 2


def test_nearest_finds_the_closest_row():
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(30, 5, generator=generator), torch.randn(50, 5, generator=generator)
    exact = torch.cdist(a.double(), b.double()).square()
    distance, index = nearest(a, b)
    torch.testing.assert_close(distance, exact.min(1).values)
    assert torch.equal(index, exact.argmin(1))


def test_moments_do_not_depend_on_the_order_of_the_parts():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1000, 12, generator=generator) * torch.logspace(0, 6, 12) + 50
    parts = x.split(37)
    forward, backward, halves = Moments(12), Moments(12), [Moments(12), Moments(12)]
    for index, part in enumerate(parts):
        forward.add(part)
        halves[index % 2].add(part)
    for part in reversed(parts):
        backward.add(part)
    halves[1].merge(halves[0])
    expected = metrics.mean_and_covariance(x)
    for moments in (forward, backward, halves[1]):
        for value, reference, exact in zip(
            moments.mean_and_covariance(), forward.mean_and_covariance(), expected, strict=True
        ):
            assert torch.equal(value, reference)
            torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-10)


def test_too_few_images_for_k_neighbours_is_an_error():
    with pytest.raises(EvaluationError, match=r"3 images.*at least 4"):
        metrics.precision_recall(torch.randn(3, 8), torch.randn(10, 8))


def test_nan_statistics_are_an_error():
    mean, covariance = torch.zeros(3), torch.eye(3)
    with pytest.raises(EvaluationError, match="NaN"):
        metrics.frechet_distance(mean, covariance, mean + torch.nan, covariance)
