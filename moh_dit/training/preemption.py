"""SIGTERM: what a scheduler sends before it takes a machine away."""

import signal
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # this is made before torch is there
    from accelerate import Accelerator

PREEMPTED = 75  # exit code EX_TEMPFAIL: whatever there was is saved, and may be queued again


class Interrupted(Exception):
    """A SIGTERM came in the middle of something that can be done again later."""


class Preemption:
    """What a SIGTERM does.

    Until :meth:`hold` it ends the program at once, with exit code 75, since there is nothing to
    save; from then on it is remembered, and all processes stop after the same step.
    """

    ASK_EVERY = 10  # steps between asking the other processes, where there are any

    def __init__(self) -> None:
        self.told = False
        self._held = False
        signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        if not self._held:
            raise SystemExit(PREEMPTED)

    def hold(self) -> None:
        """From now on there is something to save first."""
        self._held = True

    @staticmethod
    def leave_to_trainer(worker: int) -> None:
        """In a loader's worker: jobs are told as a whole, and the step still needs its data."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def is_due(self, accelerator: "Accelerator", step: int) -> bool:
        """Whether to stop after this step."""
        if accelerator.num_processes == 1:
            return self.told
        return step % self.ASK_EVERY == 0 and sum_over(accelerator, self.told)[0] > 0

    def check(self) -> None:
        """Raise ``Interrupted`` where this process has been told."""
        if self.told:
            raise Interrupted

    def check_all(self, accelerator: "Accelerator", done: bool) -> bool:
        """Raise ``Interrupted`` where any process has been told; all of them ask together.

        Returns:
            Whether any process is not ``done``.
        """
        told, finished = sum_over(accelerator, self.told, done)
        if told:
            raise Interrupted
        return finished < accelerator.num_processes


def sum_over(accelerator: "Accelerator", *flags: bool) -> list[float]:
    """How many processes hold each of the flags."""
    import torch

    counts = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    return accelerator.reduce(counts, "sum").tolist()  # type: ignore[union-attr]
