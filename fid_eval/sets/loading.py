"""Reading ahead: which images make a batch, and loading batches by threads or processes."""

import math
import mmap
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from ..distributed import local_processes
from ..errors import EvaluationError

PROCESSES_FROM = 500  # encoded images from which decoding is worth processes
CHUNK = 1024  # images of one cache file, one part of the sums, one process's turn
NICE = 10  # of processes that load
CPU = torch.device("cpu")
READ_AHEAD = 4 << 30  # bytes of decoded images of a set held in advance, at most
CAN_FORK = "fork" in multiprocessing.get_all_start_methods()
Span = tuple[int, int]  # first image of a batch, and the one after its last


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
    reader: Any,
    spans: list[Span],
    batch_size: int,
    workers: int,
    decoding: bool,
    device: torch.device = CPU,
) -> Iterator[Tensor]:
    """uint8 (n, H, W, 3) of each span in order, read ahead within READ_AHEAD bytes.

    ``reader``: an ``ImageReader``, of which ``read`` is called, or ``read_into`` by processes where
    it is ``decoding``. On the CPU, pinned where ``device`` is a GPU.
    """
    height, width = reader.size or (256, 256)
    # Another set may be read ahead at the same time, and by as many processes as share the machine.
    spare = psutil.virtual_memory().available // (4 * local_processes())
    slots = max(2, min(READ_AHEAD, spare) // (batch_size * height * width * 3))
    if decoding and CAN_FORK:
        # They fill up while the network is built, or the set before goes through it.
        window = min(slots, 10 * workers)
        batches = _decoded(reader, spans, batch_size, min(workers, window), window, device)
        next(batches)  # has the processes at work
        return batches  # type: ignore[return-value]

    def load(span: Span) -> Tensor:
        images = torch.from_numpy(reader.read(*span))
        return images.pin_memory() if device.type == "cuda" else images

    return prefetch(load, spans, workers, min(slots, 2 * workers))


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


_shared: tuple  # in a forked process: what its parent wants it to know


def _share(*values: Any) -> None:
    global _shared
    _shared = values
    torch.set_num_threads(1)
    os.nice(NICE)  # whoever feeds the network goes first


def _forked(workers: int, *shared: Any) -> ProcessPoolExecutor:
    """Forked processes that know ``shared``, which need not be picklable."""
    context = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(workers, context, initializer=_share, initargs=shared)


def _killed(workers: int) -> EvaluationError:
    return EvaluationError(
        f"one of {workers} loading processes was killed, for want of memory perhaps: try fewer "
        "--workers"
    )


def map_in_processes(function: Callable, items: Sequence, workers: int) -> Iterator:
    """``map(function, items)`` by forked processes, where there is enough to do."""
    if len(items) < 2 * workers or not CAN_FORK:
        yield from prefetch(function, items, workers, 2 * workers)
        return
    try:
        with _forked(workers, function) as pool:
            yield from pool.map(_call, items)
    except BrokenProcessPool:
        raise _killed(workers) from None


def _call(item: Any) -> Any:
    return _shared[0](item)


def _decode(span: Span, offset: int) -> list[str] | EvaluationError:
    """Put a span's images at ``offset`` of the shared memory; their digests, or what is wrong."""
    reader, memory = _shared
    shape = (span[1] - span[0], *reader.size, 3)
    images = np.frombuffer(memory, np.uint8, math.prod(shape), offset).reshape(shape)
    try:
        return reader.read_into(*span, images)
    except EvaluationError as error:
        return error  # raised again by the parent, without the worker's traceback


def _decoded(
    reader: Any,
    spans: list[Span],
    batch_size: int,
    workers: int,
    window: int,
    device: torch.device,
) -> Iterator[Tensor | None]:
    """None, then the batches of ``spans`` by forked processes through ``window`` shared slots.

    Decoding threads would release the interpreter lock, but wait for it a dozen times an image
    behind the thread that feeds the network: 16 of them decode as fast as three processes.
    """
    height, width = reader.size
    batch_bytes = batch_size * height * width * 3
    memory = mmap.mmap(-1, window * batch_bytes)  # anonymous: no file, no limit of /dev/shm
    whole = np.frombuffer(memory, np.uint8)
    pool = _forked(workers, reader, memory)
    free, waiting = list(range(window)), deque(spans)
    due: deque[tuple[int, Span, Future]] = deque()

    def submit() -> None:
        while waiting and free:
            slot, span = free.pop(), waiting.popleft()
            due.append((slot, span, pool.submit(_decode, span, slot * batch_bytes)))

    try:
        submit()
        yield None
        while due:
            slot, span, future = due.popleft()
            digests = future.result()
            if isinstance(digests, EvaluationError):
                raise digests
            if reader.digests is not None:
                reader.digests.update(zip(range(*span), digests, strict=True))
            shape = (span[1] - span[0], height, width, 3)
            start = slot * batch_bytes
            images = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
            # By numpy, on this thread: torch would wait for threads that wait for a core.
            np.copyto(images.numpy(), whole[start : start + math.prod(shape)].reshape(shape))
            free.append(slot)
            submit()
            yield images
    except BrokenProcessPool:
        raise _killed(workers) from None
    finally:
        pool.shutdown(cancel_futures=True)
