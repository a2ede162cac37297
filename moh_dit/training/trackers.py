"""Log values, histograms and images to the trackers of a run: TensorBoard, W&B and others."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image


def track_entry(accelerator: Accelerator, entry: dict[str, Any]) -> None:
    """Log one entry of ``log.jsonl``: numbers as scalars, the head load as a histogram per layer.

    A list becomes one scalar per item, such as ``held_out_loss_by_time/0``.
    """
    scalars = {key: value for key, value in entry.items() if isinstance(value, float)}
    for key, values in entry.items():
        if isinstance(values, list):
            scalars |= {f"{key}/{index}": value for index, value in enumerate(values)}
    accelerator.log(scalars, step=entry["step"])
    for layer, load in entry.get("head_load", {}).items():
        _track_histogram(accelerator, f"head_load/layer_{layer}", load, entry["step"])


def track_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Log an image to the trackers that store images: TensorBoard and W&B."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(name, np.asarray(image), step, dataformats="HWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [image]}, step=step)


def _track_histogram(
    accelerator: Accelerator, name: str, values: Sequence[float], step: int
) -> None:
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_histogram(name, np.asarray(values), step)
        elif tracker.name == "wandb":
            import wandb

            tracker.log({name: wandb.Histogram(list(values))}, step=step)
