"""Record the environment of a run, its log and its curves."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from ..common.atomic_write import atomic_write
from ..model.flops import flops_per_image
from ..model.transformer import MoHDiTTransformer2DModel

LOG_FILE = "log.jsonl"
# Values on the progress bar: key of a log entry, displayed name and format.
DISPLAYED = {
    "loss": ("loss", "{:.4f}"),
    "held_out_loss": ("held-out", "{:.4f}"),
    "images_per_second": ("img/s", "{:.4g}"),
    "mfu": ("MFU", "{:.1%}"),
    "peak_memory_gib": ("GPU memory", "{:.1f} GiB"),
}
PACKAGES = ("moh-dit", "torch", "diffusers", "accelerate", "safetensors", "numpy", "torch-fidelity")


def environment() -> dict[str, Any]:
    """Return versions, hardware, git commit and command line, ready for JSON."""
    cuda = torch.cuda.is_available()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores",
        "git_commit": _git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of this code, with "+changes" for modified files; None without git."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # fails inside an unrelated repository
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class RunLog:
    """The file ``log.jsonl``: one JSON object per log entry.

    Args:
        path: the file. Entries after ``start_step`` are removed, because those steps are repeated.
            A file with damaged lines is kept under another name.
        start_step: number of completed steps.
    """

    def __init__(self, path: Path, start_step: int = 0):
        self.path = path
        kept = [entry for entry in read_log(path) if entry["step"] <= start_step]
        if None in read_lines(path)[:-1]:  # a kill leaves only an incomplete last line
            damaged = path.with_name(f"damaged-{datetime.now(UTC):%Y%m%d-%H%M%S}-{path.name}")
            path.rename(damaged)
            print(f"{path} had damaged lines: they are left out, and the file is now {damaged}")
        atomic_write(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry, which contains ``step``."""
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a ``log.jsonl`` without damaged lines; empty without a file."""
    return [entry for entry in read_lines(path) if entry and isinstance(entry.get("step"), int)]


def read_lines(path: Path) -> list[dict[str, Any] | None]:
    """Return the JSON object in each line of a file; ``None`` for an incomplete or damaged line."""
    lines: list[dict[str, Any] | None] = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = None
        lines.append(content if isinstance(content, dict) else None)
    return lines


def plot_curves(log: Path, output: Path) -> None:
    """Plot loss, balance, gradient norm and learning rate of a log into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {
        "loss": {
            "mse": "noise MSE",
            "vlb": "VLB of the variance, bits/dim",
            "held_out_loss": "noise MSE, held-out images (EMA)",
            "train_sample_loss": "noise MSE, training images (EMA)",
        },
        "load balance (1 = even)": {"balance": "L_b / k"},
        "gradient norm": {"grad_norm": "before clipping"},
        "learning rate": {"learning_rate": "AdamW"},
    }
    entries = read_log(log)
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
    for axis, (title, series) in zip(axes.flat, panels.items(), strict=True):
        for key, label in series.items():
            points = [
                (entry["step"], entry[key])
                for entry in entries
                if isinstance(entry.get(key), int | float)
            ]
            if points:
                axis.plot(*zip(*points, strict=True), label=label)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    axes.flat[0].set_yscale("log")
    figure.savefig(output, dpi=110)
    plt.close(figure)


def dead_heads(entry: dict[str, Any]) -> list[str]:
    """Return the routed heads that no token chose during the steps of a log entry.

    Heads are numbered as in the layer: the shared heads come first.
    """
    return [
        f"layer {layer} head {head}"
        for layer, load in entry.get("head_load", {}).items()
        for head, fraction in enumerate(load, entry["shared_heads"][layer])
        if fraction == 0
    ]


def progress_postfix(entry: dict[str, Any]) -> dict[str, str]:
    """Return the values of a log entry that the progress bar displays."""
    shown = ((name, text, entry.get(key)) for key, (name, text) in DISPLAYED.items())
    return {name: text.format(value) for name, text, value in shown if value is not None}


