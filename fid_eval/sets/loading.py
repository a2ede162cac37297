"""Divide a set into batches and load them ahead of use, in threads or worker processes."""

import contextlib
import math
import mmap
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from threading import Thread
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from ..distributed import local_world_size
from ..errors import EvaluationError

PROCESSES_FROM = 500  # fewer images are decoded in threads: starting processes takes longer
CHUNK = 1024  # images in one cache file and in one unit of work of a rank
NICE = 10  # niceness of worker processes
CPU = torch.device("cpu")
READ_AHEAD = 4 << 30  # upper limit of decoded images held ahead of use, in bytes per set
CAN_FORK = "fork" in multiprocessing.get_all_start_methods()
Span = tuple[int, int]  # index of the first image of a batch, and of the one after the last
Owned = Callable[[int], bool]  # whether this rank reads the chunk with this index


def batch_spans(count: int, batch_size: int, owned: Owned) -> Iterator[Span]:
    """Yield (start, stop) of each batch in the chunks for which ``owned(chunk)`` is true.

    No batch crosses a chunk, so the batches are the same for every number of ranks.
    """
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
    """Load the images of each span ahead of use, within ``READ_AHEAD`` bytes.

    Args:
        reader: an ``ImageReader``.
        spans: what to load, in order.
        batch_size: length of the longest span.
        workers: number of threads or processes.
        decoding: call ``reader.read_into`` in worker processes instead of ``reader.read`` in
            threads.
        device: where the images go next; memory is pinned for a GPU.

    Yields:
        uint8 (n, H, W, 3) on the CPU.
    """
    height, width = reader.size or (256, 256)
    # Share the free memory with the other ranks of this machine and with another set read ahead.
    available = psutil.virtual_memory().available // local_world_size()
    if batch_size * height * width * 3 > available:
        raise EvaluationError(
            f"{batch_size} images of {width}×{height} pixels do not fit into memory; use a smaller "
            "--batch_size"
        )
    spare = available // 4
    slots = max(2, min(READ_AHEAD, spare) // (batch_size * height * width * 3))
    if decoding and CAN_FORK:
        # Many slots, to fill while the network is built or the previous set is measured.
        window = min(slots, 10 * workers)
        batches = _decoded(reader, spans, batch_size, min(workers, window), window, device)
        next(batches)  # Start the worker processes now.
        return batches  # type: ignore[return-value]

    def load(span: Span) -> Tensor:
        images = torch.from_numpy(reader.read(*span))
        return images.pin_memory() if device.type == "cuda" else images

    return prefetch(load, spans, workers, min(slots, 2 * workers))


def prefetch(function: Callable, items: Iterable, workers: int, window: int) -> Iterator:
    """Map ``function`` over ``items`` in threads, in order, at most ``window`` results ahead."""
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


_shared: tuple  # in a worker process: values inherited from the parent
_writing_ends: set[int] = set()  # pipes by which this process ends its workers


@contextlib.contextmanager
def _forked_workers(workers: int, *shared: Any) -> Iterator[ProcessPoolExecutor]:
    """Fork workers that inherit ``shared``; its values need not be picklable.

    Each worker exits when it reads a byte from a pipe, or when the pipe closes because this
    process has ended, even by SIGKILL. If the block fails, the workers are stopped at once.
    """
    reading, writing = os.pipe()
    _writing_ends.add(writing)
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _initialize_worker, (reading, *shared))
    try:
        yield pool
    except BaseException:
        os.write(writing, bytes(workers))  # one byte for each worker
        raise
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        finally:
            _writing_ends.discard(writing)
            os.close(writing)
            os.close(reading)


def _initialize_worker(reading: int, *values: Any) -> None:
    global _shared
    _shared = values
    for end in _writing_ends:  # Only the parent may hold them open.
        os.close(end)
    Thread(target=_exit_with_parent, args=(reading,), daemon=True).start()
    torch.set_num_threads(1)
    os.nice(NICE)  # Leave priority to the process that feeds the network.


def _exit_with_parent(reading: int) -> None:
    os.read(reading, 1)
    os._exit(1)


def _worker_killed(workers: int) -> EvaluationError:
    return EvaluationError(
        f"one of {workers} worker processes was killed, perhaps because memory ran out; try fewer "
        "--workers"
    )


def map_in_processes(function: Callable, items: Sequence, workers: int) -> Iterator:
    """Map ``function`` over ``items`` in forked workers, or in threads for short sequences."""
    if len(items) < 2 * workers or not CAN_FORK:
        yield from prefetch(function, items, workers, 2 * workers)
        return
    try:
        with _forked_workers(workers, function) as pool:
            yield from pool.map(_call, items)
    except BrokenProcessPool:
        raise _worker_killed(workers) from None


def _call(item: Any) -> Any:
    return _shared[0](item)


def _decode(span: Span, offset: int) -> list[str] | EvaluationError:
    """Decode a span's images into shared memory at ``offset``; return their digests."""
    reader, memory = _shared
    shape = (span[1] - span[0], *reader.size, 3)
    images = np.frombuffer(memory, np.uint8, math.prod(shape), offset).reshape(shape)
    try:
        return reader.read_into(*span, images)
    except EvaluationError as error:
        return error  # The parent raises it, without the traceback of the worker.


def _decoded(
    reader: Any, spans: list[Span], batch_size: int, workers: int, window: int, device: torch.device
) -> Iterator[Tensor | None]:
    """Decode ``spans`` in forked workers, which write into ``window`` slots of shared memory.

    Yields None first, once the workers run, then the batches. Threads would be slower: they wait
    for the interpreter lock many times per image, so 16 threads decode as fast as three processes.
    """
    height, width = reader.size
    batch_bytes = batch_size * height * width * 3
    # Anonymous memory is not limited by the size of /dev/shm.
    memory = mmap.mmap(-1, window * batch_bytes)
    whole = np.frombuffer(memory, np.uint8)
    free, waiting = list(range(window)), deque(spans)
    due: deque[tuple[int, Span, Future]] = deque()

    def submit(pool: ProcessPoolExecutor) -> None:
        while waiting and free:
            slot, span = free.pop(), waiting.popleft()
            due.append((slot, span, pool.submit(_decode, span, slot * batch_bytes)))

    try:
        with _forked_workers(workers, reader, memory) as pool:
            submit(pool)
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
                # Copy with NumPy: torch would use threads, and the workers occupy all cores.
                np.copyto(images.numpy(), whole[start : start + math.prod(shape)].reshape(shape))
                free.append(slot)
                submit(pool)
                yield images
    except BrokenProcessPool:
        raise _worker_killed(workers) from None
