"""Publish the progress of a job and previews of its images while they are sampled."""

import math
import threading
import time

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..analysis.head_load import HeadLoadRecorder
from ..pipeline.pipeline import MoHDiTPipeline
from ..sampling.config import SampleConfig
from ..sampling.engine import count_steps, decode_noisy
from ..sampling.output_formats import encode_image
from .job_queue import Job

LARGEST_CELL = 128  # maximum side in pixels of one image in a preview
PLACEHOLDER_GREY = 128  # colour of images whose batch has not started


class JobProgress:
    """The ``on_step`` callback of :func:`~moh_dit.sampling.engine.generate` for one job.

    Args:
        pipeline: the pipeline, with the scheduler of the job.
        config: settings of the job.
        shape: rows and columns of images.
        job: the job that publishes the progress. Its file ``preview.jpg`` shows the images so far.
        recorder: head-load recorder to call at each step, if any.
        previews: number of previews before the final images.
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
        # No preview after the last step: the final images follow immediately.
        ends = np.linspace(0, steps - 1, previews + 1).round().astype(int)
        self.preview_steps = set(ends[:-1].tolist()) - {steps - 1}
        self.done, self.total, self.preview_count = 0, steps * math.prod(shape), 0
        self.start = time.monotonic()
        self.cells: np.ndarray | None = None
        self.lock = threading.Lock()

    def __call__(self, positions: np.ndarray, step: int, latents: Tensor) -> None:
        self.job.raise_if_cancelled()
        if self.recorder is not None:
            self.recorder.on_step(positions, step, latents)
        real, pictures = positions >= 0, None
        if step in self.preview_steps:
            rows = latents[torch.from_numpy(real).to(latents.device)]
            pictures = decode_noisy(self.pipeline, rows, 1)
        with self.lock:
            self.done += int(real.sum())
            if pictures is not None:
                self._update_preview(positions[real], pictures)
            # The page fetches preview.jpg again whenever the number "picture" changes.
            self.job.publish(
                "running",
                done=self.done,
                total=self.total,
                images=math.prod(self.shape),
                seconds=round(time.monotonic() - self.start, 2),
                picture=self.preview_count,
            )

    def _update_preview(self, positions: np.ndarray, pictures: np.ndarray) -> None:
        if self.cells is None:
            cells = (math.prod(self.shape), *pictures.shape[1:])
            self.cells = np.full(cells, PLACEHOLDER_GREY, np.uint8)
        self.cells[positions] = pictures
        sheet = Image.fromarray(tile(self.cells.reshape(*self.shape, *pictures.shape[1:])))
        sheet.thumbnail((self.shape[1] * LARGEST_CELL, self.shape[0] * LARGEST_CELL))
        preview = encode_image(sheet, "JPEG", quality=85, subsampling=0)
        self.job.files["preview.jpg"] = preview
        self.preview_count += 1


def tile(images: np.ndarray) -> np.ndarray:
    """Join uint8 (rows, columns, H, W, 3) into one image (rows · H, columns · W, 3)."""
    rows, columns, height, width, channels = images.shape
    return images.swapaxes(1, 2).reshape(rows * height, columns * width, channels)
