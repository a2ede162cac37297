"""Compute further metrics from feature arrays (n, d), NumPy or torch.

KID                     Bińkowski et al. 2018
FID∞                    Chong and Forsyth 2020
density, coverage       Naeem et al. 2020
CMMD                    Jayasumana et al. 2024
MIND                    Berthet et al. 2026 (arXiv 2605.06797)
memorised fraction      Alaa et al. 2022 (one minus their authenticity)
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..errors import EvaluationError
from .adm import (
    Array,
    Gaussian,
    as_tensor,
    frechet_distance_of_features,
    frechet_from_factors,
    gaussian_of,
)
from .neighbours import PairDistances, nearest, neighbour_radii

CMMD_BANDWIDTH, CMMD_SCALE = 10.0, 1000.0
DIRECTIONS_AT_ONCE = 128  # directions of MIND projected and sorted together, to limit memory


def kid(
    reference: Array, samples: Array, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return mean and standard deviation of the Kernel Inception Distance over random subsets.

    The distance is the unbiased MMD² with the kernel (x·y/d + 1)³. Each subset has ``subset_size``
    images of each set, drawn without replacement, or as many as the smaller set has.
    """
    x, y = as_tensor(reference, torch.float64), as_tensor(samples, torch.float64)
    size = min(subset_size, len(x), len(y))
    if size < 2:
        raise EvaluationError(f"KID needs at least 2 images, not {size}")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        a = x[torch.randperm(len(x), generator=generator)[:size].to(x.device)]
        b = y[torch.randperm(len(y), generator=generator)[:size].to(y.device)]
        values.append(polynomial_mmd(a, b))
    stacked = torch.tensor(values, dtype=torch.float64)
    return float(stacked.mean()), float(stacked.std(correction=0))


def polynomial_mmd(a: Tensor, b: Tensor) -> float:
    """Return the unbiased MMD² of two arrays (n, d) with the kernel (x·y/d + 1)³."""
    n, d = a.shape

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / d + 1) ** 3

    aa, bb = kernel(a, a), kernel(b, b)
    within = aa.sum() - aa.trace() + bb.sum() - bb.trace()
    return float(within / (n * (n - 1)) - 2 * kernel(a, b).mean())


