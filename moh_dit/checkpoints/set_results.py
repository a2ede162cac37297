"""Find results of ``fid-eval`` for sample sets of a run."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LARGEST_RESULT = 50_000_000  # bytes; larger JSON files are not results


@dataclass
class SetResult:
    """The result of one sample set.

    Attributes:
        name: name of the set in the results.
        file: the results file.
        path: the sample set, if it was made from the run.
        metrics: values by name.
        intervals: 95 % intervals by name, for results with a bootstrap.
        samples: count and hash of the samples.
        reference: name and size of the reference.
        extractors: names of the feature networks.
        warnings: remarks on the conditions of the measurement.
    """

    name: str
    file: Path
    path: Path | None
    metrics: dict[str, float]
    intervals: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    extractors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find_results(run: Path, sets: list[Path]) -> list[SetResult]:
    """Find results in the run folder and beside the sample sets of the run.

    A result in the run folder always counts. A result beside a set counts if it has the path of
    that set.

    Args:
        run: the run folder.
        sets: sample sets that were made from the run.
    """
    found = []
    folders = dict.fromkeys([run.resolve(), *(path.resolve().parent for path in sets)])
    for folder in folders:
        for file in sorted(folder.glob("*.json")):
            for result in read_results(file, sets):
                if result.path is not None or folder == run.resolve():
                    found.append(result)
    return found


def read_results(file: Path, sets: Iterable[Path]) -> list[SetResult]:
    """Read a results file of ``fid-eval``; return nothing for other files and failed sets."""
    try:
        if file.stat().st_size > LARGEST_RESULT:
            return []
        document = json.loads(file.read_text())
        reference, extractors = document["reference"], list(document["extractors"])
        entries = [entry for entry in document["sets"] if entry.get("metrics")]
        return [
            SetResult(
                str(entry["name"]), file, _set_of(str(entry["name"]), sets), dict(entry["metrics"]),
                entry.get("intervals") or {}, entry.get("samples") or {}, reference, extractors,
                entry.get("warnings") or [],
            )
            for entry in entries
        ]  # fmt: skip
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []


def _set_of(name: str, sets: Iterable[Path]) -> Path | None:
    """Return the set that a name stands for: an absolute path, or the end of the path of a set."""
    parts = tuple(part for part in Path(name).parts if part != "..")
    return next((path for path in sets if path.resolve().parts[-len(parts) :] == parts), None)
