"""SIGTERM: what a scheduler sends before it takes a machine away."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # this is made before torch is there
    from accelerate import Accelerator

PREEMPTED = 75  # exit code EX_TEMPFAIL: whatever there was is saved, and may be queued again


class Interrupted(Exception):
    """A SIGTERM came in the middle of something that can be done again later."""


class Preemption:
    """What a SIGTERM does.

    Before :meth:`held` it ends the program at once, with exit code 75, since there is nothing to
    save; within, it is remembered, and all processes stop after the same step.
    """

    ASK_EVERY = 10  # steps between asking the other processes, where there are any
    GRACE = 5.0  # seconds for the main thread to end the program itself

    def __init__(self) -> None:
        self.told = False
        self._held = False
        self._before = signal.signal(signal.SIGTERM, self._remember) or signal.SIG_DFL
        heard, self._tell = os.pipe()
        os.set_blocking(self._tell, False)
        self._told_before = signal.set_wakeup_fd(self._tell, warn_on_full_buffer=False)
        threading.Thread(target=self._insist, args=(heard,), daemon=True).start()
        os.register_at_fork(after_in_child=self._leave_to_parent)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        if not self._held:
            raise SystemExit(PREEMPTED)

    def _insist(self, heard: int) -> None:
        """End the program also where its main thread waits for other processes, in C: Python hands
        a signal over between two of its own instructions."""
        while signals := os.read(heard, 1):
            if signals[0] == signal.SIGTERM:
                time.sleep(self.GRACE)
                if not self._held:
                    os._exit(PREEMPTED)
        os.close(heard)

    def _leave_to_parent(self) -> None:
        """In a forked process: it would tell the parent through the same pipe."""
        if signal.getsignal(signal.SIGTERM) == self._remember:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    @staticmethod
    @contextmanager
    def withheld() -> Iterator[None]:
        """A SIGTERM waits: one that comes between a worker's fork and its first line, too."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @staticmethod
    def leave_to_trainer(worker: int) -> None:
        """In a loader's worker: jobs are told as a whole, and the step still needs its data."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    @contextmanager
    def held(self) -> Iterator[None]:
        """While there is something to save first; afterwards what was before this was made."""
        self._held = True
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, self._before)
            signal.set_wakeup_fd(self._told_before)
            os.close(self._tell)

    def is_due(self, accelerator: "Accelerator", step: int) -> bool:
        """Whether to stop after this step."""
        if accelerator.num_processes == 1:
            return self.told
        if step % self.ASK_EVERY:
            return False
        import torch

        told = torch.tensor(float(self.told), device=accelerator.device)
        return bool(accelerator.reduce(told, "sum") > 0)

    def check(self, *_: object) -> None:
        """Raise ``Interrupted`` where this process has been told."""
        if self.told:
            raise Interrupted
