"""Many sample sets against one reference: past a broken one, and on after a kill."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .distributed import on_first, together, world
from .errors import EvaluationError
from .evaluator import Evaluator
from .report import Document, versions, write_json
from .sets.image_set import ImageSet
from .text import nearest_name

SET_KEYS = ("path", "name", "metrics", "x")


@dataclass
class Job:
    """One sample set: where, what it is called, its own metrics, its place on a plot."""

    path: str
    name: str
    metrics: list[str] | None = None
    x: float | None = None


def read_jobs(path: Path, options: Iterable[str]) -> tuple[dict[str, Any], list[Job]]:
    """(settings, sets) of a jobs YAML: ``reference``, ``sets`` and any option of the command."""
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise EvaluationError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise EvaluationError(f"{path}: a jobs file holds `reference:` and `sets:`")
    document = {str(key).replace("-", "_"): value for key, value in document.items()}
    known = ("reference", "sets", *options)
    for key in document:
        if key not in known:
            raise EvaluationError(f"{path}: unknown key {key!r}; {nearest_name(key, known)}")
    for key in ("reference", "sets"):
        if not document.get(key):
            raise EvaluationError(f"{path}: {key!r} is missing")
    sets = document.pop("sets")
    if isinstance(sets, dict):
        sets = [
            {"name": str(name), **(value if isinstance(value, dict) else {"path": value})}
            for name, value in sets.items()
        ]
    if not isinstance(sets, list):
        raise EvaluationError(f"{path}: 'sets' is a list of paths, or names with paths")
    return document, [_job(item, path) for item in sets]


def _job(item: Any, path: Path) -> Job:
    if isinstance(item, str):
        return Job(item, item)
    if not isinstance(item, dict):
        raise EvaluationError(f"{path}: a set is a path or a mapping, not {item!r}")
    for key in item:
        if key not in SET_KEYS:
            raise EvaluationError(
                f"{path}: unknown key {key!r} of a set; {nearest_name(str(key), SET_KEYS)}"
            )
    if not isinstance(item.get("path"), str):
        raise EvaluationError(f"{path}: a set has no 'path': {item!r}")
    metrics = item.get("metrics")
    if isinstance(metrics, str):
        metrics = [name.strip() for name in metrics.split(",")]
    return Job(item["path"], str(item.get("name", item["path"])), metrics, item.get("x"))


def run_jobs(
    evaluator: Evaluator, jobs: list[Job], output: Path | None = None, overwrite: bool = False
) -> Document:
    """Measure every set; the document holds a result or an error for each.

    With ``output``, the document is written after every set, and sets that it already holds
    (same settings, same content) are not measured again. A file of other settings is an error
    unless ``overwrite``.
    """
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise EvaluationError(f"two sets are called {name!r}; give each a name of its own")
    earlier = on_first(lambda: _earlier(output, evaluator, overwrite))
    document: Document = {
        "versions": versions(),
        "settings": {},
        "reference": {},
        "extractors": {},
        "sets": [],
    }
    # every set is looked at before the first network is built
    opened = [_attempt(lambda: evaluator.open(job.path, job.name)) for job in jobs]  # noqa: B023
    for job, found in zip(jobs, opened, strict=True):
        entry = None
        if isinstance(found, ImageSet):
            entry = on_first(lambda: _reusable(earlier, job, found))  # noqa: B023
        if earlier is not None and entry is not None:
            document["reference"] = document["reference"] or earlier["reference"]
            document["extractors"] = {**earlier["extractors"], **document["extractors"]}
        else:
            entry = _measured(evaluator, job, found, document)
        if job.x is not None:
            entry["x"] = job.x
        document["sets"].append(entry)
        if not document["settings"]:  # now that the reference has been read and hashed
            document["settings"] = on_first(lambda: fingerprint(evaluator))
        if output is not None and world()[0] == 0:
            write_json(document, output)
    return document


def _attempt(function: Any) -> Any:
    """The result, or the EvaluationError as a value."""
    try:
        return together(function)
    except (EvaluationError, OSError) as error:
        return error


def _measured(evaluator: Evaluator, job: Job, found: Any, document: Document) -> dict[str, Any]:
    if isinstance(found, ImageSet):
        try:
            result = evaluator(found, metrics=job.metrics)
        except (EvaluationError, OSError) as error:
            found = error
        else:
            entry = {**result.to_dict(), "asked": job.metrics}
            document["reference"] = entry.pop("reference")
            document["extractors"].update(entry.pop("extractors"))
            return json.loads(json.dumps(entry))
    return {"name": job.name, "error": str(found)}


def fingerprint(evaluator: Evaluator) -> dict[str, Any]:
    """What decides the numbers of a run; a results file is continued only if it agrees."""
    extractors = {evaluator.extractor_of(name).name for name in evaluator.names}
    settings = {
        "metrics": evaluator.names,
        "reference": evaluator.reference.name,
        "reference_sha256": evaluator.reference.content_hash(),
        "reference_kind": evaluator.reference_kind,
        "extractors": {
            name: {
                **evaluator.extractors[name].identity(),
                "label": evaluator.extractors[name].label,
            }
            for name in sorted(extractors)
        },
        "distances": evaluator.distances,
        "k": evaluator.k,
        "bootstrap": evaluator.bootstrap,
        "resize": str(evaluator.preprocess),
        "precision": evaluator.runtime.precision,
    }
    return json.loads(json.dumps(settings))


def _earlier(output: Path | None, evaluator: Evaluator, overwrite: bool) -> Document | None:
    if output is None or overwrite or not output.exists():
        return None
    settings = fingerprint(evaluator)
    try:
        document = json.loads(output.read_text())
        before = document["settings"]
    except (ValueError, KeyError, TypeError):
        raise EvaluationError(
            f"{output}: exists and is no results file of fid-eval; choose another --output"
        ) from None
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        raise EvaluationError(
            f"{output}: holds results of another {changed[0]} ({before.get(changed[0])!r}, now "
            f"{settings[changed[0]]!r}); choose another --output, or say --overwrite"
        )
    return document


def _reusable(earlier: Document | None, job: Job, found: ImageSet) -> dict[str, Any] | None:
    for entry in earlier["sets"] if earlier else []:
        if entry["name"] != job.name or "error" in entry or entry["asked"] != job.metrics:
            continue
        sha256 = found.content_hash()
        if sha256 is not None and entry["samples"]["sha256"] == sha256:
            return entry
    return None
