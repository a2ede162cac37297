"""Follows the denoising: stops it, says how far it is, shows a picture now and then."""

import io
import math
import threading

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..analysis.head_load import HeadLoadRecorder
from ..pipeline.pipeline import MoHDiTPipeline
from ..sampling.config import SampleConfig
from ..sampling.engine import count_steps, decode_state
from .jobs import Job

LARGEST_CELL = 128  # pixels of an image's side in a preview, at most
NOT_BEGUN = 128  # the grey of an image that waits for its batch


class Watcher:
    """The ``on_step`` of :func:`~moh_dit.sampling.engine.generate` for one job.

    Args:
        pipeline: with the scheduler of the job.
        config: settings of the job.
        shape: rows and columns of images.
        job: told of progress; its file ``preview.jpg`` shows the images emerging.
        recorder: sees every step too, if there is one.
        previews: pictures on the way to an image.
    """

    def __init__(
        self,
        pipeline: MoHDiTPipeline,
        config: SampleConfig,
        shape: tuple[int, int],
        job: Job,
        recorder: HeadLoadRecorder | None,
        previews: int,
    ):
        self.pipeline, self.shape, self.job, self.recorder = pipeline, shape, job, recorder
        steps = count_steps(pipeline, config)
        # The last state is the image itself, which comes anyway.
        ends = np.linspace(0, steps - 1, previews + 1).round().astype(int)
        self.shown = set(ends[:-1].tolist()) - {steps - 1}
        self.done, self.total, self.pictures = 0, steps * math.prod(shape), 0
        self.cells: np.ndarray | None = None
        self.lock = threading.Lock()

    def __call__(self, positions: np.ndarray, step: int, latents: Tensor) -> None:
        self.job.stop_if_unwanted()
        if self.recorder is not None:
            self.recorder.on_step(positions, step, latents)
        real, pictures = positions >= 0, None
        if step in self.shown:
            rows = latents[torch.from_numpy(real).to(latents.device)]
            pictures = decode_state(self.pipeline, rows, 1)
        with self.lock:
            self.done += int(real.sum())
            if pictures is not None:
                self._show(positions[real], pictures)
            # "picture" counts them, so that a page knows when to fetch the next.
            self.job.publish("running", done=self.done, total=self.total, picture=self.pictures)

    def _show(self, positions: np.ndarray, pictures: np.ndarray) -> None:
        if self.cells is None:
            cells = (math.prod(self.shape), *pictures.shape[1:])
            self.cells = np.full(cells, NOT_BEGUN, np.uint8)
        self.cells[positions] = pictures
        sheet = Image.fromarray(edge_to_edge(self.cells.reshape(*self.shape, *pictures.shape[1:])))
        sheet.thumbnail((self.shape[1] * LARGEST_CELL, self.shape[0] * LARGEST_CELL))
        buffer = io.BytesIO()
        sheet.save(buffer, format="JPEG", quality=85, subsampling=0)
        self.job.files["preview.jpg"] = buffer.getvalue()
        self.pictures += 1


def edge_to_edge(images: np.ndarray) -> np.ndarray:
    """uint8 (rows, columns, H, W, 3) → one image (rows · H, columns · W, 3)."""
    rows, columns, height, width, channels = images.shape
    return images.swapaxes(1, 2).reshape(rows * height, columns * width, channels)
