"""ADM's five numbers as plain functions on arrays (NumPy or torch, any float dtype).

Fréchet distance     Heusel et al. 2017 (FID); on spatial features Nash et al. 2021 (sFID)
Inception Score      Salimans et al. 2016, as ADM's evaluator splits it
precision, recall    Kynkäänniemi et al. 2019 (improved precision and recall)
"""

import numpy as np
import torch
from torch import Tensor

from ..errors import EvaluationError
from .neighbours import Precision, coverage_flags, neighbour_radii

Array = np.ndarray | Tensor
SVD_LIMIT = 1024  # above it, eigenvalues of the Gram matrix: half the time, 8 digits fewer


def as_tensor(array: Array, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else torch.as_tensor(array)
    return tensor.detach().to(device=device, dtype=dtype)


def mean_and_covariance(features: Array) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d, divided by n − 1) of features (n, d), in float64."""
    x = as_tensor(features, torch.float64)
    if x.ndim != 2 or len(x) < 2:
        raise EvaluationError(f"features of shape {tuple(x.shape)}: need (n ≥ 2, dimensions)")
    mean = x.mean(0)
    x = x - mean
    return mean, x.T @ x / (len(x) - 1)


def covariance_factor(covariance: Tensor) -> Tensor:
    """F (d, k) with Σ = F Fᵀ: Cholesky's, or by eigenvectors where Σ is not positive definite.

    Eigenvalues below d·ε·λ_max are rounding noise of a singular Σ; they are left out, because
    the square root would raise noise of 1e-16 to 1e-8.
    """
    factor, failed = torch.linalg.cholesky_ex(covariance)
    rank_bound = len(covariance) * torch.finfo(covariance.dtype).eps
    if not failed and factor.diagonal().square().min() > rank_bound * covariance.diagonal().max():
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    keep = values > rank_bound * values[-1]
    return vectors[:, keep] * values[keep].sqrt()


def feature_factor(features: Array) -> tuple[Tensor, Tensor]:
    """Mean (d,) and F (d, n) with Σ = F Fᵀ, straight from centred features (n, d): for n ≤ d."""
    x = as_tensor(features, torch.float64)
    mean = x.mean(0)
    return mean, (x - mean).T / (len(x) - 1) ** 0.5


def frechet_from_factors(mean1: Tensor, factor1: Tensor, mean2: Tensor, factor2: Tensor) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) for Σᵢ = FᵢFᵢᵀ.

    (Σ₁Σ₂)^½ has the same trace as (F₁ᵀF₂F₂ᵀF₁)^½, which is the sum of the singular values of
    F₁ᵀF₂; no matrix square root is taken.
    """
    if len(mean1) != len(mean2):
        raise EvaluationError(
            f"features of {len(mean1)} and {len(mean2)} dimensions: were both sets made with the "
            "same extractor?"
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
    """Fréchet distance of two Gaussians given by means (d,) and covariances (d, d); float64.

    FID on Inception's pooled features, sFID on its spatial ones. Singular covariances are fine.
    Raises EvaluationError if the dimensions differ or a value is not finite.
    """
    statistics = []
    for mean, covariance in ((mean1, covariance1), (mean2, covariance2)):
        m, c = as_tensor(mean, torch.float64), as_tensor(covariance, torch.float64)
        if c.shape != (len(m), len(m)):
            raise EvaluationError(f"mean {tuple(m.shape)} and covariance {tuple(c.shape)} disagree")
        if not (m.isfinite().all() and c.isfinite().all()):
            raise EvaluationError("mean or covariance holds NaN or infinite values")
        statistics += [m, covariance_factor((c + c.T) / 2)]
    return frechet_from_factors(*statistics)


def frechet_distance_of_features(features1: Array, features2: Array) -> float:
    """Fréchet distance of two feature sets (n₁, d), (n₂, d); exact too for fewer rows than d."""
    statistics: list[Tensor] = []
    for features in (features1, features2):
        if features.shape[0] <= features.shape[1]:
            statistics += feature_factor(features)
        else:
            mean, covariance = mean_and_covariance(features)
            statistics += [mean, covariance_factor(covariance)]
    return frechet_from_factors(*statistics)


def inception_score(logits: Array, split_size: int = 5000) -> float:
    """exp of the mean KL(p(y|x) ‖ p(y)) over consecutive chunks of ``split_size`` images.

    ``logits`` (n, classes) in file order (Inception: pool · Wᵀ without bias, 1008 classes). The
    plain mean over chunks is returned, a short last chunk counting as one, as in ADM; but in
    float64 log-softmax, where ADM's float32 can underflow to NaN.
    """
    scores = []
    for chunk in as_tensor(logits, torch.float32).split(split_size):
        log_p = chunk.double().log_softmax(1)
        p = log_p.exp()
        log_marginal = log_p.logsumexp(0) - np.log(len(log_p))  # log of the mean p
        kl = (p * (log_p - log_marginal)).sum(1)
        scores.append(kl.mean().exp())
    if not scores:
        raise EvaluationError("Inception Score of an empty set")
    return float(torch.stack(scores).mean())


def precision_recall(
    reference: Array,
    samples: Array,
    mode: Precision = "fp32",
    k: int = 3,
    device: torch.device | str | None = None,
) -> tuple[float, float]:
    """Improved precision and recall of ``samples`` (n, d) against ``reference`` (m, d).

    Precision is the share of samples inside some reference image's ball, recall the share of
    reference images inside some sample's; a ball reaches to the k-th nearest neighbour in the
    own set, its centre excluded, boundary included.

    ``mode="fp32"``: distances of the float32 features, in float64; ties, as between copies, are
    not decided by rounding. ``mode="adm-fp16"``: ADM's half-precision distances, which move both
    numbers by up to a percent; use it to compare with published ADM numbers. No (n, m) array is
    held. Needs more than k images in each set.
    """
    ref = as_tensor(reference, torch.float32, device)
    fake = as_tensor(samples, torch.float32, device)
    inside_reference, inside_samples = precision_recall_flags(ref, fake, mode, k)
    return float(inside_reference.double().mean()), float(inside_samples.double().mean())


def precision_recall_flags(
    reference: Tensor, samples: Tensor, mode: Precision = "fp32", k: int = 3
) -> tuple[Tensor, Tensor]:
    """Per sample: in some reference ball? Per reference image: in some sample ball? (bool)."""
    radii_reference = neighbour_radii(reference, k, mode)
    radii_samples = neighbour_radii(samples, k, mode)
    inside_samples, inside_reference = coverage_flags(
        reference, radii_reference, samples, radii_samples, mode
    )
    return inside_reference, inside_samples
