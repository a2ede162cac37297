"""Show progress with the rate and remaining time: a bar on a terminal, otherwise log lines."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm

LOG_INTERVAL = 15.0  # seconds between log lines


class ProgressBar(Protocol):
    def update(self, n: int) -> object: ...


class _LogLines:
    def __init__(self, total: int | None, description: str, unit: str) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done, self.start = 0, time.monotonic()
        self.printed = self.start

    def update(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.printed >= LOG_INTERVAL:
            self.printed = now
            rate = self.done / (now - self.start)
            left = f", {(self.total - self.done) / rate:.0f} s left" if self.total else ""
            of = f"/{self.total}" if self.total else ""
            print(
                f"{self.description}: {self.done}{of} {self.unit}, {rate:.1f} {self.unit}/s{left}",
                file=sys.stderr,
                flush=True,
            )


@contextmanager
def progress(
    total: int | None, description: str, unit: str = "images", quiet: bool = False
) -> Iterator[ProgressBar]:
    """Yield an object whose ``update(n)`` reports ``n`` finished units; ``quiet`` shows nothing."""
    if quiet or sys.stderr.isatty():
        with tqdm(total=total, desc=description, unit=f" {unit}", disable=quiet) as bar:
            yield bar
    else:
        yield _LogLines(total, description, unit)
