"""Run a sub-command: `moh-dit train …`, or `python -m moh_dit train …` behind a launcher."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from .common.version import __version__


@dataclass(frozen=True)
class Command:
    """A sub-command. Modules are imported when the command runs, so that `--help` stays fast.

    Attributes:
        config: ``"module:class"`` of its settings, relative to this package.
        function: ``"module:function"`` that takes them.
        description: first paragraph of its help.
        example: arguments of an example, without the name of the program.
        positional: the setting that may be given without its name.
    """

    config: str
    function: str
    description: str
    example: str
    positional: str | None = None


COMMANDS = {
    "train": Command(
        "training.config:TrainConfig",
        "training.train:train",
        "Train a Diffusion Transformer with Mixture-of-Head attention, or a dense one.",
        "--config digits --run_dir runs/digits",
    ),
    "sample": Command(
        "sampling.config:SampleConfig",
        "sampling.sample:sample",
        "Sample from a trained model: a labelled grid, or an exact set for evaluation.",
        "--checkpoint runs/digits --guidance_scale 2 --num_inference_steps 50 --output grid.png",
        "checkpoint",
    ),
    "encode": Command(
        "data.config:EncodeConfig",
        "data.encoding:encode_data",
        "Encode a data set into latents once, for training.",
        "--data my_images --image_size 256 --autoencoder stabilityai/sd-vae-ft-ema "
        "--output my_latents",
    ),
    "autoencoder": Command(
        "training.autoencoder_config:AutoencoderTrainingConfig",
        "training.autoencoder_training:train_autoencoder",
        "Train an AutoencoderKL on images, measure it, and save it in the format of diffusers.",
        "--data my_images --image_size 64 --output my_vae",
    ),
    "reconstruct": Command(
        "analysis.config:ReconstructionConfig",
        "analysis.reconstruction:measure_reconstruction",
        "Measure an autoencoder on held-out images: rFID, PSNR, SSIM and LPIPS.",
        "--autoencoder my_autoencoder --data held_out --image_size 64 --output reconstruction.json",
    ),
    "convert": Command(
        "checkpoints.config:ConvertConfig",
        "checkpoints.converting:convert",
        "Convert a (MoH-)DiT checkpoint to another format, or describe it.",
        "DiT-XL-2-256x256.pt --to diffusers --output dit-xl-2",
        "source",
    ),
    "export": Command(
        "data.config:ExportConfig",
        "data.export_images:export_npz",
        "Write a data set, preprocessed as for training, as an ADM-format .npz reference.",
        "--data my_images --image_size 64 --output reference.npz",
        "data",
    ),
    "ema": Command(
        "training.config:PosthocConfig",
        "training.posthoc_ema:reconstruct",
        "Compute an average of any width from the snapshots of a run.",
        "runs/mine --std 0.08",
        "run",
    ),
    "cost": Command(
        "analysis.config:CostConfig",
        "analysis.cost:print_cost",
        "Estimate parameters, FLOPs, memory and GPU-hours of a configuration. Trains nothing and "
        "downloads nothing.",
        "--config imagenet256_moh_dit_xl2_75 --num_gpus 8 --mfu 0.42",
    ),
    "watch": Command(
        "analysis.config:WatchConfig",
        "analysis.watch:watch",
        "Follow a run from a terminal: step, loss, images/s, time left, and what it is doing.",
        "runs/digits",
        "run",
    ),
    "report": Command(
        "analysis.config:ReportConfig",
        "analysis.report:write_report",
        "Write run folders into one HTML file: settings, curves, head load, samples, metrics and "
        "speed. The file opens from disk and loads nothing else.",
        "runs/first runs/second --output report.html",
        "runs",
    ),
    "head-load": Command(
        "analysis.config:HeadLoadConfig",
        "analysis.measure_head_load:measure_head_load",
        "Sample images, count the attention heads that the tokens of each class choose, and draw "
        "figures. Runs on several processes behind torchrun or accelerate launch.",
        "runs/digits --class_labels 0,1,7 --guidance_scale 2 --num_inference_steps 50 "
        "--output head_load",
        "checkpoint",
    ),
    "demo": Command(
        "web.config:DemoConfig",
        "web.serve:serve",
        "Serve a page that makes images, for a browser on this machine.",
        "runs/digits --guidance_scale 2",
        "checkpoint",
    ),
}


def load(name: str) -> Any:
    """Import ``"module:attribute"`` of this package."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(f".{module}", __package__), attribute)


def program_name() -> str:
    """Name this program as the user called it."""
    as_module = Path(sys.argv[0]).parts[-2:] == ("moh_dit", "__main__.py")
    return "python -m moh_dit" if as_module else "moh-dit"


def run_command(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run one sub-command.

    Args:
        name: a key of ``COMMANDS``.
        argv: arguments after the name; ``None`` for those of this process.
        prog: the name of the program in help and errors.
    """
    from .common.cli import run_program

    command = COMMANDS[name]
    prog = prog or f"{program_name()} {name}"
    run_program(
        lambda config: load(command.function)(config),
        load(command.config),
        prog=prog,
        description=command.description,
        example=f"{prog} {command.example}",
        positional=command.positional,
        argv=argv,
    )


def help_text() -> str:
    """List the sub-commands."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {each.description.split('. ')[0].rstrip('.')}"
            for name, each in COMMANDS.items()]  # fmt: skip
    prog = program_name()
    return "\n".join(
        [
            f"usage: {prog} COMMAND [--KEY VALUE ...]",
            "",
            "Train, sample and analyse Diffusion Transformers with Mixture-of-Head attention.",
            "",
            "commands:",
            *rows,
            "",
            f"Help on a command: {prog} COMMAND --help",
            f"example: {prog} {next(iter(COMMANDS))} {COMMANDS['train'].example}",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sub-command that the first argument names."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(help_text())
    elif name == "--version":
        print(f"moh-dit {__version__}")
    elif name in COMMANDS:
        run_command(name, arguments[1:])
    else:
        from .common.cli import nearest_key

        nearest = nearest_key(name, list(COMMANDS))
        hint = f"did you mean {nearest}?" if nearest else f"choose one of {', '.join(COMMANDS)}"
        print(f"{program_name()}: error: there is no command {name!r}; {hint}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
