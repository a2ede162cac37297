"""What tests/test_docs.py runs: the code blocks of a page, and each command in a small size.

A command is parsed as it is written by the program's own parser; what the program then does, it
does with a two-layer model, two steps, and a handful of 32 px images. Launchers are parsed too and
what they launch runs in this one process.
"""

import dataclasses
import glob
import itertools
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from markdown_it import MarkdownIt

from fid_eval.__main__ import main as fid_eval_main
from fid_eval.cli import parse as parse_fid_eval
from moh_dit.__main__ import main as moh_dit_main
from moh_dit.common import cli

ROOT = Path(__file__).parents[2]
SKIP = re.compile(r"<!-- test: skip, .+ -->")
# Commands of the shell, or of a server's clients.
NOT_RUN = {"source", "git", "cd", "pip", "curl"}
PROGRAM = re.compile(r"(python|torchrun|accelerate|make|sbatch|fid-eval|moh-dit)\s")
PYTHON = re.compile(r"(from|import|with) ")

# Words of the pages, and what stands for them here.
WORDS = {
    "--config NAME": "--config digits",
    "/shared/": "",
    "--resize 256": "--resize 32",
    "range(400)": "range(10)",
    "device=\"cuda\"": "device=\"cpu\"",
}  # fmt: skip
# Settings of any program, by name, where they are set.
SMALL = dict(
    num_steps=2, batch_size=8, log_every=1, checkpoint_every=1, ema_snapshot_every=1,
    keep_checkpoints=0, num_inference_steps=2, num_samples=8, images_per_class=1, frames=2,
    interpolate=2, fid_every=1, sample_every=2, num_held_out=4, num_workers=0, image_size=32,
    compile=False, cuda_graphs=False, mixed_precision="no", dtype="float32",
    decode_dtype="float32", feature_extractor="digits", once=True,
    block_out_channels=[32, 32], norm_num_groups=8, trackers=[], lr_warmup_steps=1,
)  # fmt: skip
TINY_MODEL = dict(
    preset=None, patch_size=4, hidden_size=48, depth=2, num_heads=6, num_shared_heads=3,
    num_active_routed_heads=2, head_dim=8,
)  # fmt: skip


