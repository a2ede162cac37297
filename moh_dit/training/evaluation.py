"""Draw sample grids, and measure metrics such as FID and the held-out loss during training."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator

from fid_eval import EvaluationError, Evaluator, Share

from ..common.atomic_write import atomic_write
from ..common.distributed import run_on_main_process
from ..common.errors import UserError
from ..data.images import ImageSet, index_batches, read_batches
from ..diffusion.objectives import Objective
from ..pipeline.pipeline import MoHDiTPipeline
from ..sampling.config import SamplingSettings
from ..sampling.engine import generate, use_settings
from ..sampling.grids import sample_grid
from ..sampling.sample_set import set_labels
from .config import TrainConfig
from .held_out import HeldOutLoss
from .preemption import Interrupted, Preemption
from .run_log import LOG_FILE, read_log
from .trackers import track_image
from .training_data import TrainingData

MAX_GRID_CLASSES = 10
BATCH_SIZE = 64
LOSS_KEY = "held_out_loss"


class DueOutputs(NamedTuple):
    """Outputs that are due at a step."""

    grid: bool
    metrics: bool
    held_out_loss: bool = False


class SampleEvaluator:
    """Samples from the averaged model of a run, and measures the samples and the held-out loss.

    Args:
        run_config: settings of the run.
        accelerator: the processes of the run. They share the samples of an evaluation.
        pipeline: the averaged model with the autoencoder and scheduler of the run.
        objective: objective of the run, for the held-out loss.
        data: the training data. Its images are the reference if ``evaluation`` names none.
        preemption: ends the sampling after SIGTERM, because it may take longer than the grace
            period of a scheduler.

    Raises:
        UserError: settings that do not fit the model, or a feature extractor or reference that is
            not available.
    """

    def __init__(
        self,
        run_config: TrainConfig,
        accelerator: Accelerator,
        pipeline: MoHDiTPipeline,
        objective: Objective,
        data: TrainingData,
        preemption: Preemption,
    ):
        self.config = config = run_config.evaluation
        self.data = data
        self.accelerator = accelerator
        self.settings = SamplingSettings(
            num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale
        )
        if config.guidance_scale != 1 and run_config.label_dropout == 0:
            accelerator.print(
                "warning: with label_dropout 0 the null class is never trained, so the guidance of "
                "evaluation.guidance_scale is meaningless; set it to 1",
                file=sys.stderr,
            )
        self.preemption = preemption
        self.pipeline, _ = use_settings(pipeline, self.settings)  # checks the settings
        self.held_out: HeldOutLoss | None = None
        if config.held_out is not None:
            self.held_out = HeldOutLoss(
                run_config, accelerator, pipeline.transformer, objective, data, preemption
            )
        self.evaluator: Evaluator | None = None
        if config.fid_every:
            reference: Any = config.reference
            if reference is None:
                if data.images is None:
                    raise UserError(
                        "evaluation.reference is not set; it is required with data.latents and "
                        "evaluation.fid_every"
                    )
                reference = self._read_images(data.images)
            try:
                self.evaluator = Evaluator(
                    reference,
                    metrics=config.metrics,
                    extractor=config.feature_extractor,
                    weights=config.feature_extractor_weights,
                    device=accelerator.device,
                    quiet=True,
                )
                self.evaluator.load()
            except EvaluationError as error:
                raise UserError(f"evaluation: {error}") from None

    def encode(self, run_dir: Path) -> None:
        """Encode the training images, and separate held-out images, unless they are encoded."""
        self.data.encode(run_dir)
        if self.held_out is not None:
            self.held_out.prepare(run_dir)

    def due(self, step: int, last: bool) -> DueOutputs:
        """Return the outputs that are due after ``step``; ``last``: it is the last step."""
        config = self.config
        grid = last or bool(config.sample_every and step % config.sample_every == 0)
        metrics = self.evaluator is not None and (last or step % config.fid_every == 0)
        every = config.held_out_every
        held_out = last or (step % every == 0 if every else grid or metrics)
        return DueOutputs(grid, metrics, self.held_out is not None and held_out)

    def missing(self, step: int, last: bool, run_dir: Path) -> DueOutputs:
        """Return the outputs of ``step`` that an interrupted run has not written."""
        grid, metrics, held_out = self.due(step, last)

        def check() -> DueOutputs:
            logged = (each["step"] for each in read_log(run_dir / LOG_FILE) if LOSS_KEY in each)
            return DueOutputs(
                grid and not grid_path(run_dir, step).exists(),
                metrics and not metrics_path(run_dir, step).exists(),
                held_out and step not in logged,
            )

        return run_on_main_process(self.accelerator, check)

    def make(self, due: DueOutputs, step: int, run_dir: Path) -> dict[str, Any]:
        """Write the outputs that are due; return metrics and held-out loss, if they are due.

        Raises:
            Interrupted: a process received SIGTERM; raised on all ranks.
        """
        if due.grid:
            self._draw_grid(grid_path(run_dir, step), step)
        held_out: dict[str, Any] = {}
        if due.held_out_loss and self.held_out is not None:
            held_out = self.held_out.measure()
        if not due.metrics:
            return held_out
        result = self._measure()
        if self.accelerator.is_main_process:
            path = metrics_path(run_dir, step)
            path.parent.mkdir(exist_ok=True)
            content = json.dumps({"step": step, **result.to_dict()}, indent=1, default=str)
            atomic_write(path, content.encode())
        return {**result.metrics, **held_out}

    def _draw_grid(self, path: Path, step: int) -> None:
        num_classes = self.pipeline.transformer.config.num_classes
        classes = np.linspace(0, num_classes - 1, min(num_classes, MAX_GRID_CLASSES)).astype(int)

        def draw() -> bool:
            try:
                sheet = sample_grid(
                    self.pipeline,
                    self.settings,
                    classes.tolist(),
                    on_step=self.preemption.raise_if_received,
                )
            except Interrupted:
                return False
            content = io.BytesIO()
            sheet.save(content, "png")
            path.parent.mkdir(exist_ok=True)
            atomic_write(path, content.getvalue())
            track_image(self.accelerator, "samples", sheet, step)
            return True

        if not run_on_main_process(self.accelerator, draw):
            raise Interrupted

    def _read_images(self, images: ImageSet) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in read_batches(images, index_batches(range(len(images)), BATCH_SIZE)):
            self.preemption.raise_if_received()
            yield batch

    def _measure(self) -> Any:
        classes = range(self.pipeline.transformer.config.num_classes)
        labels = np.asarray(set_labels(self.config.num_samples, list(classes), "balanced", 0))
        parts = np.array_split(np.arange(len(labels)), self.accelerator.num_processes)
        indices = parts[self.accelerator.process_index]  # of this rank's samples

        def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            own = labels[indices]
            samples = generate(
                self.pipeline,
                own.tolist(),
                self.settings,
                indices=indices,
                batch_size=BATCH_SIZE,
                on_step=self.preemption.raise_if_received,
            )
            for positions, images in samples:
                yield images, own[positions]

        assert self.evaluator is not None
        try:  # an exception on one rank is raised on all ranks
            return self.evaluator(Share(batches()))
        except EvaluationError as error:
            raise UserError(f"evaluation: {error}") from None


def grid_path(run_dir: Path, step: int) -> Path:
    """Return the path of the sample grid after ``step``."""
    return run_dir / "samples" / f"step-{step:08d}.png"


def metrics_path(run_dir: Path, step: int) -> Path:
    """Return the path of the metrics after ``step``."""
    return run_dir / "evaluations" / f"step-{step:08d}.json"
