"""Represent the metrics of one sample set and the conditions of the measurement."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """Metrics of one sample set, with the conditions of the measurement.

    ``result["fid"]`` is short for ``result.metrics["fid"]``.

    Attributes:
        name: name of the sample set.
        metrics: values, in the requested order.
        intervals: 95 % bootstrap intervals (low, high).
        details: further values of a metric, such as distances within each class.
        samples: name, kind, image count, hash and preprocessing of the samples.
        reference: the same for the reference, and which part of it gave the Fréchet distance.
        extractors: name, weights hash, precision and device of each extractor.
        warnings: differences from the conditions of published results, metrics left out.
        higher_is_better: for each metric.
        seconds: duration of each stage.
    """

    name: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    extractors: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, key: str) -> float:
        return self.metrics[key]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can represent."""
        return dict(vars(self))
