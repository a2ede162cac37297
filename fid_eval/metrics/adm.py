"""Compute the five metrics of ADM's evaluator from arrays (NumPy or torch, any float dtype).

Fréchet distance     Heusel et al. 2017 (FID); on spatial features Nash et al. 2021 (sFID)
Inception Score      Salimans et al. 2016, split into chunks as in ADM's evaluator
precision, recall    Kynkäänniemi et al. 2019 (improved precision and recall)
"""

import numpy as np
import torch
from torch import Tensor

from ..choices import DistancePrecision
from ..errors import EvaluationError
from .neighbours import coverage_flags, neighbour_radii

Array = np.ndarray | Tensor
Gaussian = tuple[Tensor, Tensor]  # mean (d,) and factor F (d, k) of the covariance Σ = F Fᵀ
SVD_LIMIT = 1024  # above it, eigenvalues of the Gram matrix: twice as fast, 8 digits fewer


def as_tensor(array: Array, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else torch.as_tensor(array)
    return tensor.detach().to(device=device, dtype=dtype)


def mean_and_covariance(features: Array) -> tuple[Tensor, Tensor]:
    """Return mean (d,) and covariance (d, d) of features (n, d) in float64, divided by n − 1."""
    x = as_tensor(features, torch.float64)
    if x.ndim != 2 or len(x) < 2:
        raise EvaluationError(f"features have shape {tuple(x.shape)}; (n ≥ 2, d) is needed")
    mean = x.mean(0)
    x = x - mean
    return mean, x.T @ x / (len(x) - 1)


def covariance_factor(covariance: Tensor) -> Tensor:
    """Return a factor F (d, k) of a covariance Σ = F Fᵀ (d, d).

    F is the Cholesky factor if Σ is positive definite, otherwise scaled eigenvectors. Eigenvalues
    below d·ε·λ_max are rounding noise of a singular Σ. They are dropped, because the square root
    would amplify noise of 1e-16 to 1e-8.
    """
    factor, failed = torch.linalg.cholesky_ex(covariance)
    rank_bound = len(covariance) * torch.finfo(covariance.dtype).eps
    if not failed and factor.diagonal().square().min() > rank_bound * covariance.diagonal().max():
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    keep = values > rank_bound * values[-1]
    return vectors[:, keep] * values[keep].sqrt()


def gaussian_of(features: Array, device: torch.device | str | None = None) -> Gaussian:
    """Return mean (d,) and covariance factor of features (n, d) in float64.

    For n ≤ d the covariance is singular, and the centred features themselves are the exact factor.
    """
    x = as_tensor(features, torch.float64, device)
    if len(x) <= x.shape[1]:
        mean = x.mean(0)
        return mean, (x - mean).T / (len(x) - 1) ** 0.5
    mean, covariance = mean_and_covariance(x)
    return mean, covariance_factor(covariance)


def frechet_from_factors(mean1: Tensor, factor1: Tensor, mean2: Tensor, factor2: Tensor) -> float:
    """Return ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) for Σᵢ = FᵢFᵢᵀ.

    The trace of (Σ₁Σ₂)^½ equals that of (F₁ᵀF₂F₂ᵀF₁)^½, the sum of the singular values of F₁ᵀF₂.
    No matrix square root is needed.
    """
    if len(mean1) != len(mean2):
        raise EvaluationError(
            f"features have {len(mean1)} and {len(mean2)} dimensions; use the same extractor for "
            "both sets"
        )
    product = factor1.T @ factor2
    if min(product.shape) <= SVD_LIMIT:
        cross = torch.linalg.svdvals(product).sum()
    else:
        gram = product @ product.T if product.shape[0] <= product.shape[1] else product.T @ product
        cross = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum()
    traces = factor1.square().sum() + factor2.square().sum()  # ‖F‖² = tr Σ
    return float((mean1 - mean2).square().sum() + traces - 2 * cross)


def frechet_distance(mean1: Array, covariance1: Array, mean2: Array, covariance2: Array) -> float:
    """Return the Fréchet distance of two Gaussians with means (d,) and covariances (d, d).

    This is FID for pooled Inception features and sFID for spatial ones. Computed in float64;
    covariances may be singular.

    Raises:
        EvaluationError: the dimensions differ, or a value is not finite.
    """
    statistics = []
    for mean, covariance in ((mean1, covariance1), (mean2, covariance2)):
        m, c = as_tensor(mean, torch.float64), as_tensor(covariance, torch.float64)
        if c.shape != (len(m), len(m)):
            raise EvaluationError(f"mean {tuple(m.shape)} does not fit covariance {tuple(c.shape)}")
        if not (m.isfinite().all() and c.isfinite().all()):
            raise EvaluationError("mean or covariance holds NaN or infinity")
        statistics += [m, covariance_factor((c + c.T) / 2)]
    return frechet_from_factors(*statistics)


def frechet_distance_of_features(features1: Array, features2: Array) -> float:
    """Return the Fréchet distance of two feature sets (n₁, d), (n₂, d); exact also for n < d."""
    return frechet_from_factors(*gaussian_of(features1), *gaussian_of(features2))


def inception_score(logits: Array, split_size: int = 5000) -> float:
    """Return exp of the mean KL(p(y|x) ‖ p(y)), averaged over chunks of ``split_size`` images.

    As in ADM, chunks are consecutive and a shorter last chunk has the same weight as the others.
    The softmax is in float64, because ADM's float32 can underflow to NaN.

    Args:
        logits: (n, classes) in file order. Inception's are pool · Wᵀ without bias, 1008 classes.
        split_size: images per chunk.
    """
    scores = []
    for chunk in as_tensor(logits, torch.float32).split(split_size):
        log_p = chunk.double().log_softmax(1)
        p = log_p.exp()
        log_marginal = log_p.logsumexp(0) - np.log(len(log_p))  # log of the mean of p
        kl = (p * (log_p - log_marginal)).sum(1)
        scores.append(kl.mean().exp())
    if not scores:
        raise EvaluationError("the Inception Score needs at least one image")
    return float(torch.stack(scores).mean())


def precision_recall(
    reference: Array,
    samples: Array,
    mode: DistancePrecision = "fp32",
    k: int = 3,
    device: torch.device | str | None = None,
) -> tuple[float, float]:
    """Return improved precision and recall of ``samples`` (n, d) against ``reference`` (m, d).

    Each image has a ball that reaches to its k-th nearest neighbour in its own set, boundary
    included. Precision is the fraction of samples inside a ball of any reference image. Recall is
    the fraction of reference images inside a ball of any sample. Memory does not grow with n · m.

    Args:
        reference: features (m, d), m > k.
        samples: features (n, d), n > k.
        mode: "fp32" computes distances of the float32 features in float64, so that rounding does
            not decide ties, as between copies. "adm-fp16" computes ADM's half-precision
            distances, which change both results by up to 1 %; use it to compare with published
            numbers.
        k: number of neighbours.
        device: where to compute; by default where each array is.
    """
    ref = as_tensor(reference, torch.float32, device)
    fake = as_tensor(samples, torch.float32, device)
    inside_reference, inside_samples = precision_recall_flags(ref, fake, mode, k)
    return float(inside_reference.double().mean()), float(inside_samples.double().mean())


def precision_recall_flags(
    reference: Tensor, samples: Tensor, mode: DistancePrecision = "fp32", k: int = 3
) -> tuple[Tensor, Tensor]:
    """Return for each sample, and for each reference image, whether a ball contains it (bool)."""
    radii_reference = neighbour_radii(reference, k, mode)
    radii_samples = neighbour_radii(samples, k, mode)
    inside_samples, inside_reference = coverage_flags(
        reference, radii_reference, samples, radii_samples, mode
    )
    return inside_reference, inside_samples