def fid_infinity(
    reference: Gaussian, samples: Array, points: int = 15, smallest: int = 5000, seed: int = 0
) -> tuple[float, list[tuple[int, float]]]:
    """Extrapolate the Fréchet distance to infinitely many samples.

    Fit a line in 1/n to the distances of ``points`` random subsets. Their sizes n are evenly spaced
    from ``smallest``, at most half of the set, to the whole set.

    Returns:
        The intercept of the line, and the points (n, distance).
    """
    x = as_tensor(samples, torch.float64, reference[0].device)
    smallest = min(smallest, len(x) // 2)
    if smallest < 2:
        raise EvaluationError(f"FID∞ needs at least 4 images, not {len(x)}")
    generator = torch.Generator().manual_seed(seed)
    sizes = np.unique(np.linspace(smallest, len(x), points).astype(int))
    curve = []
    for size in sizes.tolist():
        subset = x[torch.randperm(len(x), generator=generator)[:size].to(x.device)]
        curve.append((size, frechet_from_factors(*reference, *gaussian_of(subset))))
    inverse = 1 / np.array([size for size, _ in curve])
    slope_and_intercept = np.polyfit(inverse, [value for _, value in curve], 1)
    return float(slope_and_intercept[1]), curve


def density_coverage(reference: Array, samples: Array, k: int = 5) -> tuple[float, float]:
    """Return density and coverage of ``samples`` (n, d) against ``reference`` (m, d).

    Each reference image has a ball that reaches to its k-th nearest neighbour, boundary excluded
    as in the authors' code. Density is the mean number of balls that contain a sample, divided by
    k; it may exceed 1. Coverage is the fraction of balls that contain a sample.
    """
    ref, fake = as_tensor(reference, torch.float32), as_tensor(samples, torch.float32)
    radii = neighbour_radii(ref, k)
    hits = torch.zeros((), dtype=torch.int64, device=ref.device)
    covered = torch.zeros(len(ref), dtype=torch.bool, device=ref.device)
    distances = PairDistances(ref, fake, "fp32")
    for rows, columns, block in distances.tiles():
        inside = distances.within(rows, columns, block, radii[rows, None], strictly=True)
        hits += inside.sum()
        covered[rows] |= inside.any(1)
    return float(hits) / (k * len(fake)), float(covered.double().mean())


def cmmd(reference: Array, samples: Array) -> float:
    """Return CLIP-MMD: 1000 · MMD² with a Gaussian kernel of σ = 10 on unit-length embeddings.

    The estimator includes the diagonal of the kernel, as published. Sums are in float64.
    """
    x, y = (
        torch.nn.functional.normalize(as_tensor(a, torch.float64), dim=1)
        for a in (reference, samples)
    )

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=a.device)
        for _, _, block in PairDistances(a, b, "fp32").tiles():
            total += (block / (-2 * CMMD_BANDWIDTH**2)).exp().sum()
        return total / (len(a) * len(b))

    return CMMD_SCALE * float(mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def mind(
    reference: Array, samples: Array, directions: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Return the Monge Inception Distance and its Monte-Carlo error.

    MIND is 3 · d times the squared sliced Wasserstein distance: the mean over random unit
    directions of the mean squared difference of the sorted projections. Computed in float64.

    Args:
        reference: features (m, d).
        samples: features (n, d). The larger set is reduced to min(m, n) random rows.
        directions: number of random unit directions.
        seed: seed of the subset and of the directions, drawn in this order as in torch-fidelity,
            whose default is also 2020.

    Returns:
        The distance, and its standard error from the choice of directions.
    """
    x, y = as_tensor(reference, torch.float64), as_tensor(samples, torch.float64)
    if x.shape[1] != y.shape[1] or directions < 2:
        raise EvaluationError(
            f"MIND needs features of equal dimension, not {x.shape[1]} and {y.shape[1]}, and at "
            f"least 2 directions, not {directions}"
        )
    generator = torch.Generator().manual_seed(seed)
    size = min(len(x), len(y))
    x, y = (
        a if len(a) == size else a[torch.randperm(len(a), generator=generator)[:size].to(a.device)]
        for a in (x, y)
    )
    unit = torch.randn(directions, x.shape[1], generator=generator).double()
    unit = (unit / unit.norm(dim=1, keepdim=True)).to(x.device)
    distances = torch.cat(
        [
            ((x @ part.T).sort(0).values - (y @ part.T).sort(0).values).square().mean(0)
            for part in unit.split(DIRECTIONS_AT_ONCE)
        ]
    )
    scale = 3 * x.shape[1]
    return scale * float(distances.mean()), scale * float(distances.std()) / directions**0.5


def class_frechet_distances(
    reference: Array, reference_labels: Array, samples: Array, sample_labels: Array
) -> dict[int, float]:
    """Return the Fréchet distance for each label that occurs at least twice in both sets."""
    x, y = as_tensor(reference, torch.float32), as_tensor(samples, torch.float32)
    x_labels = as_tensor(reference_labels, torch.int64, x.device)
    y_labels = as_tensor(sample_labels, torch.int64, y.device)
    distances = {}
    for label in sorted(set(x_labels.tolist()) & set(y_labels.tolist())):
        a, b = x[x_labels == label], y[y_labels == label]
        if min(len(a), len(b)) >= 2:
            distances[label] = frechet_distance_of_features(a, b)
    if not distances:
        raise EvaluationError("class_fid: no label occurs at least twice in both sets")
    return distances


def memorised_share(
    training: Array, samples: Array, pairs: int = 16
) -> tuple[float, list[dict[str, float]]]:
    """Return the fraction of samples that are memorised, and the closest pairs.

    A sample is memorised if it is nearer to a training image than that image is to any other
    training image. Copies give 1; new images of the same distribution give about a half.

    Returns:
        The fraction, and the ``pairs`` closest pairs as {sample, training, distance}. A distance is
        relative to the distance between the training image and its nearest neighbour.
    """
    ref, fake = as_tensor(training, torch.float32), as_tensor(samples, torch.float32)
    own = neighbour_radii(ref, 1)
    distance, index = nearest(fake, ref)
    ratio = (distance / own[index].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    closest = [
        {"sample": int(i), "training": int(index[i]), "distance": float(ratio[i])}
        for i in ratio.argsort()[:pairs]
    ]
    return float((distance < own[index]).double().mean()), closest


def bootstrap_deviation(
    values: Callable[[Tensor], float], count: int, replicates: int, seed: int = 0
) -> float:
    """Return the standard deviation of ``values(indices)`` over resamples of ``count`` images."""
    generator = torch.Generator().manual_seed(seed)
    results = [
        values(torch.randint(count, (count,), generator=generator)) for _ in range(replicates)
    ]
    return float(torch.tensor(results, dtype=torch.float64).std())
