"""Replay the training step as one CUDA graph, so that the host launches it in one call.

The first use runs a few steps whose updates are held back, then captures the step. Neither leaves
a trace: weights, moments, averages, loss scale and random numbers stay as they were. Images and
random numbers are copied into fixed buffers before each replay.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.nn.parallel import DistributedDataParallel

from ..common.cuda_graphs import capture_graph
from ..common.errors import UserError
from .config import TrainConfig
from .step_inputs import MicroBatch, clone_micro_batch, copy_micro_batch_
from .training_step import StepOutput, TrainingStep

WARM_UP_STEPS = 3
# DDP rebuilds its buckets after the first step, and times its first ten steps by events, which a
# graph cannot contain (torch's "CUDA semantics", usage with DistributedDataParallel).
WARM_UP_STEPS_DDP = 11


def reason_without_graph(config: TrainConfig, accelerator: Any) -> str | None:
    """Return why the training step cannot be captured; ``None`` if it can.

    Raises:
        UserError: it cannot be captured, but ``cuda_graphs`` is true.
    """
    reason = None
    if accelerator.device.type != "cuda" or torch.version.cuda is None:
        reason = "there is no NVIDIA GPU"
    elif accelerator.is_fsdp2:
        reason = "FSDP2 gathers weights from Python"
    elif config.cuda_graphs is False:
        reason = "cuda_graphs is false"
    if reason is not None and config.cuda_graphs is True:
        raise UserError(f"cuda_graphs is true, but {reason}; set cuda_graphs to auto or false")
    return reason


@contextmanager
def capturable(optimizer: Any) -> Iterator[None]:
    """Allow the capture of ``optimizer`` in this block; outside of it, AdamW would warn."""
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["capturable"] = False


class GraphedStep:
    """Runs a :class:`TrainingStep`, as a CUDA graph if possible.

    Args:
        step: the step.
        reason: why the step cannot be captured; ``None`` to capture it.
        required: raise if the capture fails; otherwise continue without a graph.
        capture: captures a function. Tests without a GPU replace it.
    """

    def __init__(
        self,
        step: TrainingStep,
        reason: str | None,
        required: bool,
        capture: Callable[[Callable[[], StepOutput]], Callable[[], StepOutput]] = capture_graph,
    ):
        self.step, self.reason, self.required, self.capture = step, reason, required, capture
        self._replay: Callable[[], StepOutput] | None = None
        self._inputs: list[MicroBatch] = []
        self._prepared = False

    @property
    def will_capture(self) -> bool:
        """Whether the next :meth:`prepare` captures the step."""
        return self.reason is None and self._replay is None

    def prepare(self, micro_batches: list[MicroBatch]) -> str | None:
        """Capture the step unless it is captured; return a line about it the first time.

        Args:
            micro_batches: inputs of any step.

        Raises:
            UserError: the capture failed on a process, and a graph is required or the step
                exchanges gradients, which a failed capture interrupts.
        """
        began, first = time.perf_counter(), not self._prepared
        if self.will_capture:
            self._inputs = [clone_micro_batch(micro_batch) for micro_batch in micro_batches]
            self.reason = self._warm_up_and_capture(first)
        self._prepared = True
        if not first or self.step.accelerator.device.type == "cpu":
            return None
        if self.reason is not None:
            return f"training without CUDA graphs: {self.reason}"
        return f"training step captured as one CUDA graph in {time.perf_counter() - began:.1f} s"

    def _warm_up_and_capture(self, warm_up: bool) -> str | None:
        """Capture the step; return why this failed on any process, or ``None``."""
        is_ddp = isinstance(self.step.model, DistributedDataParallel)
        num_steps = WARM_UP_STEPS_DDP if is_ddp else WARM_UP_STEPS
        failure = None
        with self.step.guard.hold_updates():
            for _ in range(num_steps if warm_up else 0):
                self.step(self._inputs)
            try:
                with capturable(self.step.optimizer):
                    self._replay = self.capture(lambda: self.step(self._inputs))
            except RuntimeError as error:  # also torch.OutOfMemoryError
                failure = f"the capture failed ({str(error).splitlines()[0]})"
        failures = [each for each in gather_object([failure]) if each is not None]
        if not failures:
            return None
        self.release()
        self.step.optimizer.zero_grad(set_to_none=True)
        if self.required or is_ddp:
            raise UserError(
                f"the training step cannot run as a CUDA graph, because {failures[0]}; set "
                "cuda_graphs to false, or reduce batch_size if memory is short"
            )
        return failures[0]

    def __call__(self, micro_batches: list[MicroBatch]) -> StepOutput:
        """Run the step. Under a graph, the next call overwrites the results."""
        if self._replay is None:
            return self.step(micro_batches)
        for target, source in zip(self._inputs, micro_batches, strict=True):
            copy_micro_batch_(target, source)
        return self._replay()

    def release(self) -> None:
        """Free the memory of the graph; the next :meth:`prepare` captures the step again."""
        if self._inputs:
            self._replay, self._inputs = None, []
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
