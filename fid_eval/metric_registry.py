"""Register the metrics: their inputs, computation and names in results.

The names of published papers (fid, sfid, inception_score, precision, …) are used only for the
published Inception weights. With any other extractor, the name includes the extractor: fd_digits,
sfd_digits, class_score_digits, precision_digits, …
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from .choices import DistancePrecision
from .errors import EvaluationError
from .fdr6 import PARTS
from .features import Features
from .metrics import extras
from .metrics.adm import (
    frechet_from_factors,
    gaussian_of,
    inception_score,
    precision_recall_flags,
)
from .networks.extractors import Extractor, label_of

INCEPTION_SCORE_SPLIT = 5000
SORTED_TOLERANCE = 0.05  # relative effect of shuffling on the Inception Score of a sorted set
NAMED_CLASSES = 10  # classes named in a warning
MIND_DIRECTIONS, MIND_SEED = 1000, 2020
# A resampled Fréchet distance has a biased mean but an unbiased standard deviation. Intervals are
# therefore this number of deviations around the distance of the whole set.
BOOTSTRAP_SIGMAS = 1.96


@dataclass
class Comparison:
    """Features of a reference and of samples, with intermediate results that metrics share.

    ``details``, ``warnings`` and ``interval`` belong to the metric that is being computed.
    """

    reference: Features
    samples: Features
    extractor: Extractor
    device: torch.device
    distances: DistancePrecision
    k: int = 3
    bootstrap: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    interval: tuple[float, float] | None = None

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Return pooled features (m, d) of the reference and (n, d) of the samples."""
        return tuple(f.rows["pool"].to(self.device) for f in (self.reference, self.samples))  # type: ignore[return-value]

    @cached_property
    def flags(self) -> tuple[Tensor, Tensor]:
        """Return which samples, and which reference images, lie in a ball of the other set."""
        return precision_recall_flags(*self.rows, self.distances, self.k)

    @cached_property
    def logits(self) -> Tensor:
        """Return class logits (n, classes) of the samples."""
        if self.samples.logits is not None:
            return self.samples.logits
        return self.extractor.logits(self.samples.rows["pool"], self.device)

    @cached_property
    def density_coverage(self) -> tuple[float, float]:
        return extras.density_coverage(*self.rows)

    def add_interval(self, value: float, of_subset: Callable[[Tensor], float], count: int) -> float:
        """Set ``interval`` to the 95 % bootstrap interval if requested, and return ``value``."""
        if self.bootstrap:
            deviation = extras.bootstrap_deviation(of_subset, count, self.bootstrap)
            half = BOOTSTRAP_SIGMAS * deviation
            self.interval = (value - half, value + half)
        return value

    def mean_of_flags(self, flags: Tensor) -> float:
        """Return the fraction of true flags, with its interval."""
        flags = flags.double().cpu()
        return self.add_interval(float(flags.mean()), lambda i: float(flags[i].mean()), len(flags))


def _frechet(comparison: Comparison, layer: str) -> float:
    reference = comparison.reference.gaussian(layer, comparison.device)
    value = frechet_from_factors(*reference, *comparison.samples.gaussian(layer, comparison.device))
    if comparison.bootstrap and layer in comparison.samples.rows:
        rows = comparison.samples.rows[layer]

        def of_subset(index: Tensor) -> float:
            return frechet_from_factors(*reference, *gaussian_of(rows[index], comparison.device))

        return comparison.add_interval(value, of_subset, len(rows))
    return value


def _inception_score(comparison: Comparison) -> float:
    logits, count = comparison.logits, len(comparison.logits)
    value = inception_score(logits, INCEPTION_SCORE_SPLIT)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    shuffled = inception_score(logits[order], INCEPTION_SCORE_SPLIT)
    comparison.details.update(split_size=INCEPTION_SCORE_SPLIT, shuffled=shuffled)
    if abs(value - shuffled) > SORTED_TOLERANCE * shuffled:
        comparison.warnings.append(
            f"the Inception Score of consecutive chunks is {value:.4g}, but {shuffled:.4g} after "
            "shuffling: the set is sorted, as by class. Papers use unsorted samples"
        )
    if count > INCEPTION_SCORE_SPLIT and (rest := count % INCEPTION_SCORE_SPLIT):
        comparison.warnings.append(
            f"the last chunk of the Inception Score has only {rest:,} images, but the weight of "
            f"one of {INCEPTION_SCORE_SPLIT:,}; papers use multiples of {INCEPTION_SCORE_SPLIT:,}"
        )
    return comparison.add_interval(
        value,
        lambda i: inception_score(logits[i], INCEPTION_SCORE_SPLIT),
        count,
    )


def _precision_or_recall(comparison: Comparison, side: int) -> float:
    comparison.details.update(distances=comparison.distances, k=comparison.k)
    return comparison.mean_of_flags(comparison.flags[side])


def _kid(comparison: Comparison) -> float:
    value, deviation = extras.kid(*comparison.rows)
    smaller = min(len(rows) for rows in comparison.rows)
    comparison.details.update(deviation=deviation, subsets=100, subset_size=min(1000, smaller))
    return value


def _fid_infinity(comparison: Comparison) -> float:
    reference = comparison.reference.gaussian("pool", comparison.device)
    value, comparison.details["curve"] = extras.fid_infinity(
        reference, comparison.samples.rows["pool"]
    )
    return value