class StepStatistics:
    """Sums over the steps since the last log entry, kept on the device until the next entry.

    Args:
        accelerator: averages the sums over its processes.
        model: the model in training.
        images_per_step: the global batch size.
        peak_flops: peak FLOP/s of one device, to compute the model FLOP utilisation (MFU);
            ``None`` if unknown.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: MoHDiTTransformer2DModel,
        images_per_step: int,
        peak_flops: float | None = None,
    ):
        self.peak_images_per_second: float | None = None
        if peak_flops is not None:
            flops = 3 * flops_per_image(model)  # the backward pass costs two forward passes
            self.peak_images_per_second = peak_flops * accelerator.num_processes / flops
        self.accelerator = accelerator
        self.layers = model.routed_layers
        self.images_per_step = images_per_step
        self._reset()

    def _reset(self) -> None:
        self.steps = 0
        self.sums: Tensor | None = None
        self.load: Tensor | None = None
        self.data_wait_seconds = self.paused_seconds = 0.0
        self.start = time.perf_counter()

    def add(self, terms: Tensor, grad_norm: Tensor, load: Tensor | None) -> None:
        """Add one step; a step that is not finite was skipped and does not count in the averages.

        Args:
            terms: loss terms (3,).
            grad_norm: gradient norm, a scalar.
            load: load f of all routed heads (ΣE,); ``None`` for a dense model.
        """
        values = torch.cat([terms, grad_norm.view(1)])
        finite = values.isfinite().all()
        # The last value counts the steps in the averages.
        values = torch.cat([values, values.new_ones(1)]).where(finite, 0)
        self.sums = values if self.sums is None else self.sums + values
        if load is not None:
            load = load.where(finite, 0)
            self.load = load if self.load is None else self.load + load
        self.steps += 1

    @contextmanager
    def exclude_time(self) -> Iterator[None]:
        """Leave the time of this block out of images/s."""
        start = time.perf_counter()
        yield
        paused = time.perf_counter() - start
        self.start += paused
        self.paused_seconds += paused

    @contextmanager
    def count_data_wait(self) -> Iterator[None]:
        """Count the time of this block as waiting for data; the GPU may still be busy."""
        start = time.perf_counter()
        yield
        self.data_wait_seconds += time.perf_counter() - start

    def make_entry(self, step: int, learning_rate: float) -> dict[str, Any]:
        """Return a log entry averaged over the steps and processes, and start the next one."""
        sums = cast(Tensor, self.accelerator.reduce(cast(Tensor, self.sums), "mean"))
        *totals, counted = sums.tolist()
        elapsed = time.perf_counter() - self.start  # measured after tolist() has synchronised
        entry: dict[str, Any] = {
            "step": step,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "images": step * self.images_per_step,
            "learning_rate": learning_rate,
            "images_per_second": self.steps * self.images_per_step / elapsed,
            "data_wait": self.data_wait_seconds / elapsed,
            "paused_seconds": round(self.paused_seconds, 3),
        }
        if counted:
            mse, vlb, balance, grad_norm = (total / counted for total in totals)
            entry |= dict(loss=mse + vlb, mse=mse, vlb=vlb, balance=balance, grad_norm=grad_norm)
        if counted < self.steps:
            entry["skipped_steps"] = self.steps - round(counted)
        if self.peak_images_per_second is not None:
            entry["mfu"] = entry["images_per_second"] / self.peak_images_per_second
        if torch.cuda.is_available():
            entry["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            entry["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        if self.load is not None and counted:
            sizes = [a.num_heads - (a.num_shared_heads or 0) for a in self.layers.values()]
            loads = (self.load / counted).split(sizes)
            entry["head_load"] = {
                str(layer): [round(fraction, 5) for fraction in load.tolist()]
                for layer, load in zip(self.layers, loads, strict=True)
            }
            entry["shared_heads"] = {
                str(layer): attention.num_shared_heads or 0
                for layer, attention in self.layers.items()
            }
        self._reset()
        return entry
