"""Parse and check the command line of ``fid-eval``.

This module imports no torch, so that help and mistakes appear quickly.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import EvaluationError
from .jobs_file import Job, read_jobs
from .parsers import SUBCOMMANDS, Parser, evaluation_parser
from .saved_references import (
    REFERENCE_SUFFIX,
    check_reference_exists,
    check_samples_exist,
    reference_folder,
)


def program_name(argv: Sequence[str]) -> str:
    """Return the program as it was called, with the sub-command."""
    prog = "python -m fid_eval" if Path(sys.argv[0]).name == "__main__.py" else "fid-eval"
    return f"{prog} {argv[0]}" if argv and argv[0] in SUBCOMMANDS else prog


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse arguments; options may be spelled with ``_`` or ``-``.

    Returns:
        The options, with ``command`` ("evaluate" or a sub-command) and ``prog``. "evaluate" also
        has ``jobs``, a list of ``Job``.

    Raises:
        EvaluationError: wrong arguments.
    """
    argv = [
        re.sub(r"^--\w[\w-]*", lambda name: "--" + name[0][2:].replace("-", "_"), argument)
        for argument in argv
    ]
    prog = program_name(argv)
    if argv and argv[0] in SUBCOMMANDS:
        options = SUBCOMMANDS[argv[0]](prog).parse_args(argv[1:])
        options.command = argv[0]
    else:
        options = _parse_evaluation(argv, evaluation_parser(prog))
        options.command = "evaluate"
    if options.command == "stats" and options.name:
        if Path(options.name).name != options.name:
            raise EvaluationError(f"--name {options.name!r} is a path; use --output for a path")
        options.output = reference_folder() / f"{options.name}{REFERENCE_SUFFIX}"
    options.prog = prog
    return options


def _parse_evaluation(argv: list[str], parser: Parser) -> argparse.Namespace:
    options = parser.parse_intermixed_args(argv)
    path = Path(options.reference)
    if path.suffix in (".yaml", ".yml"):
        if options.samples:
            raise EvaluationError(f"{path}: a jobs file names its sample sets; remove the others")
        settings, jobs = read_jobs(path, set(vars(options)) - {"reference", "samples"})
        reference = str(settings.pop("reference"))
        given = [item for item in argv if item != str(options.reference)]
        # The command line comes last, so that it overrides the file.
        options = parser.parse_intermixed_args([reference, *_as_arguments(settings), *given])
        options.jobs = jobs
        return options
    options.samples = [sample for sample in options.samples if not _is_sidecar(sample)]
    if not options.samples and not options.check:
        raise EvaluationError(f"no sample sets to compare with {options.reference}")
    options.jobs = [Job(sample, sample) for sample in options.samples]
    return options


def _is_sidecar(path: str) -> bool:
    """Return whether ``path`` is OUTPUT.yaml, the settings that a sampler wrote beside OUTPUT.

    Shell patterns such as ``samples*`` match both.
    """
    return path.endswith(".yaml") and Path(path).expanduser().with_suffix("").exists()


def _as_arguments(settings: dict[str, Any]) -> list[str]:
    """Convert settings of a jobs file to command-line arguments, to check both in one way."""
    arguments = []
    for key, value in settings.items():
        if isinstance(value, bool):
            arguments += [f"--{key}"] if value else []
        elif isinstance(value, list):
            arguments += [f"--{key}", ",".join(map(str, value))]
        elif isinstance(value, dict):
            for name, item in value.items():
                arguments += [f"--{key}", f"{name}={item}"]
        elif value is not None:
            arguments += [f"--{key}", str(value)]
    return arguments


def check_files(options: argparse.Namespace) -> None:
    """Raise if inputs do not exist or outputs cannot be written, before any work is done."""
    if options.command == "evaluate":
        check_reference_exists(options.reference)
        check_samples_exist([job.path for job in options.jobs])
        replaceable = options.resume or options.overwrite or not options.output
        if not replaceable and Path(options.output).is_file():
            raise EvaluationError(
                f"--output {options.output} exists; add --resume to continue it or --overwrite to "
                "replace it"
            )
        for output in filter(None, (options.output, options.csv, options.plot)):
            _check_writable(output)
    elif options.command == "stats":
        check_samples_exist([options.source])
    elif options.command == "reconstruction":
        for source in (options.originals, options.reconstructions):
            check_samples_exist([source])
        if options.output:
            if Path(options.output).exists():
                raise EvaluationError(f"--output {options.output} exists; choose another name")
            _check_writable(options.output)
    elif options.command == "classifier":
        check_samples_exist([options.data])
        if isinstance(options.held_out, str):
            check_samples_exist([options.held_out])
        _check_writable(options.output)


def _check_writable(output: str) -> None:
    folder = Path(output).absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"{output}: cannot create its folder ({error.strerror})") from None
    if Path(output).is_dir() or not os.access(folder, os.W_OK):
        raise EvaluationError(f"{output}: cannot be written; choose another path")
