"""Look at a run while it trains: grids of samples and FID, by the code that does it afterwards."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from accelerate import Accelerator

from fid_eval import EvaluationError, Evaluator, Share

from ..data.images import ImageSet, read_batches
from ..data.latents import LatentSet, index_batches
from ..errors import UserError
from ..pipeline import MoHDiTPipeline
from ..sampling.config import SamplingSettings
from ..sampling.engine import generate, use_settings
from ..sampling.exact import set_labels
from ..sampling.grids import sample_grid
from .config import EvaluationConfig

MAX_GRID_CLASSES = 10
BATCH_SIZE = 64


class Preview:
    """Samples and measures the averaged model of a run.

    Args:
        config: what to sample and to measure.
        accelerator: the run's processes, which share the samples of an evaluation.
        pipeline: the averaged model with the run's autoencoder and scheduler.
        data: the training data; its images are the reference unless the configuration names one.

    Raises:
        UserError: an extractor or reference that cannot be had, before any training.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        accelerator: Accelerator,
        pipeline: MoHDiTPipeline,
        data: ImageSet | LatentSet,
    ):
        self.config = config
        self.accelerator = accelerator
        self.settings = SamplingSettings(
            num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale
        )
        self.pipeline = pipeline
        use_settings(pipeline, self.settings, None)  # so that mistakes are found before training
        self.evaluator: Evaluator | None = None
        if config.fid_every:
            if config.reference is None and isinstance(data, LatentSet):
                raise UserError("evaluation.fid_every with data.latents needs evaluation.reference")
            try:
                self.evaluator = Evaluator(
                    config.reference or _labelled_batches(cast(ImageSet, data)),
                    metrics=config.metrics,
                    extractor=config.feature_extractor,
                    weights=config.feature_extractor_weights,
                    device=accelerator.device,
                    quiet=True,
                )
                self.evaluator.load()
            except EvaluationError as error:
                raise UserError(f"evaluation: {error}") from None

    def is_due(self, step: int, last: bool) -> bool:
        """Whether anything is to be sampled after ``step``."""
        every = (self.config.sample_every, self.config.fid_every)
        return last or any(steps and step % steps == 0 for steps in every)

    def after(self, step: int, last: bool, run_dir: Path) -> dict[str, float]:
        """Whatever is due after ``step``; returns the metrics measured, if any."""
        config = self.config
        if last or (config.sample_every and step % config.sample_every == 0):
            self._grid(run_dir / "samples" / f"step-{step:08d}.png")
        if self.evaluator is None or not (last or step % config.fid_every == 0):
            return {}
        result = self._evaluate()
        if self.accelerator.is_main_process:
            folder = run_dir / "evaluations"
            folder.mkdir(exist_ok=True)
            record = json.dumps({"step": step, **result.to_dict()}, indent=1, default=str)
            (folder / f"step-{step:08d}.json").write_text(record)
        return result.metrics

    def _grid(self, path: Path) -> None:
        if self.accelerator.is_main_process:
            path.parent.mkdir(exist_ok=True)
            num_classes = self.pipeline.transformer.config.num_classes
            shown = np.linspace(0, num_classes - 1, min(num_classes, MAX_GRID_CLASSES)).astype(int)
            sample_grid(self.pipeline, self.settings, shown.tolist()).save(path)
        self.accelerator.wait_for_everyone()

    def _evaluate(self) -> Any:
        classes = range(self.pipeline.transformer.config.num_classes)
        labels = np.asarray(set_labels(self.config.num_samples, list(classes), "balanced", 0))
        shares = np.array_split(np.arange(len(labels)), self.accelerator.num_processes)
        mine = shares[self.accelerator.process_index]

        def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            own = labels[mine]
            samples = generate(
                self.pipeline, own.tolist(), self.settings, indices=mine, batch_size=BATCH_SIZE
            )
            for positions, images in samples:
                yield images, own[positions]

        assert self.evaluator is not None
        try:
            return self.evaluator(Share(batches()))
        except EvaluationError as error:
            raise UserError(f"evaluation: {error}") from None


def _labelled_batches(images: ImageSet) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    yield from read_batches(images, index_batches(range(len(images)), BATCH_SIZE))
