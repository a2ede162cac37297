"""Measure the training of an autoencoder: steps per second and PSNR, by settings.

    python benchmarks/autoencoder.py data/emoji/train --settings float32,bf16-compiled

Each setting trains the same autoencoder (widths 64, 128, 128) with the same random numbers, so that
PSNR can be compared. The rate is the median over intervals of 50 steps after the first 100 steps.
"""

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState

from moh_dit.training import autoencoder_training
from moh_dit.training.autoencoder_config import AutoencoderTrainingConfig

INTERVAL = 50  # steps; training waits for the GPU after each interval, when it logs
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": dict(allow_tf32=False),
    "tf32": dict(allow_tf32=True),
    "tf32-compiled": dict(allow_tf32=True, compile=True),
    "bf16": dict(mixed_precision="bf16", allow_tf32=True),
    "bf16-compiled": dict(mixed_precision="bf16", allow_tf32=True, compile=True),
}


def measure(config: AutoencoderTrainingConfig) -> tuple[float, dict[str, float]]:
    """Train once; return the median number of steps per second, and the measurements."""
    times: list[float] = []
    draw = autoencoder_training._draw

    def draw_and_note(config: Any, noise_shape: Any, step: int, *arguments: Any) -> Any:
        if step % INTERVAL == 1:
            times.append(time.perf_counter())
        return draw(config, noise_shape, step, *arguments)

    with patch.object(autoencoder_training, "_draw", draw_and_note):
        metrics = autoencoder_training.train_autoencoder(config)
    times = times[2:]
    rates = [INTERVAL / (end - start) for start, end in pairwise(times)]
    return statistics.median(rates), metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="folder of images")
    parser.add_argument(
        "--settings", default=",".join(SETTINGS), help="comma-separated (default: %(default)s)"
    )
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_steps", type=int, default=400, help="at least 201")
    parser.add_argument("--num_workers", type=int, default=8)
    args = parser.parse_args()
    rows = []
    for name in args.settings.split(","):
        AcceleratorState._reset_state(reset_partial_state=True)  # it fixes the precision
        torch.compiler.reset()
        with tempfile.TemporaryDirectory() as folder:
            config = AutoencoderTrainingConfig(
                output=str(Path(folder, "vae")),
                data=args.data,
                image_size=args.image_size,
                batch_size=args.batch_size,
                num_steps=args.num_steps,
                num_workers=args.num_workers,
                **SETTINGS[name],
            )
            rate, metrics = measure(config)
        rows.append(f"{name:15} {rate:8.2f} {metrics['psnr']:8.2f}")
        print(f"{'setting':15} {'steps/s':>8} {'PSNR':>8}\n" + "\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
