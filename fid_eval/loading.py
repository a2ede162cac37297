"""Reading ahead: which images make a batch, and loading batches by threads or processes."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import EvaluationError

PROCESSES_FROM = 500  # encoded images from which decoding is worth processes
CHUNK = 1024  # images of one cache file, one part of the sums, one process's turn
READ_AHEAD = 1 << 30  # bytes of decoded images held in advance, at most
Span = tuple[int, int]  # first image of a batch, and the one after its last
Read = Callable[[int, int], np.ndarray]  # uint8 (n, H, W, 3) of a span


def batch_spans(
    count: int, batch_size: int, owned: Callable[[int], bool]
) -> Iterator[tuple[int, int]]:
    """(start, stop) of each batch; none crosses a chunk, so batches are the same for any split."""
    for chunk, first in enumerate(range(0, count, CHUNK)):
        if owned(chunk):
            last = min(first + CHUNK, count)
            for start in range(first, last, batch_size):
                yield start, min(start + batch_size, last)


def load_spans(
    read: Read, spans: list[Span], batch_bytes: int, workers: int, decoding: bool, pin: bool
) -> Iterator[Tensor]:
    """uint8 (n, H, W, 3) of each span in order, read ahead within READ_AHEAD bytes."""
    window = max(2, min(READ_AHEAD // batch_bytes, 2 * workers))
    if decoding and can_share(window * batch_bytes):
        return decode_in_processes(read, spans, min(workers, window), pin)

    def load(span: Span) -> Tensor:
        images = torch.from_numpy(read(*span))
        return images.pin_memory() if pin else images

    return prefetch(load, spans, workers, window)


def prefetch(function: Callable, items: Iterable, workers: int, window: int) -> Iterator:
    """``map(function, items)`` by threads, in order, at most ``window`` results ahead."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        iterator, pending = iter(items), []
        try:
            for item in iterator:
                pending.append(pool.submit(function, item))
                if len(pending) >= window:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()


def can_share(size: int) -> bool:
    """Can processes be forked, and pass ``size`` bytes through shared memory?"""
    shared = Path("/dev/shm")
    forks = "fork" in torch.multiprocessing.get_all_start_methods()
    return forks and shared.is_dir() and shutil.disk_usage(shared).free > 2 * size


class _Spans(torch.utils.data.Dataset):
    def __init__(self, read: Read, spans: list[Span]) -> None:
        self.read, self.spans = read, spans

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return torch.from_numpy(self.read(*self.spans[index]))
        except EvaluationError as error:
            return str(error)  # raised again by the parent, without the worker's traceback


def decode_in_processes(read: Read, spans: list[Span], workers: int, pin: bool) -> Iterator[Tensor]:
    """The batches of ``spans`` by forked processes.

    Decoding threads would release the interpreter lock, but wait for it a dozen times an image
    behind the thread that feeds the network: 16 of them decode as fast as three processes.
    """
    loader = torch.utils.data.DataLoader(
        _Spans(read, spans),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        multiprocessing_context="fork",
    )
    for images in loader:
        if isinstance(images, str):
            raise EvaluationError(images)
        yield images
