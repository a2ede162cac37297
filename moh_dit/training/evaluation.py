"""Look at a run while it trains: grids of samples and FID, by the code that does it afterwards."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from accelerate import Accelerator

from fid_eval import EvaluationError, Evaluator, Share

from ..common.atomic_write import atomic_write
from ..common.distributed import run_on_main_process
from ..common.errors import UserError
from ..data.images import ImageSet, read_batches
from ..data.latents import LatentSet, index_batches
from ..pipeline.pipeline import MoHDiTPipeline
from ..sampling.config import SamplingSettings
from ..sampling.engine import generate, use_settings
from ..sampling.grids import sample_grid
from ..sampling.sample_set import set_labels
from .config import EvaluationConfig
from .preemption import Interrupted, Preemption

MAX_GRID_CLASSES = 10
BATCH_SIZE = 64


class Due(NamedTuple):
    """What is to be made of a step."""

    grid: bool
    evaluation: bool


class Preview:
    """Samples and measures the averaged model of a run.

    Args:
        config: what to sample and to measure.
        accelerator: the run's processes, which share the samples of an evaluation.
        pipeline: the averaged model with the run's autoencoder and scheduler.
        data: the training data; its images are the reference unless the configuration names one.
        preemption: is listened to, since what is made here may take longer than one is given.

    Raises:
        UserError: an extractor or reference that cannot be had, before any training.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        accelerator: Accelerator,
        pipeline: MoHDiTPipeline,
        data: ImageSet | LatentSet,
        preemption: Preemption,
    ):
        self.config = config
        self.accelerator = accelerator
        self.settings = SamplingSettings(
            num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale
        )
        self.pipeline = pipeline
        self.preemption = preemption
        use_settings(pipeline, self.settings, None)  # so that mistakes are found before training
        self.evaluator: Evaluator | None = None
        if config.fid_every:
            if config.reference is None and isinstance(data, LatentSet):
                raise UserError("evaluation.fid_every with data.latents needs evaluation.reference")
            try:
                self.evaluator = Evaluator(
                    config.reference or self._reference(cast(ImageSet, data)),
                    metrics=config.metrics,
                    extractor=config.feature_extractor,
                    weights=config.feature_extractor_weights,
                    device=accelerator.device,
                    quiet=True,
                )
                self.evaluator.load()
            except EvaluationError as error:
                raise UserError(f"evaluation: {error}") from None

    def due(self, step: int, last: bool) -> Due:
        """What is to be made after ``step``."""
        config = self.config
        return Due(
            grid=last or bool(config.sample_every and step % config.sample_every == 0),
            evaluation=self.evaluator is not None and (last or step % config.fid_every == 0),
        )

    def missed(self, step: int, last: bool, run_dir: Path) -> Due:
        """What was due after ``step`` and is not there: the run was stopped before it."""
        grid, evaluation = self.due(step, last)

        def look() -> Due:
            return Due(
                grid and not grid_path(run_dir, step).exists(),
                evaluation and not evaluation_path(run_dir, step).exists(),
            )

        return run_on_main_process(self.accelerator, look)

    def make(self, due: Due, step: int, run_dir: Path) -> dict[str, float]:
        """Make what is due; returns the metrics measured, if any.

        Raises:
            Interrupted: a SIGTERM came, on every process alike.
        """
        if due.grid:
            self._grid(grid_path(run_dir, step))
        if not due.evaluation:
            return {}
        result = self._evaluate()
        if self.accelerator.is_main_process:
            path = evaluation_path(run_dir, step)
            path.parent.mkdir(exist_ok=True)
            record = json.dumps({"step": step, **result.to_dict()}, indent=1, default=str)
            atomic_write(path, record.encode())
        return result.metrics

    def _grid(self, path: Path) -> None:
        num_classes = self.pipeline.transformer.config.num_classes
        shown = np.linspace(0, num_classes - 1, min(num_classes, MAX_GRID_CLASSES)).astype(int)

        def draw() -> bool:
            try:
                sheet = sample_grid(
                    self.pipeline, self.settings, shown.tolist(), on_step=self.preemption.check
                )
            except Interrupted:
                return False
            content = io.BytesIO()
            sheet.save(content, "png")
            path.parent.mkdir(exist_ok=True)
            atomic_write(path, content.getvalue())
            return True

        if not run_on_main_process(self.accelerator, draw):
            raise Interrupted

    def _reference(self, images: ImageSet) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in read_batches(images, index_batches(range(len(images)), BATCH_SIZE)):
            self.preemption.check()
            yield batch

    def _evaluate(self) -> Any:
        classes = range(self.pipeline.transformer.config.num_classes)
        labels = np.asarray(set_labels(self.config.num_samples, list(classes), "balanced", 0))
        shares = np.array_split(np.arange(len(labels)), self.accelerator.num_processes)
        mine = shares[self.accelerator.process_index]

        def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            own = labels[mine]
            samples = generate(
                self.pipeline, own.tolist(), self.settings, indices=mine, batch_size=BATCH_SIZE,
                on_step=self.preemption.check,
            )  # fmt: skip
            for positions, images in samples:
                yield images, own[positions]

        assert self.evaluator is not None
        try:  # what one process raises, all of them raise
            return self.evaluator(Share(batches()))
        except EvaluationError as error:
            raise UserError(f"evaluation: {error}") from None


def grid_path(run_dir: Path, step: int) -> Path:
    """The grid of samples after ``step``."""
    return run_dir / "samples" / f"step-{step:08d}.png"


def evaluation_path(run_dir: Path, step: int) -> Path:
    """The metrics after ``step``."""
    return run_dir / "evaluations" / f"step-{step:08d}.json"
