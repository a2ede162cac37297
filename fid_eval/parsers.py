"""Define the options and help of ``fid-eval`` and its sub-commands."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, get_args

from .choices import (
    DEFAULT_METRICS,
    EXTRACTOR_NAMES,
    METRIC_NAMES,
    RECONSTRUCTION_METRICS,
    DistancePrecision,
    LpipsBackbone,
    NetworkPrecision,
    ReferenceKind,
)
from .errors import EvaluationError, nearest_name
from .saved_references import reference_folder
from .version import __version__

DESCRIPTION = """Evaluate sets of images: FID, sFID, Inception Score, precision, recall and more.

commands:
  {prog} REF SAMPLES...            compare sample sets with a reference
  {prog} JOBS.yaml                 the same, with sets and options from a file
  {prog} stats SOURCE --name NAME  make a reference and save it under a name
  {prog} references                list saved references
  {prog} reconstruction A B        compare images A with their reconstructions B
  {prog} classifier DATA           train a small classifier whose features replace Inception's

REF and SAMPLES may be .npz, a folder, .zip, WebDataset .tar, .safetensors, or
hf://OWNER/NAME[/CONFIG][?split=train]. REF may also be the name of a saved reference.
Under torchrun or accelerate launch the ranks share the work.
Exit code: 0, 1 if one of several sets failed, 2 for wrong input.
"""


class Parser(argparse.ArgumentParser):
    """Reports wrong arguments as an EvaluationError."""

    def __init__(self, prog: str, arguments: str, description: str, example: str) -> None:
        super().__init__(
            prog=prog,
            usage=f"{prog} {arguments}".rstrip(),
            description=description,
            epilog=f"example: {prog} {example}".rstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--version", action="version", version=f"fid-eval {__version__}")
        self.add_argument("--debug", action="store_true", help="show the traceback of errors")

    def error(self, message: str) -> NoReturn:
        if match := re.search(r"unrecognized arguments: (--\w+)", message):
            message += f"; {nearest_name(match[1], re.findall(r'--[a-z_]+', self.format_help()))}"
        raise EvaluationError(f"{message} (see {self.prog} --help)")


def _name_list(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _positive_integer(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small; at least 1 is needed")
    return value


def _positive_number(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is too small; it must be above 0")
    return value


def _share_or_path(text: str) -> float | str:
    try:
        share = float(text)
    except ValueError:
        return text
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1")
    return share


# The table of options is easier to read with two lines per option than as ruff formats it.
# fmt: off
def _add_size_options(add: Callable) -> None:
    add("--resize", type=_positive_integer, metavar="SIZE",
        help="resize images to SIZE × SIZE pixels, stretched (default: keep their size)")
    add("--crop", action="store_true",
        help="with --resize: crop the centre instead of stretching, as ADM does")
    add("--background", default="white", metavar="COLOUR",
        help="colour behind transparent pixels, a name or #rrggbb (default: white)")
    add("--strict", action="store_true",
        help="refuse images that are not 8-bit RGB, and tars without an end mark")


def _add_machine_options(add: Callable) -> None:
    add("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    add("--workers", type=_positive_integer, metavar="N",
        help="workers that load images (default: one per core, at most 16)")


def _add_runtime_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("extractor and images").add_argument
    add("--extractor", default="inception",
        help=f"{', '.join(EXTRACTOR_NAMES)}, or package.module:factory (default: inception); "
        "stats takes several: A,B or fdr6")
    add("--weights", action="append", default=[], metavar="[NAME=]PATH",
        help="local weights of the extractor, or of the extractor NAME (default: download)")
    add("--weights_sha256", action="append", default=[], metavar="[NAME=]HASH",
        help="SHA-256 of the weights; required for weights other than the published ones")
    _add_size_options(add)
    add = parser.add_argument_group("execution").add_argument
    add("--precision", choices=get_args(NetworkPrecision), default="float32",
        help="precision of the network; tf32 and bf16 are faster and change FID slightly "
        "(default: float32)")
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add("--batch_size", type=_positive_integer, metavar="N",
        help="images per batch (default: 128 on a GPU, 64 on a CPU)")
    _add_machine_options(add)
    add("--cache", metavar="DIR",
        help="keep features in this folder, by content hash (default: no cache)")
    add("--quiet", action="store_true", help="show no progress")


def evaluation_parser(prog: str) -> Parser:
    """Define the options of ``fid-eval REF SAMPLES...``."""
    parser = Parser(
        prog, "REF SAMPLES... [--OPTION VALUE ...]", DESCRIPTION.format(prog=prog),
        "digits.npz samples.npz --extractor digits --output metrics.json",
    )
    parser.add_argument("reference", metavar="REF", help="reference, or a jobs file (.yaml)")
    parser.add_argument("samples", metavar="SAMPLES", nargs="*", help="one or more sample sets")
    add = parser.add_argument_group("metrics").add_argument
    add("--metrics", type=_name_list, metavar="A,B,…",
        help=f"metrics to compute, of {', '.join(METRIC_NAMES)} (default: "
        f"{','.join(DEFAULT_METRICS)}, and accuracy if the extractor knows the labels)")
    add("--distances", choices=get_args(DistancePrecision),
        help="distances for precision and recall (default: adm-fp16 with the published "
        "Inception, as in papers; otherwise fp32)")
    add("--k", type=_positive_integer, default=3,
        help="nearest neighbours for precision and recall (default: 3)")
    add("--bootstrap", type=_positive_integer, default=0, metavar="N",
        help="compute 95 %% intervals from N resamples (default: no intervals)")
    add("--reference_kind", choices=get_args(ReferenceKind), default="auto",
        help="what gives the Fréchet distance: statistics or images of the reference "
        "(default: auto, statistics if the reference has them)")
    add("--reference_extractor", choices=EXTRACTOR_NAMES, metavar="NAME",
        help="extractor of a reference file of another program that does not tell it")
    add("--divisors", metavar="imagenet256|FILE.json",
        help="of fdr6: the published ones, or the results of a held-out set (default: no mean)")
    _add_runtime_options(parser)
    parser.add_argument("--time_limit", type=_positive_number, metavar="SECONDS",
        help="report a set as an error if opening it, or evaluating it, takes longer "
        "(default: no limit)")
    results = parser.add_argument_group("results")
    results.add_argument("--output", metavar="FILE.json", help="write results after every set")
    add = results.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true",
        help="continue an existing --output: keep finished sets, evaluate the others")
    add("--overwrite", action="store_true", help="replace an existing --output")
    add = results.add_argument
    add("--csv", metavar="FILE.csv", help="write a table, one row per set")
    add("--plot", metavar="FILE.png", help="plot metrics over the sets")
    add("--check", action="store_true",
        help="decode all images of all sets, report what was found, and compute nothing")
    add("--plot_metrics", type=_name_list, metavar="A,B,…", help="metrics to plot (default: all)")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _stats_parser(prog: str) -> Parser:
    parser = Parser(
        prog, "SOURCE (--name NAME | --output FILE.npz) [--OPTION VALUE ...]",
        "Make a reference file in ADM's layout: statistics of all images, and some images.",
        "train/ --name birds256 --resize 256 --crop",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="images: .npz, folder, .zip, .tar, hf://OWNER/NAME"
    )
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--name", help=f"save under this name in {reference_folder()}")
    add("--output", metavar="FILE.npz", help="save to this file")
    add = parser.add_argument
    add("--images", type=_positive_integer, default=10_000, metavar="N",
        help="number of random images to store for precision and recall (default: 10,000)")
    add("--seed", type=int, default=0, help="seed of the choice of those images (default: 0)")
    _add_runtime_options(parser)
    return parser


def _reconstruction_parser(prog: str) -> Parser:
    parser = Parser(
        prog, "ORIGINALS RECONSTRUCTIONS [--OPTION VALUE ...]",
        "Compare held-out images with their reconstructions by an autoencoder.\n"
        "Files are paired by name, arrays by order. Both sets are resized in the same way.",
        "held_out/ decoded/ --resize 256 --crop --output reconstruction.json",
    )
    add = parser.add_argument
    add("originals", metavar="ORIGINALS", help="images: .npz, folder, .zip, .tar, hf://OWNER/NAME")
    add("reconstructions", metavar="RECONSTRUCTIONS", help="their reconstructions")
    add("--metrics", type=_name_list, metavar="A,B,…", default=list(RECONSTRUCTION_METRICS),
        help=f"metrics to compute (default: {','.join(RECONSTRUCTION_METRICS)})")
    add("--backbone", choices=get_args(LpipsBackbone), default="vgg",
        help="network of LPIPS (default: vgg); its weights: --weights lpips=PATH")
    add("--output", metavar="FILE.json", help="write the results to this file; it must not exist")
    add("--json", action="store_true", help="print JSON instead of a table")
    _add_runtime_options(parser)
    return parser


def _classifier_parser(prog: str) -> Parser:
    parser = Parser(
        prog, "DATA --output FILE.safetensors [--OPTION VALUE ...]",
        "Train a small classifier of your own images, whose features replace Inception's.\n"
        "Prints the accuracy on held-out images.",
        "my_images/ --held_out 0.1 --flip --epochs 12 --output mine.safetensors",
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="labelled images: a folder with one sub-folder per class, "
        ".zip, .tar, hf://OWNER/NAME, or .npz with arr_0 (N, H, W, 3) and labels arr_1")
    add("--output", metavar="FILE.safetensors", type=Path, required=True,
        help="weights to write; an existing file is not overwritten")
    add("--held_out", type=_share_or_path, default=0.2, metavar="SHARE|LIST.txt|DATA",
        help="images for the accuracy: a share of DATA, a text file with a file name or number of "
        "DATA in each line, or another set (default: 0.2)")
    add("--name", help="suffix of metric names (default: the name of DATA)")
    add("--epochs", type=_positive_integer, default=40, metavar="N",
        help="passes over the images (default: 40)")
    add("--seed", type=int, default=0,
        help="seed of the held-out share, initial weights and augmentation (default: 0)")
    add("--batch_size", type=_positive_integer, default=128, metavar="N",
        help="images per step (default: 128)")
    add("--width", type=_positive_integer,
        help="number of features (default: 256, or 64 for images below 64 px)")
    add("--flip", action="store_true",
        help="mirror half of the training images; not for text and digits")
    _add_size_options(add)
    _add_machine_options(add)
    return parser
# fmt: on


SUBCOMMANDS = {
    "stats": _stats_parser,
    "classifier": _classifier_parser,
    "reconstruction": _reconstruction_parser,
    "references": lambda prog: Parser(
        prog, "", f"List the references saved in {reference_folder()}.", ""
    ),
}
