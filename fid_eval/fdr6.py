"""Combine Fréchet distances in six representations (FDr6, arXiv 2604.28190).

Each distance is divided by the distance between ImageNet's training and validation set in the same
representation; FDr6 is the mean of the six ratios. The published divisors hold for ImageNet at
256 × 256. For other data, a results file of a held-out set against the same reference gives them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import EvaluationError

FDR6 = "fdr6"
PUBLISHED = "imagenet256"
PUBLISHED_DIVISORS = {  # by extractor
    "inception": 1.68,
    "r6-convnext": 56.87,
    "r6-dinov2": 14.19,
    "r6-mae": 0.04,
    "r6-siglip": 0.60,
    "r6-clip": 5.60,
}
PARTS = {f"fd_{name.replace('-', '_')}": name for name in PUBLISHED_DIVISORS}  # metric: extractor
MEASURE = "measure them: fid-eval REF HELD_OUT --metrics fdr6 --output divisors.json"


@dataclass
class Divisors:
    """Distances of a held-out set.

    Attributes:
        source: "imagenet256", or the path of a results file.
        values: divisors by extractor.
        keys: names of the distances in the results file, by extractor; empty if published.
        extractors: name, hash and preprocessing of each extractor; empty if published.
        reference_sha256: hash of the reference; None if published or unknown.
    """

    source: str
    values: dict[str, float]
    keys: dict[str, str]
    extractors: dict[str, dict[str, Any]]
    reference_sha256: str | None = None

    def check(self, keys: Mapping[str, str], identities: Mapping[str, dict[str, Any]]) -> None:
        """Raise unless the divisors were measured with the extractors of this run.

        Args:
            keys: names of the six distances in results, by extractor.
            identities: name, hash and preprocessing of each extractor.
        """
        for name, key in keys.items() if self.keys else ():
            before = {field: self.extractors[name].get(field) for field in identities[name]}
            if self.keys[name] != key or before != identities[name]:
                raise EvaluationError(
                    f"{self.source}: was made with other weights of {name}; use the same weights, "
                    f"or {MEASURE}"
                )

    def _mean_ratio(self, distances: Mapping[str, float]) -> tuple[float, dict[str, Any]]:
        """Return FDr6 of ``distances`` by extractor, and the divisors and ratios as details."""
        ratios = {name: distances[name] / self.values[name] for name in self.values}
        details = {"divisors": self.values, "divisors_from": self.source, "ratios": ratios}
        return sum(ratios.values()) / len(ratios), details


def load_divisors(source: str | Path) -> Divisors:
    """Return the published divisors, or read them from a results file of ``fid-eval``.

    Args:
        source: "imagenet256", or a JSON file written by ``fid-eval REF HELD_OUT --metrics fdr6
            --output FILE``.

    Raises:
        EvaluationError: the file is missing, or does not hold the six distances of one set.
    """
    if str(source) == PUBLISHED:
        return Divisors(PUBLISHED, dict(PUBLISHED_DIVISORS), {}, {})
    try:
        document = json.loads(Path(source).expanduser().read_text())
        sets = document["sets"]
        if len(sets) != 1:
            raise EvaluationError(
                f"{source}: holds {len(sets)} sets; give the results of one held-out set"
            )
        keys = {name: sets[0]["details"][FDR6]["keys"][name] for name in PUBLISHED_DIVISORS}
        values = {name: float(sets[0]["metrics"][key]) for name, key in keys.items()}
        extractors = {name: dict(document["extractors"][name]) for name in PUBLISHED_DIVISORS}
        sha256 = document["reference"].get("sha256")
    except OSError as error:
        raise EvaluationError(f"--divisors {source}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, EvaluationError):
            raise
        raise EvaluationError(
            f"--divisors {source}: holds no results of --metrics fdr6; {MEASURE}"
        ) from None
    if bad := [name for name, value in values.items() if not value > 0]:
        raise EvaluationError(
            f"--divisors {source}: the distance of {bad[0]} is not above 0; the held-out set must "
            "differ from the reference"
        )
    return Divisors(str(source), values, keys, extractors, sha256)


def combine(
    divisors: Divisors | None,
    keys: dict[str, str],
    metrics: Mapping[str, float],
    reference_sha256: str | None,
) -> tuple[float | None, dict[str, Any], str | None]:
    """Return FDr6, its details, and why it cannot be computed if it is None.

    Args:
        divisors: the divisors, if the user gave any.
        keys: names of the six distances in ``metrics``, by extractor.
        metrics: the results.
        reference_sha256: hash of the reference of this run.
    """
    details: dict[str, Any] = {"keys": keys}
    if divisors is None:
        return None, details, f"fdr6 has no mean without --divisors; {MEASURE}"
    if divisors.reference_sha256 not in (None, reference_sha256):
        reason = f"fdr6 has no mean: {divisors.source} was made with another reference; {MEASURE}"
        return None, details, reason
    value, more = divisors._mean_ratio({name: metrics[key] for name, key in keys.items()})
    return value, details | more, None