def _mind(comparison: Comparison) -> float:
    value, error = extras.mind(*comparison.rows, MIND_DIRECTIONS, MIND_SEED)
    smaller = min(len(rows) for rows in comparison.rows)
    comparison.details.update(
        monte_carlo_error=error, directions=MIND_DIRECTIONS, seed=MIND_SEED, images=smaller
    )
    return value


def _class_fid(comparison: Comparison) -> float:
    labels = comparison.reference.labels, comparison.samples.labels
    assert labels[0] is not None
    assert labels[1] is not None
    distances = extras.class_frechet_distances(
        comparison.rows[0], labels[0].numpy(), comparison.rows[1], labels[1].numpy()
    )
    comparison.details["classes"] = {str(label): value for label, value in distances.items()}
    every = sorted(set(labels[0].tolist()) | set(labels[1].tolist()))
    if missing := [str(label) for label in every if label not in distances]:
        listed = ", ".join(missing[:NAMED_CLASSES]) + ", …" * (len(missing) > NAMED_CLASSES)
        comparison.details["missing"] = missing
        comparison.warnings.append(
            f"class_fid is the mean over {len(distances)} of {len(every)} classes; fewer than 2 "
            f"images in the samples or in the reference: {listed}"
        )
    return sum(distances.values()) / len(distances)


def _memorised(comparison: Comparison) -> float:
    value, comparison.details["closest"] = extras.memorised_share(*comparison.rows)
    return value


def _accuracy(comparison: Comparison) -> float:
    logits, labels = comparison.logits, comparison.samples.labels
    assert labels is not None
    if int(labels.max()) >= logits.shape[1] or int(labels.min()) < 0:
        raise EvaluationError(
            f"accuracy: labels range from {int(labels.min())} to {int(labels.max())}, but the "
            f"extractor {comparison.extractor.name} has {logits.shape[1]} classes"
        )
    right = logits.argmax(1) == labels
    comparison.details["classes"] = {
        str(label): float(right[labels == label].double().mean())
        for label in sorted(set(labels.tolist()))
    }
    return comparison.mean_of_flags(right)


@dataclass(frozen=True)
class Metric:
    """Name, inputs and computation of a metric.

    Inputs are "pool" (rows of pooled features), "gaussian:pool" and "gaussian:spatial" (mean and
    covariance of a layer), "labels", and for samples "logits".

    Attributes:
        name: key in results with the published Inception.
        compute: the function.
        reference: inputs from the reference.
        samples: inputs from the samples.
        other_name: prefix of the key with another extractor, if it is not ``name``.
        extractor: the extractor that the metric is defined with; None if it can be chosen.
        higher_is_better: whether larger values are better.
        neighbours: whether it needs more than k images in each set.
    """

    name: str
    compute: Callable[[Comparison], float]
    reference: tuple[str, ...]
    samples: tuple[str, ...]
    other_name: str | None = None
    extractor: str | None = None
    higher_is_better: bool = False
    neighbours: bool = False

    def key(self, extractor: Extractor) -> str:
        """Return the key in results for an extractor."""
        if extractor.label is None or extractor.label == label_of(self.extractor or ""):
            return self.name
        return f"{self.other_name or self.name}_{extractor.label}"


POOL, SPATIAL, ROWS = ("gaussian:pool",), ("gaussian:spatial",), ("pool",)
LABELS, LOGITS = ("labels",), ("logits",)
Score = partial(Metric, higher_is_better=True)  # a metric whose larger values are better
Neighbours = partial(Score, neighbours=True)
METRICS = {
    "fid": Metric("fid", lambda c: _frechet(c, "pool"), POOL, POOL, "fd"),
    "sfid": Metric("sfid", lambda c: _frechet(c, "spatial"), SPATIAL, SPATIAL, "sfd"),
    "is": Score("inception_score", _inception_score, (), LOGITS, "class_score"),
    "precision": Neighbours("precision", lambda c: _precision_or_recall(c, 0), ROWS, ROWS),
    "recall": Neighbours("recall", lambda c: _precision_or_recall(c, 1), ROWS, ROWS),
    "kid": Metric("kid", _kid, ROWS, ROWS, "kd"),
    "mind": Metric("mind", _mind, ROWS, ROWS),
    "fid_infinity": Metric("fid_infinity", _fid_infinity, POOL, ROWS, "fd_infinity"),
    "density": Score("density", lambda c: c.density_coverage[0], ROWS, ROWS),
    "coverage": Score("coverage", lambda c: c.density_coverage[1], ROWS, ROWS),
    "class_fid": Metric("class_fid", _class_fid, ROWS + LABELS, ROWS + LABELS, "class_fd"),
    "memorised": Metric("memorised", _memorised, ROWS, ROWS),
    "accuracy": Score("accuracy", _accuracy, (), LOGITS + LABELS),
    "fd_dinov2": Metric("fd_dinov2", lambda c: _frechet(c, "pool"), POOL, POOL, extractor="dinov2"),
    "kd_dinov2": Metric("kd_dinov2", _kid, ROWS, ROWS, extractor="dinov2"),
    "cmmd": Metric("cmmd", lambda c: extras.cmmd(*c.rows), ROWS, ROWS, extractor="clip"),
    **{
        name: Metric(
            "fid" if extractor == "inception" else name,
            lambda c: _frechet(c, "pool"),
            POOL,
            POOL,
            "fd",
            extractor,
        )
        for name, extractor in PARTS.items()
    },
}
