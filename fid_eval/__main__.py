"""fid-eval REF SAMPLES...            metrics of sample sets against a reference
fid-eval JOBS.yaml                  the same, from a file
fid-eval stats SOURCE --name NAME   make a reference, to be used by its name
fid-eval references                 list saved references

REF and SAMPLES: .npz, folder, zip, WebDataset tar, .safetensors, hf://owner/name; REF may be the
name of a saved reference. Under `torchrun` or `accelerate launch` all processes share the work.
Exit code: 0, 1 if one of several sets failed, 2 for bad input.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch

from .distributed import choose_device, leave, on_first, together, world
from .errors import EvaluationError
from .evaluator import Evaluator, ReferenceKind
from .features import Runtime
from .jobs import Job, read_jobs, run_jobs
from .metric_registry import DEFAULT_METRICS, METRICS
from .metrics.neighbours import Precision
from .networks.extractors import EXTRACTORS, NetworkPrecision, get_extractor
from .references import home, save_reference, saved_references
from .report import Document, table, write_csv, write_json, write_plot
from .sets.decoding import Preprocess


class Parser(argparse.ArgumentParser):
    """Argument errors as one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise EvaluationError(f"{message} (see {self.prog} --help)")


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 is needed")
    return value


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("extractor and images")
    group.add_argument(
        "--extractor",
        default="inception",
        help=f"{', '.join(EXTRACTORS)}, or package.module:factory (default: inception)",
    )
    group.add_argument(
        "--weights",
        action="append",
        metavar="[NAME=]PATH",
        default=[],
        help="local weights of the extractor (or of the one called NAME)",
    )
    group.add_argument(
        "--weights-sha256",
        action="append",
        metavar="[NAME=]HASH",
        default=[],
        help="the hash the weights must have; needed for unpublished ones",
    )
    group.add_argument(
        "--resize", type=positive, metavar="SIZE", help="make images SIZE × SIZE pixels"
    )
    group.add_argument(
        "--crop",
        action="store_true",
        help="with --resize: cut the centre instead of stretching, as ADM does for training data",
    )
    group = parser.add_argument_group("how it runs")
    group.add_argument(
        "--precision",
        choices=get_args(NetworkPrecision),
        default="float32",
        help="of the network; tf32 and bf16 are faster and move FID (default: float32)",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    group.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    group.add_argument(
        "--batch-size", type=positive, help="images at a time (default: 64, 128 on a GPU)"
    )
    group.add_argument(
        "--workers", type=positive, help="that load (default: one a core, 16 at most)"
    )
    group.add_argument(
        "--cache", metavar="DIR", help="keep features there, by content hash (default: nowhere)"
    )
    group.add_argument("--quiet", action="store_true", help="no progress")


def evaluation_parser() -> Parser:
    parser = Parser(
        prog="fid-eval",
        description=__doc__,
        epilog="example: fid-eval digits.npz samples.npz --extractor digits --output metrics.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("reference", metavar="REF", help="reference, or a jobs YAML alone")
    parser.add_argument("samples", metavar="SAMPLES", nargs="*", help="one or more sample sets")
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--metrics",
        type=names,
        metavar="A,B,…",
        help=f"of {', '.join(METRICS)} (default: {','.join(DEFAULT_METRICS)}, and accuracy where "
        "the extractor knows the labels)",
    )
    group.add_argument(
        "--distances",
        choices=get_args(Precision),
        help="for precision and recall (default: adm-fp16 with Inception, as in papers; else fp32)",
    )
    group.add_argument(
        "--k", type=positive, default=3, help="neighbours for precision and recall (default: 3)"
    )
    group.add_argument(
        "--bootstrap",
        type=positive,
        default=0,
        metavar="N",
        help="95 %% intervals from N resamples (default: none)",
    )
    group.add_argument(
        "--reference-kind",
        choices=get_args(ReferenceKind),
        default="auto",
        help="Fréchet distance from the reference's statistics or its images (default: auto, the "
        "statistics where there are any)",
    )
    add_runtime_options(parser)
    group = parser.add_argument_group("results")
    group.add_argument(
        "--output",
        metavar="FILE.json",
        help="written after every set; run the same command again to go on after a kill",
    )
    group.add_argument("--overwrite", action="store_true", help="replace results of other settings")
    group.add_argument("--csv", metavar="FILE.csv")
    group.add_argument("--plot", metavar="FILE.png", help="metrics over the sets")
    group.add_argument("--plot-metrics", type=names, metavar="A,B,…", help="those to plot")
    group.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser


def as_arguments(settings: dict[str, Any]) -> list[str]:
    """A jobs file's settings as command-line arguments, so that both are checked alike."""
    arguments = []
    for key, value in settings.items():
        option = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            arguments += [option] if value else []
        elif isinstance(value, list):
            arguments += [option, ",".join(map(str, value))]
        elif isinstance(value, dict):
            for name, item in value.items():
                arguments += [option, f"{name}={item}"]
        elif value is not None:
            arguments += [option, str(value)]
    return arguments


def by_name(items: list[str], default: str) -> dict[str, str]:
    """["a", "clip=b"] → {default: "a", "clip": "b"}."""
    table = {}
    for item in items:
        name, separator, rest = item.partition("=")
        is_named = bool(separator) and name in EXTRACTORS
        table[name if is_named else default] = rest if is_named else item
    return table


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[Job]]:
    parser = evaluation_parser()
    options = parser.parse_intermixed_args(argv)
    path = Path(options.reference)
    if path.suffix in (".yaml", ".yml"):
        if options.samples:
            raise EvaluationError(f"{path}: a jobs file names its sets; give it alone")
        known = set(vars(options)) - {"reference", "samples"}
        settings, jobs = read_jobs(path, known)
        reference = str(settings.pop("reference"))
        given = [item for item in argv if item != str(options.reference)]
        # the file first: the command line has the last word
        options = parser.parse_intermixed_args([reference, *as_arguments(settings), *given])
        return options, jobs
    if not options.samples:
        raise EvaluationError(
            f"{options.reference}: no samples to compare with it (fid-eval REF SAMPLES...)"
        )
    return options, [Job(sample, sample) for sample in options.samples]


