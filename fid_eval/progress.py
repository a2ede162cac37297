"""Progress with rate and time left: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm

LINE_EVERY = 15.0  # seconds between lines where there is no terminal


class Bar(Protocol):
    def update(self, n: int) -> object: ...


class _Lines:
    def __init__(self, total: int | None, description: str, unit: str) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done, self.start = 0, time.monotonic()
        self.printed = self.start

    def update(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.printed >= LINE_EVERY:
            self.printed = now
            rate = self.done / (now - self.start)
            left = f", {(self.total - self.done) / rate:.0f} s left" if self.total else ""
            of = f"/{self.total}" if self.total else ""
            print(
                f"{self.description}: {self.done}{of} {self.unit}, {rate:.1f} {self.unit}/s{left}",
                file=sys.stderr,
                flush=True,
            )


class _Silent:
    def update(self, n: int) -> None:
        pass


@contextmanager
def progress(
    total: int | None, description: str, unit: str = "images", quiet: bool = False
) -> Iterator[Bar]:
    """A bar to ``update(n)``; ``quiet`` shows nothing."""
    if quiet:
        yield _Silent()
    elif sys.stderr.isatty():
        with tqdm(total=total, desc=description, unit=f" {unit}") as bar:
            yield bar
    else:
        yield _Lines(total, description, unit)
