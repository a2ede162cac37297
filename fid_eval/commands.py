"""Run the commands of ``fid-eval`` that need torch."""

import argparse
import json
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

from .choices import EXTRACTOR_NAMES
from .distributed import destroy_process_group, rank_and_world_size, run_on_all_ranks, run_on_rank0
from .errors import EvaluationError
from .evaluator import Evaluator
from .fdr6 import FDR6, PARTS
from .features import Runtime
from .jobs import run_jobs
from .networks.extractors import get_extractor
from .reconstruction import evaluate_reconstructions
from .references import save_reference
from .report import Document, document_of, table, write_csv, write_json, write_plot
from .saved_references import saved_references
from .sets.checking import check_sets
from .sets.decoding import Preprocess


def run(options: argparse.Namespace) -> int:
    """Run the command of parsed options and return the exit code."""
    commands = {
        "evaluate": _evaluate,
        "stats": _stats,
        "classifier": _classifier,
        "reconstruction": _reconstruction,
    }
    try:
        return commands[options.command](options)
    finally:
        destroy_process_group()


def _evaluate(options: argparse.Namespace) -> int:
    if options.check:
        reference = saved_references().get(options.reference, options.reference)
        paths = [str(reference), *(job.path for job in options.jobs)]
        return check_sets(paths, _preprocess(options), options.quiet)
    settings = _arguments_of(Evaluator, options) | _arguments_of(Runtime, options)
    settings["weights"] = _by_extractor(options.weights, options.extractor)
    settings["weights_sha256"] = _by_extractor(options.weights_sha256, options.extractor)
    evaluator = run_on_all_ranks(lambda: Evaluator(**settings))
    output = Path(options.output) if options.output else None
    document = run_jobs(
        evaluator, options.jobs, output, options.resume, options.time_limit, options.debug
    )
    failed = [entry for entry in document["sets"] if "error" in entry]
    if len(options.jobs) == 1 and failed:
        raise EvaluationError(failed[0]["error"])
    run_on_rank0(lambda: _write_outputs(document, failed, options))
    return 1 if failed else 0


def _preprocess(options: argparse.Namespace) -> Preprocess:
    return Preprocess(options.resize, options.crop, options.background, options.strict)


def _arguments_of(function: Callable, options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that are parameters of ``function``, by name."""
    names = signature(function).parameters
    return {name: value for name, value in vars(options).items() if name in names}


def _by_extractor(items: list[str], default: str) -> dict[str, str]:
    """Convert ["a", "clip=b"] to {default: "a", "clip": "b"}."""
    prefixes = tuple(f"{name}=" for name in (*EXTRACTOR_NAMES, "lpips"))
    named = [item if item.startswith(prefixes) else f"{default}={item}" for item in items]
    return dict(item.split("=", 1) for item in named)


def _write_outputs(document: Document, failed: list[dict], options: argparse.Namespace) -> None:
    if options.output:
        write_json(document, Path(options.output))
    if options.csv:
        write_csv(document, Path(options.csv))
    if options.plot and len(failed) < len(document["sets"]):
        write_plot(document, Path(options.plot), options.plot_metrics)
    print(json.dumps(document, indent=1) if options.json else table(document), flush=True)
    for entry in failed:
        print(f"{options.prog}: error: {entry['error']}", file=sys.stderr, flush=True)


def _stats(options: argparse.Namespace) -> int:
    rank, _ = rank_and_world_size()
    listed = options.extractor.split(",")
    names = [name for each in listed for name in (PARTS.values() if each == FDR6 else (each,))]
    weights = _by_extractor(options.weights, names[0])
    sha256 = _by_extractor(options.weights_sha256, names[0])
    extractor, *others = [
        get_extractor(name, weights.get(name), sha256.get(name)) for name in dict.fromkeys(names)
    ]
    runtime = Runtime(**_arguments_of(Runtime, options))
    preprocess = _preprocess(options)
    images, seed = options.images, options.seed
    written = save_reference(
        options.source, options.output, extractor, runtime, preprocess, images, seed, others
    )
    if rank == 0:
        print(f"wrote {written}" + (f"; use it as {options.name!r}" if options.name else ""))
    return 0


def _reconstruction(options: argparse.Namespace) -> int:
    settings = _arguments_of(evaluate_reconstructions, options) | _arguments_of(Runtime, options)
    settings["weights"] = _by_extractor(options.weights, options.extractor)
    settings["weights_sha256"] = _by_extractor(options.weights_sha256, options.extractor)
    document = document_of(evaluate_reconstructions(**settings))
    if options.output:
        write_json(document, Path(options.output))
    print(json.dumps(document, indent=1) if options.json else table(document), flush=True)
    return 0


def _classifier(options: argparse.Namespace) -> int:
    from .networks.classifier_training import train_classifier

    runtime = Runtime(**_arguments_of(Runtime, options))
    settings = _arguments_of(train_classifier, options)
    train_classifier(**settings | {"device": runtime.device, "workers": runtime.workers})
    return 0
