"""Run the commands of ``fid-eval`` that need torch."""

import argparse
import json
import sys
from pathlib import Path

import torch

from .choices import EXTRACTOR_NAMES
from .distributed import (
    choose_device,
    destroy_process_group,
    rank_and_world_size,
    run_on_all_ranks,
    run_on_rank0,
)
from .errors import EvaluationError
from .evaluator import Evaluator
from .features import Runtime
from .jobs import run_jobs
from .networks.extractors import get_extractor
from .references import save_reference
from .report import Document, table, write_csv, write_json, write_plot
from .sets.decoding import Preprocess


def run(options: argparse.Namespace) -> int:
    """Run the command of parsed options and return the exit code."""
    command = {"evaluate": _evaluate, "stats": _stats, "classifier": _classifier}[options.command]
    try:
        return command(options)
    except torch.OutOfMemoryError as error:
        raise EvaluationError(f"out of memory; use a smaller --batch_size ({error})") from None
    finally:
        destroy_process_group()


def _evaluate(options: argparse.Namespace) -> int:
    evaluator = run_on_all_ranks(
        lambda: Evaluator(
            options.reference,
            metrics=options.metrics,
            extractor=options.extractor,
            weights=_by_extractor(options.weights, options.extractor),
            weights_sha256=_by_extractor(options.weights_sha256, options.extractor),
            distances=options.distances,
            k=options.k,
            bootstrap=options.bootstrap,
            reference_kind=options.reference_kind,
            resize=options.resize,
            crop=options.crop,
            device=options.device,
            batch_size=options.batch_size,
            workers=options.workers,
            precision=options.precision,
            compile=options.compile,
            cache=options.cache,
            quiet=options.quiet,
        )
    )
    output = Path(options.output) if options.output else None
    document = run_jobs(evaluator, options.jobs, output, options.resume)
    failed = [entry for entry in document["sets"] if "error" in entry]
    if len(options.jobs) == 1 and failed:
        raise EvaluationError(failed[0]["error"])
    run_on_rank0(lambda: _write_outputs(document, options))
    return 1 if failed else 0


def _by_extractor(items: list[str], default: str) -> dict[str, str]:
    """Convert ["a", "clip=b"] to {default: "a", "clip": "b"}."""
    table = {}
    for item in items:
        name, separator, rest = item.partition("=")
        is_named = bool(separator) and name in EXTRACTOR_NAMES
        table[name if is_named else default] = rest if is_named else item
    return table


def _write_outputs(document: Document, options: argparse.Namespace) -> None:
    failed = [entry for entry in document["sets"] if "error" in entry]
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
    weights = _by_extractor(options.weights, options.extractor).get(options.extractor)
    sha256 = _by_extractor(options.weights_sha256, options.extractor).get(options.extractor)
    runtime = Runtime(
        choose_device(options.device),
        options.batch_size or 0,
        options.workers or 0,
        precision=options.precision,
        quiet=options.quiet,
        compile=options.compile,
        cache=Path(options.cache) if options.cache else None,
    )
    written = save_reference(
        options.source,
        options.output,
        get_extractor(options.extractor, weights, sha256),
        runtime,
        Preprocess(options.resize, options.crop),
        options.images,
        options.seed,
    )
    if rank == 0:
        print(f"wrote {written}" + (f"; use it as {options.name!r}" if options.name else ""))
    return 0


def _classifier(options: argparse.Namespace) -> int:
    from .networks.classifier import train_classifier

    train_classifier(
        options.data, options.output, options.name, options.epochs, options.seed, options.width
    )
    return 0
