"""Handle SIGTERM, which schedulers send before they take a machine away."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch must not be imported yet when this handler is installed
    from accelerate import Accelerator

PREEMPTED = 75  # exit code EX_TEMPFAIL: the run is saved and can be queued again


class Interrupted(Exception):
    """A SIGTERM arrived during work that can be repeated later."""


class Preemption:
    """A handler for SIGTERM, installed when the object is created.

    Outside :meth:`deferred` there is nothing to save, so SIGTERM ends the program with exit code
    75. Inside, SIGTERM is recorded, and all processes stop after the same step.
    """

    STEPS_BETWEEN_CHECKS = 10  # with several processes, because each check is an all-reduce
    GRACE_SECONDS = 5.0  # time for the main thread to end the program

    def __init__(self) -> None:
        self.received = False
        self._deferred = False
        self._previous_handler = signal.signal(signal.SIGTERM, self._handle) or signal.SIG_DFL
        signals, self._wakeup_fd = os.pipe()
        os.set_blocking(self._wakeup_fd, False)
        self._previous_fd = signal.set_wakeup_fd(self._wakeup_fd, warn_on_full_buffer=False)
        threading.Thread(target=self._exit_if_blocked, args=(signals,), daemon=True).start()
        os.register_at_fork(after_in_child=self._remove_in_child)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if not self._deferred:
            raise SystemExit(PREEMPTED)

    def _exit_if_blocked(self, signals: int) -> None:
        """End the program if the main thread does not react to SIGTERM.

        Python runs signal handlers between two of its instructions. A main thread that waits for
        other processes in C code never reaches the next instruction.
        """
        while received := os.read(signals, 1):
            if received[0] == signal.SIGTERM:
                time.sleep(self.GRACE_SECONDS)
                if not self._deferred:
                    os._exit(PREEMPTED)
        os.close(signals)

    def _remove_in_child(self) -> None:
        """Restore the defaults in a forked process, which shares the pipe with its parent."""
        if signal.getsignal(signal.SIGTERM) == self._handle:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    @staticmethod
    @contextmanager
    def blocked() -> Iterator[None]:
        """Block SIGTERM while workers start, also in a forked worker that has not run yet."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @staticmethod
    def ignore_in_worker(worker: int) -> None:
        """Ignore SIGTERM in a data-loader worker, so that the current step can finish.

        Schedulers send SIGTERM to all processes of a job, workers included.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer SIGTERM inside the block; restore the previous handler on exit."""
        self._deferred = True
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, self._previous_handler)
            signal.set_wakeup_fd(self._previous_fd)
            os.close(self._wakeup_fd)

    def should_stop(self, accelerator: "Accelerator", step: int) -> bool:
        """Return whether to stop after this step; the same on all ranks."""
        if accelerator.num_processes == 1:
            return self.received
        if step % self.STEPS_BETWEEN_CHECKS:
            return False
        import torch

        received = torch.tensor(float(self.received), device=accelerator.device)
        return bool(accelerator.reduce(received, "sum") > 0)

    def raise_if_received(self, *_: object) -> None:
        """Raise ``Interrupted`` if this process has received SIGTERM."""
        if self.received:
            raise Interrupted