class Block(NamedTuple):
    line: int
    language: str  # "" for an indented block
    text: str
    skipped: bool


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page in order, directives of the site left out."""
    found, skip = [], False
    for token in MarkdownIt().parse(page.read_text()):
        if token.type in ("fence", "code_block") and not token.info.startswith("{"):
            assert token.map is not None
            whole = Block(token.map[0] + 1, token.info.strip(), token.content, skip)
            found += [whole] if token.type == "fence" else parts(whole)
        if token.type == "html_block" or token.level == 0:
            skip = token.type == "html_block" and bool(SKIP.search(token.content))
    return found


def parts(block: Block) -> list[Block]:
    """An indented block is what it looks like: Python, commands, or one after the other."""
    if not PYTHON.match(block.text):
        return [block]
    lines = block.text.splitlines(keepends=True)
    end = next((i for i, line in enumerate(lines) if PROGRAM.match(line)), len(lines))
    python = block._replace(language="python", text="".join(lines[:end]))
    return [python, block._replace(line=block.line + end, text="".join(lines[end:]))]


def commands(block: Block) -> Iterator[list[str]]:
    """Commands of a block; none in a figure, that is an indented block without a program."""
    text = block.text
    for word, here in WORDS.items():
        text = text.replace(word, here)
    lines = text.replace("\\\n", " ").splitlines()
    if block.language == "" and not any(PROGRAM.match(line) for line in lines):
        return
    for line in lines:
        words = [word for word in shlex.split(line, comments=True) if word not in ("...", "…")]
        if words and words[0] not in NOT_RUN:
            yield words


def run(words: list[str], monkeypatch: Any, parse_only: bool = False) -> None:
    """Run one command in this process with small sizes.

    Args:
        words: the command.
        monkeypatch: pytest's fixture.
        parse_only: only parse the arguments.
    """
    program, *arguments = words
    if program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "sbatch":
        subprocess.run(["bash", "-n", ROOT / arguments[0]], check=True)
        run(["python", "train_dit.py", *arguments[1:]], monkeypatch, parse_only)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        launch = launch_command_parser().parse_args(arguments[1:])
        assert launch.config_file is None or (ROOT / launch.config_file).is_file(), launch
        run(launched(launch.module, launch), monkeypatch, parse_only)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(arguments)
        run(launched(launch.module, launch), monkeypatch, parse_only)
    elif program == "python" and arguments[0].startswith("benchmarks/"):
        assert (ROOT / arguments[0]).is_file()
    elif program == "python" and arguments[0] in ("train_dit.py", "sample_dit.py"):
        name = arguments[0].removesuffix("_dit.py")
        call(moh_dit_main, [name, *arguments[1:]], monkeypatch, parse_only)
    elif words[:3] in (["python", "-m", "moh_dit"], ["python", "-m", "fid_eval"]):
        run([words[2].replace("_", "-"), *words[3:]], monkeypatch, parse_only)
    elif program == "moh-dit":
        call(moh_dit_main, arguments, monkeypatch, parse_only)
    elif program == "fid-eval":
        fid_eval(arguments, monkeypatch, parse_only)
    else:
        raise AssertionError(f"no program is called {program}; a figure? fence it as text")


def launched(module: bool, launch: Any) -> list[str]:
    """Return the command that a launcher starts in each process."""
    flag = ["-m"] if module else []
    return ["python", *flag, launch.training_script, *launch.training_script_args]


def fid_eval(arguments: list[str], monkeypatch: Any, parse_only: bool) -> None:
    """Run ``fid-eval``, or only parse its arguments."""
    arguments = [path for word in arguments for path in sorted(glob.glob(word)) or [word]]
    if arguments[0] == "classifier":
        arguments += ["--epochs", "1"]
    if parse_only:
        parse_fid_eval(arguments)
        return
    call(fid_eval_main, arguments, monkeypatch)


def call(
    main: Callable[[list[str]], int | None],
    arguments: list[str],
    monkeypatch: Any,
    parse_only: bool = False,
) -> None:
    """Call the main function of a program, with ``run_program`` made small."""
    make_room(arguments)
    original = cli.run_program

    def small_program(main, config_class, **options):
        def run_small(config):
            if parse_only:
                return
            if getattr(config, "run_dir", None) and not config.resume:
                remove(Path(config.run_dir))
            main(smaller(config))

        # The small command reads other paths than the one that is written.
        patch.setattr(config_class, "check_paths", lambda self: None, raising=False)
        original(run_small, config_class, **options)

    with monkeypatch.context() as patch:
        patch.setattr(cli, "run_program", small_program)
        code = main(arguments)
    if code:
        raise SystemExit(code)


def make_room(arguments: list[str]) -> None:
    """What an earlier command of the page wrote under the same name is removed."""
    for option, value in itertools.pairwise(arguments):
        if option == "--output" and "--resume" not in arguments:
            remove(Path(value))


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.with_name(path.name + ".yaml").unlink(missing_ok=True)


def smaller(config: Any) -> Any:
    """A configuration with every size in it made small, and what is downloaded replaced."""
    from moh_dit.analysis.config import CostConfig
    from moh_dit.training.config import ModelConfig

    if isinstance(config, CostConfig):
        return config  # makes no weights
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = smaller(value)
        elif field.name in SMALL and value not in (None, 0, False):
            changes[field.name] = SMALL[field.name]
        elif field.name in ("data", "source") and str(value).startswith(
            ("digits", "hf:", "hf-stream:")
        ):
            changes[field.name] = "my_images"
            if getattr(config, "autoencoder", "") is None:
                changes["autoencoder"] = "digits"
        elif isinstance(value, str) and value.startswith("stabilityai/"):
            changes[field.name] = "digits"
    if isinstance(config, ModelConfig):
        routed = config.preset is not None or config.num_shared_heads is not None
        dense = {} if routed else dict(num_shared_heads=None, num_active_routed_heads=None)
        changes = {**TINY_MODEL, **dense}
    return dataclasses.replace(config, **changes)
