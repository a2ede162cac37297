"""Interrupt work that takes longer than a limit, such as reading from a hung file system."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import EvaluationError

SECONDS_BETWEEN_ALARMS = 5.0  # Clean-up that hangs after the first alarm is interrupted, too.
_limit: tuple[float, str] | None = None  # deadline of time.monotonic(), and the error message
_exceeded = False  # whether any limit of this process was exceeded


class _Alarm(BaseException):
    """Passes through ``except Exception`` on its way to ``interruptible``."""


@contextmanager
def time_limit(seconds: float | None, name: str) -> Iterator[None]:
    """Limit the time until the last ``interruptible`` part of this block ends.

    Args:
        seconds: the limit; None for no limit.
        name: the sample set, for the error message.
    """
    global _limit
    if seconds is not None:
        message = f"{name}: took longer than --time_limit {seconds:g}"
        _limit = time.monotonic() + seconds, message
    try:
        yield
    finally:
        _limit = None


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise an EvaluationError in this block once the limit of ``time_limit`` is exceeded.

    Python runs the signal handler between two bytecodes of the main thread. A wait for a file, a
    thread or a process is interrupted at once, a computation in C or on a GPU when it ends.
    Communication between ranks must stay outside of this block.
    """
    if _limit is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    deadline, message = _limit

    def interrupt(*_: Any) -> None:
        global _exceeded
        _exceeded = True
        raise _Alarm

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        try:
            left = max(1e-3, deadline - time.monotonic())
            signal.setitimer(signal.ITIMER_REAL, left, SECONDS_BETWEEN_ALARMS)
            yield
        finally:  # If the first alarm interrupts this line, the second is seconds away.
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Alarm:
        raise EvaluationError(message) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def exit_if_threads_hang(code: int) -> None:
    """End the process if threads still hang after an exceeded limit; Python would wait for them."""
    others = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
    if _exceeded and others:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