def evaluation(argv: list[str]) -> int:
    options, jobs = parse(argv)
    world()
    on_first(lambda: check_writable([options.output, options.csv, options.plot]))
    evaluator = together(
        lambda: Evaluator(
            options.reference,
            metrics=options.metrics,
            extractor=options.extractor,
            weights=by_name(options.weights, options.extractor),
            weights_sha256=by_name(options.weights_sha256, options.extractor),
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
    document = run_jobs(evaluator, jobs, output, options.overwrite)
    failed = [entry for entry in document["sets"] if "error" in entry]
    if len(jobs) == 1 and failed:
        raise EvaluationError(failed[0]["error"])
    on_first(lambda: write_outputs(document, options))
    return 1 if failed else 0


def check_writable(outputs: list[str | None]) -> None:
    """Find out before the work whether results can be written where they are wanted."""
    for output in filter(None, outputs):
        folder = Path(output).absolute().parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(f"{output}: cannot make its folder ({error.strerror})") from None
        if Path(output).is_dir() or not os.access(folder, os.W_OK):
            raise EvaluationError(f"{output}: cannot be written; choose another path")


def write_outputs(document: Document, options: argparse.Namespace) -> None:
    failed = [entry for entry in document["sets"] if "error" in entry]
    if options.output:
        write_json(document, Path(options.output))
    if options.csv:
        write_csv(document, Path(options.csv))
    if options.plot and len(failed) < len(document["sets"]):
        write_plot(document, Path(options.plot), options.plot_metrics)
    print(json.dumps(document, indent=1) if options.json else table(document), flush=True)
    for entry in failed:
        print(f"error: {entry['error']}", file=sys.stderr, flush=True)


def stats(argv: list[str]) -> int:
    parser = Parser(
        prog="fid-eval stats",
        description="Make an ADM-compatible reference file.",
        epilog="example: fid-eval stats train/ --name birds256 --resize 256 --crop",
    )
    parser.add_argument("source", help="images: .npz, folder, zip, tar, hf://owner/name")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--name", help=f"save under this name in {home() / 'references'}")
    where.add_argument("--output", metavar="FILE.npz", help="save to this file")
    parser.add_argument(
        "--images",
        type=positive,
        default=10_000,
        help="images kept for precision and recall (default: 10,000)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the choice of those images (default: 0)"
    )
    add_runtime_options(parser)
    options = parser.parse_args(argv)
    if options.crop and options.resize is None:
        raise EvaluationError("--crop needs --resize SIZE: to what size?")
    if options.name and Path(options.name).name != options.name:
        raise EvaluationError(f"{options.name!r} is no plain name; use --output for a path")
    world()
    weights = by_name(options.weights, options.extractor).get(options.extractor)
    sha256 = by_name(options.weights_sha256, options.extractor).get(options.extractor)
    extractor = get_extractor(options.extractor, weights, sha256)
    runtime = Runtime(
        choose_device(options.device),
        options.batch_size or 0,
        options.workers or 0,
        precision=options.precision,
        quiet=options.quiet,
        compile=options.compile,
        cache=Path(options.cache) if options.cache else None,
    )
    output = options.output or home() / "references" / f"{options.name}.npz"
    written = save_reference(
        options.source,
        output,
        extractor,
        runtime,
        Preprocess(options.resize, options.crop),
        options.images,
        options.seed,
    )
    if world()[0] == 0:
        print(f"wrote {written}" + (f"; use it as {options.name!r}" if options.name else ""))
    return 0


def references(argv: list[str]) -> int:
    Parser(prog="fid-eval references", description="List saved references.").parse_args(argv)
    for name, path in saved_references().items():
        print(f"{name}\t{path}")
    return 0


COMMANDS = {"stats": stats, "references": references}


def main(argv: list[str] | None = None) -> int:
    """Run the command. Of several processes the first alone reports, by its output and code."""
    code = run(sys.argv[1:] if argv is None else argv)
    first = world()[0] == 0
    leave()
    return code if first else 0  # a launcher ends all processes when one fails


def run(argv: list[str]) -> int:
    try:
        if argv and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        return evaluation(argv)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (EvaluationError, OSError) as error:
        message, code = str(error), 2
    except torch.OutOfMemoryError as error:
        message, code = f"out of memory; try a smaller --batch-size ({error})", 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    if world()[0] == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
