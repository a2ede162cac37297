"""Compare further metrics with their definitions, other implementations and exact cases."""

import math

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kernel_mmd

from fid_eval.errors import EvaluationError
from fid_eval.metrics import extras
from fid_eval.metrics.adm import frechet_distance_of_features


def normal(n, d, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def test_kid_of_one_subset_equals_torch_fidelity():
    a, b = normal(60, 16), normal(60, 16, 1, 0.3)
    expected = kernel_mmd(
        a.numpy(), b.numpy(), kid_kernel="poly", kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1,
    )  # fmt: skip
    assert extras.polynomial_mmd(a, b) == pytest.approx(float(expected), rel=1e-9)
    mean, deviation = extras.kid(a, b, subsets=5)  # 60 < 1000: each subset has all images
    assert mean == pytest.approx(float(expected), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-12)


def test_fid_infinity_removes_the_bias_of_few_samples():
    d = 8
    reference = torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)
    samples = normal(4000, d)
    value, curve = extras.fid_infinity(reference, samples, smallest=200)
    assert len(curve) == 15
    assert curve[0][0] == 200
    assert curve[-1][0] == 4000
    assert abs(value) < curve[-1][1] < curve[0][1]  # the true distance is 0


def test_density_and_coverage_by_definition():
    a, b = normal(50, 4).float(), normal(70, 4, 1).float()
    radii = torch.cdist(a.double(), a.double()).fill_diagonal_(torch.inf).kthvalue(5).values
    inside = torch.cdist(a.double(), b.double()) < radii[:, None]
    density, coverage = extras.density_coverage(a, b)
    assert density == pytest.approx(float(inside.sum()) / (5 * 70))
    assert coverage == pytest.approx(float(inside.any(1).double().mean()))


def test_cmmd_by_definition():
    a, b = normal(40, 6), normal(30, 6, 1, 0.5)
    x, y = (v / v.norm(dim=1, keepdim=True) for v in (a, b))

    def mean_kernel(u, v):
        return (-torch.cdist(u, v).square() / 200).exp().mean()

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert extras.cmmd(a, b) == pytest.approx(float(expected), rel=1e-6)
    assert extras.cmmd(a, a) == pytest.approx(0, abs=1e-6)


def test_class_distances_cover_the_classes_that_both_sets_have():
    a, b = normal(60, 3), normal(60, 3, 1)
    a_labels = torch.arange(60) % 3
    b_labels = torch.arange(60) % 2
    distances = extras.class_frechet_distances(a, a_labels, b, b_labels)
    assert set(distances) == {0, 1}
    expected = frechet_distance_of_features(a[a_labels == 1].float(), b[b_labels == 1].float())
    assert distances[1] == pytest.approx(expected)
    with pytest.raises(EvaluationError, match="no label"):
        extras.class_frechet_distances(a, a_labels, b, b_labels + 9)


def test_copies_are_memorised_and_fresh_images_are_not():
    training = normal(300, 5)
    copies, closest = extras.memorised_share(training, training[10:40] + 1e-3)
    assert copies == 1
    assert closest[0]["training"] == closest[0]["sample"] + 10
    fresh, _ = extras.memorised_share(training, normal(300, 5, 1))
    assert 0.3 < fresh < 0.7
    far, _ = extras.memorised_share(training, normal(50, 5, 2, 20.0))
    assert far == 0


def test_bootstrap_deviation_of_a_mean_is_its_standard_error():
    values = normal(400, 1)[:, 0]
    deviation = extras.bootstrap_deviation(lambda i: float(values[i].mean()), 400, 800)
    assert deviation == pytest.approx(float(values.std()) / math.sqrt(400), rel=0.1)


def test_mind_of_one_dimension_is_three_times_the_transport_cost():
    a, b = normal(200, 1), normal(200, 1, 1, 0.4)
    cost = (a.sort(0).values - b.sort(0).values).square().mean()  # one direction, up to its sign
    value, error = extras.mind(a, b, directions=50)
    assert value == pytest.approx(3 * float(cost), rel=1e-12)
    assert error == pytest.approx(0, abs=1e-12)


def test_mind_of_a_shift_and_of_a_scale_have_closed_forms():
    x = normal(500, 8)
    shift = torch.arange(8.0, dtype=torch.float64) / 8
    # Projections of a shifted set keep their order: the cost is (u · shift)², whose mean over unit
    # directions is ‖shift‖² / d.
    value, error = extras.mind(x, x + shift, directions=4000)
    assert abs(value - 3 * float(shift.square().sum())) < 4 * error
    # A doubled set costs (u · x)² on average: 3 · tr(E[x xᵀ]).
    value, error = extras.mind(x, 2 * x, directions=4000)
    assert abs(value - 3 * float(x.square().sum(1).mean())) < 4 * error
    assert extras.mind(x, x.flip(0)) == (0, 0)


def test_mind_reduces_the_larger_set_by_the_seed():
    a, b = normal(300, 6).float(), normal(90, 6, 1, 0.2).float()
    generator = torch.Generator().manual_seed(7)
    chosen = a[torch.randperm(300, generator=generator)[:90]].numpy()
    unit = torch.randn(11, 6, generator=generator).numpy().astype(float)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    costs = [
        np.mean((np.sort(chosen @ u) - np.sort(b.numpy() @ u)) ** 2) for u in unit
    ]  # fmt: skip
    value, error = extras.mind(a, b, directions=11, seed=7)
    assert value == pytest.approx(18 * np.mean(costs), rel=1e-9)
    assert error == pytest.approx(18 * np.std(costs, ddof=1) / 11**0.5, rel=1e-9)
    assert extras.mind(b, a, directions=11, seed=7)[0] == pytest.approx(value, rel=1e-12)
    with pytest.raises(EvaluationError, match="equal dimension"):
        extras.mind(a, b[:, :3])
