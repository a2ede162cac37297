"""Evaluate many sample sets against one reference, continue after errors, resume after a kill."""

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .distributed import rank_and_world_size, run_on_all_ranks, run_on_rank0
from .errors import EvaluationError, describe_error
from .evaluator import Evaluator
from .jobs_file import Job
from .report import Document, versions, write_json
from .sets.decoding import POLICY_VERSION
from .sets.image_set import ImageSet
from .time_limit import time_limit


def run_jobs(
    evaluator: Evaluator,
    jobs: list[Job],
    output: Path | None = None,
    resume: bool = False,
    seconds: float | None = None,
    debug: bool = False,
) -> Document:
    """Evaluate sample sets. An error of any type ends only the set that caused it.

    Args:
        evaluator: the reference, metrics and settings.
        jobs: the sample sets.
        output: JSON file that is written after every set.
        resume: keep the results of an existing ``output`` whose settings are the same, and
            evaluate only sets that are missing, failed or changed.
        seconds: time limit for opening a set, and again for evaluating it.
        debug: print the traceback of each error.

    Returns:
        A document with a result or an error for each set.

    Raises:
        EvaluationError: ``output`` has results of other settings, or two sets have the same name.
    """
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise EvaluationError(f"two sets are called {name!r}; give them different names")
    earlier = run_on_rank0(lambda: _earlier_results(output, evaluator)) if resume else None
    document: Document = dict(
        versions=versions(), settings={}, reference={}, extractors={}, sets=[]
    )

    def attempt(job: Job, function: Callable[[], Any]) -> Any:
        try:
            with time_limit(seconds, job.name):
                return function()
        except Exception as error:
            if debug and rank_and_world_size()[0] == 0:
                traceback.print_exception(error)
            _release_frames(error)
            return _Failure(describe_error(error, job.name))

    def open_on_all_ranks(job: Job) -> ImageSet:
        return run_on_all_ranks(lambda: evaluator.open(job.path, job.name))

    # Open all sets before the first network is built, to find mistakes early.
    opened = [attempt(job, partial(open_on_all_ranks, job)) for job in jobs]
    for job, found in zip(jobs, opened, strict=True):
        entry = found
        if isinstance(found, ImageSet):
            entry = attempt(job, partial(_entry, evaluator, job, found, document, earlier))
        if isinstance(entry, _Failure):
            entry = {"name": job.name, "error": entry.message}
        if job.x is not None:
            entry["x"] = job.x
        document["sets"].append(entry)
        if not document["settings"]:  # The hash of the reference is known by now.
            document["settings"] = run_on_rank0(lambda: fingerprint(evaluator))
        if output is not None and rank_and_world_size()[0] == 0:
            write_json(document, output)
    return document


@dataclass
class _Failure:
    """The error message of a set."""

    message: str


def _release_frames(error: BaseException | None) -> None:
    """Clear the frames of an error, because their variables hold loaders and images."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _entry(
    evaluator: Evaluator, job: Job, found: ImageSet, document: Document, earlier: Document | None
) -> dict[str, Any]:
    """Return the earlier result of a set if it is still valid; else evaluate the set."""
    entry = run_on_rank0(lambda: _earlier_entry(earlier, job, found))
    if earlier is not None and entry is not None:
        document["reference"] = document["reference"] or earlier["reference"]
        document["extractors"] = {**earlier["extractors"], **document["extractors"]}
        return entry
    result = evaluator(found, metrics=job.metrics).to_dict()
    entry = json.loads(json.dumps({**result, "asked": job.metrics}))
    document["reference"] = entry.pop("reference")
    document["extractors"].update(entry.pop("extractors"))
    return entry


def fingerprint(evaluator: Evaluator) -> dict[str, Any]:
    """Return the settings that determine the results; resuming requires the same settings."""
    extractors = {each.name: each for each in map(evaluator.extractor_of, evaluator.names)}
    settings: dict[str, Any] = {
        "metrics": evaluator.names,
        "reference": evaluator.reference.name,
        "reference_sha256": evaluator.reference.content_hash(),
        "reference_kind": evaluator.reference_kind,
        "extractors": {
            name: {**extractor.identity(), "label": extractor.label}
            for name, extractor in sorted(extractors.items())
        },
        "distances": evaluator.distances,
        "k": evaluator.k,
        "bootstrap": evaluator.bootstrap,
        "resize": str(evaluator.preprocess),
        "precision": evaluator.runtime.precision,
    }
    if evaluator.divisors is not None:
        settings["divisors"] = evaluator.divisors.values
    return json.loads(json.dumps(settings))


def _earlier_results(output: Path | None, evaluator: Evaluator) -> Document | None:
    """Load the results to resume from, or None if there are none; raise if settings differ."""
    if output is None or not output.exists():
        return None
    settings = fingerprint(evaluator)
    try:
        document = json.loads(output.read_text())
        before = document["settings"]
    except (ValueError, KeyError, TypeError):
        raise EvaluationError(
            f"{output}: not a results file of fid-eval; choose another --output or add --overwrite"
        ) from None
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        raise EvaluationError(
            f"{output}: has results with {changed[0]} {before.get(changed[0])!r}, but this run has "
            f"{settings[changed[0]]!r}; choose another --output, or replace --resume by "
            "--overwrite"
        )
    return document


def _earlier_entry(earlier: Document | None, job: Job, found: ImageSet) -> dict[str, Any] | None:
    """Return the earlier result of a set with the same name, metrics and content, or None."""
    for entry in earlier["sets"] if earlier else []:
        if entry["name"] != job.name or "error" in entry or entry["asked"] != job.metrics:
            continue
        policy = entry["samples"].get("reading", {}).get("policy", 1)  # 0.1.0 stores none
        if policy != POLICY_VERSION and found.facts()["conversions"]:
            continue  # The same files may be decoded to other pixels now.
        sha256 = found.content_hash()
        if sha256 is not None and entry["samples"]["sha256"] == sha256:
            return entry
    return None
