"""The metrics by name: what each needs of the two sets, how it is computed, what it is called.

Names that readers know from papers (fid, sfid, inception_score, precision, …) are given to numbers
of the published Inception alone. With any other extractor the name carries the extractor:
fd_digits, sfd_digits, class_score_digits, precision_digits, …
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .errors import EvaluationError
from .features import Features
from .metrics import extras
from .metrics.adm import frechet_from_factors, inception_score, precision_recall_flags
from .metrics.neighbours import Precision
from .networks.extractors import Extractor

INCEPTION_SCORE_SPLIT = 5000
BOOTSTRAP_SIGMAS = 1.96  # the resampled mean of a Fréchet distance is biased, its spread is not


@dataclass
class Pair:
    """A reference and a sample set as features of one extractor, with what metrics share."""

    reference: Features
    samples: Features
    extractor: Extractor
    device: torch.device
    mode: Precision
    k: int = 3
    bootstrap: int = 0
    details: dict[str, Any] = field(default_factory=dict)  # of the metric being measured
    interval: tuple[float, float] | None = None  # likewise

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        return tuple(f.rows["pool"].to(self.device) for f in (self.reference, self.samples))  # type: ignore[return-value]

    @cached_property
    def flags(self) -> tuple[Tensor, Tensor]:
        return precision_recall_flags(*self.rows, self.mode, self.k)

    @cached_property
    def logits(self) -> Tensor:
        if self.samples.logits is not None:
            return self.samples.logits
        return self.extractor.logits(self.samples.rows["pool"], self.device)

    @cached_property
    def density_coverage(self) -> tuple[float, float]:
        return extras.density_coverage(*self.rows)

    def gaussians(self, layer: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sets = (self.reference, self.samples)
        return sum((one.gaussian(layer, self.device) for one in sets), ())  # type: ignore[return-value]

    def spread(self, value: float, of_subset: Callable[[Tensor], float], count: int) -> float:
        """Notes a 95 % interval by resampling, when asked, and returns the value."""
        if self.bootstrap:
            deviation = extras.bootstrap_deviation(of_subset, count, self.bootstrap)
            half = BOOTSTRAP_SIGMAS * deviation
            self.interval = (value - half, value + half)
        return value


def _frechet(pair: Pair, layer: str) -> float:
    gaussians = pair.gaussians(layer)
    value = frechet_from_factors(*gaussians)
    if pair.bootstrap and layer in pair.samples.rows:
        rows = pair.samples.rows[layer]

        def of_subset(index: Tensor) -> float:
            return frechet_from_factors(
                *gaussians[:2], *extras.gaussian_of(rows[index], pair.device)
            )

        return pair.spread(value, of_subset, len(rows))
    return value


def _score(pair: Pair) -> float:
    logits = pair.logits
    pair.details["split_size"] = INCEPTION_SCORE_SPLIT
    value = inception_score(logits, INCEPTION_SCORE_SPLIT)
    return pair.spread(
        value, lambda i: inception_score(logits[i], INCEPTION_SCORE_SPLIT), len(logits)
    )


def _share(pair: Pair, flags: Tensor) -> float:
    flags = flags.double().cpu()
    return pair.spread(float(flags.mean()), lambda i: float(flags[i].mean()), len(flags))


def _precision(pair: Pair) -> float:
    pair.details.update(distances=pair.mode, k=pair.k)
    return _share(pair, pair.flags[0])


def _recall(pair: Pair) -> float:
    pair.details.update(distances=pair.mode, k=pair.k)
    return _share(pair, pair.flags[1])


def _kid(pair: Pair) -> float:
    value, deviation = extras.kid(*pair.rows)
    smaller = min(len(rows) for rows in pair.rows)
    pair.details.update(deviation=deviation, subsets=100, subset_size=min(1000, smaller))
    return value


def _infinity(pair: Pair) -> float:
    gaussian = pair.gaussians("pool")[:2]
    value, curve = extras.fid_infinity(gaussian, pair.samples.rows["pool"])
    pair.details["curve"] = curve
    return value


def _class_frechet(pair: Pair) -> float:
    labels = pair.reference.labels, pair.samples.labels
    assert labels[0] is not None
    assert labels[1] is not None
    distances = extras.class_frechet_distances(
        pair.rows[0], labels[0].numpy(), pair.rows[1], labels[1].numpy()
    )
    pair.details["classes"] = {str(label): value for label, value in distances.items()}
    return sum(distances.values()) / len(distances)


def _memorised(pair: Pair) -> float:
    value, pair.details["closest"] = extras.memorised_share(*pair.rows)
    return value


def _accuracy(pair: Pair) -> float:
    logits, labels = pair.logits, pair.samples.labels
    assert labels is not None
    if int(labels.max()) >= logits.shape[1] or int(labels.min()) < 0:
        raise EvaluationError(
            f"accuracy: labels from {int(labels.min())} to {int(labels.max())}, but the extractor "
            f"{pair.extractor.name} knows {logits.shape[1]} classes"
        )
    right = logits.argmax(1) == labels
    pair.details["classes"] = {
        str(label): float(right[labels == label].double().mean())
        for label in sorted(set(labels.tolist()))
    }
    return _share(pair, right)


@dataclass(frozen=True)
class Metric:
    """How one metric is named, what it needs and how it is measured."""

    inception: str  # key with the published Inception
    other: str  # with another extractor: this, then its label
    measure: Callable[[Pair], float]
    reference: frozenset[str]  # needs: "pool"/"spatial" rows, "gaussian:layer", "labels"
    samples: frozenset[str]  # likewise, and "logits"
    extractor: str | None = None  # the one it is defined with, where that is not a choice
    higher_is_better: bool = False

    def key(self, extractor: Extractor) -> str:
        if extractor.label is None:
            return self.inception
        if self.extractor == extractor.label:
            return self.inception
        if self.extractor is not None:
            return f"{self.inception}_{extractor.label}"
        return f"{self.other}_{extractor.label}"


def _metric(
    inception: str,
    other: str,
    measure: Callable[[Pair], float],
    reference: str,
    samples: str,
    extractor: str | None = None,
    up: bool = False,
) -> Metric:
    needs = frozenset(reference.split()), frozenset(samples.split())
    return Metric(inception, other, measure, *needs, extractor, up)


POOL, SPATIAL = "gaussian:pool", "gaussian:spatial"
METRICS = {
    "fid": _metric("fid", "fd", lambda p: _frechet(p, "pool"), POOL, POOL),
    "sfid": _metric("sfid", "sfd", lambda p: _frechet(p, "spatial"), SPATIAL, SPATIAL),
    "is": _metric("inception_score", "class_score", _score, "", "logits", up=True),
    "precision": _metric("precision", "precision", _precision, "pool", "pool", up=True),
    "recall": _metric("recall", "recall", _recall, "pool", "pool", up=True),
    "kid": _metric("kid", "kd", _kid, "pool", "pool"),
    "fid_infinity": _metric("fid_infinity", "fd_infinity", _infinity, POOL, "pool"),
    "density": _metric(
        "density", "density", lambda p: p.density_coverage[0], "pool", "pool", up=True
    ),
    "coverage": _metric(
        "coverage", "coverage", lambda p: p.density_coverage[1], "pool", "pool", up=True
    ),
    "class_fid": _metric("class_fid", "class_fd", _class_frechet, "pool labels", "pool labels"),
    "memorised": _metric("memorised", "memorised", _memorised, "pool", "pool"),
    "accuracy": _metric("accuracy", "accuracy", _accuracy, "", "logits labels", up=True),
    "fd_dinov2": _metric("fd_dinov2", "", lambda p: _frechet(p, "pool"), POOL, POOL, "dinov2"),
    "cmmd": _metric("cmmd", "", lambda p: extras.cmmd(*p.rows), "pool", "pool", "clip"),
}
DEFAULT_METRICS = ("fid", "sfid", "is", "precision", "recall")
