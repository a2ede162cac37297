"""Reading ahead: which images make a batch, and loading batches by threads or processes."""

import math
import mmap
import multiprocessing
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import EvaluationError

PROCESSES_FROM = 500  # encoded images from which decoding is worth processes
CHUNK = 1024  # images of one cache file, one part of the sums, one process's turn
CPU = torch.device("cpu")
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
    read: Read,
    spans: list[Span],
    batch_bytes: int,
    workers: int,
    decoding: bool,
    device: torch.device = CPU,
) -> Iterator[Tensor]:
    """uint8 (n, H, W, 3) of each span in order, read ahead within READ_AHEAD bytes.

    On ``device`` where that is a GPU and processes decode; else on the CPU, pinned for a GPU.
    """
    window = max(2, min(READ_AHEAD // batch_bytes, 2 * workers))
    if decoding and "fork" in multiprocessing.get_all_start_methods():
        return decode_in_processes(read, spans, batch_bytes, min(workers, window), window, device)

    def load(span: Span) -> Tensor:
        images = torch.from_numpy(read(*span))
        return images.pin_memory() if device.type == "cuda" else images

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


_shared: tuple[Read, mmap.mmap]  # in a decoding process: what it reads, and where to


def _share(read: Read, memory: mmap.mmap) -> None:
    global _shared
    _shared = read, memory
    torch.set_num_threads(1)


def _decode(span: Span, offset: int) -> tuple[int, ...] | str:
    """Put a span's images at ``offset`` of the shared memory; their shape, or what is wrong."""
    read, memory = _shared
    try:
        images = read(*span)
    except EvaluationError as error:
        return str(error)  # raised again by the parent, without the worker's traceback
    np.frombuffer(memory, np.uint8, images.size, offset).reshape(images.shape)[:] = images
    return images.shape


def decode_in_processes(
    read: Read, spans: list[Span], batch_bytes: int, workers: int, window: int, device: torch.device
) -> Iterator[Tensor]:
    """The batches of ``spans`` by forked processes, through ``window`` slots of shared memory.

    Decoding threads would release the interpreter lock, but wait for it a dozen times an image
    behind the thread that feeds the network: 16 of them decode as fast as three processes. The
    slots are pinned once, and the GPU copies from them while the network computes.
    """
    memory = mmap.mmap(-1, window * batch_bytes)  # anonymous: no file, no limit of /dev/shm
    whole = np.frombuffer(memory, np.uint8)
    on_gpu, pinned = device.type == "cuda", False
    if on_gpu:
        torch.cuda.init()
        runtime = torch.cuda.cudart()
        status = runtime.cudaHostRegister(whole.ctypes.data, whole.nbytes, 0)
        pinned = status == runtime.cudaError.success
        if not pinned:
            warnings.warn(f"decoded images are not pinned ({status}): copying waits", stacklevel=2)
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=_share, initargs=(read, memory)
    )
    copying: deque[tuple[int, Any]] = deque()  # slots that the GPU still reads
    free, waiting = list(range(window)), deque(spans)
    due: deque[tuple[int, Future]] = deque()
    try:
        while waiting or due:
            while waiting and (free or copying):
                if not free:
                    slot, copied = copying.popleft()
                    copied.synchronize()
                    free.append(slot)
                slot = free.pop()
                due.append((slot, pool.submit(_decode, waiting.popleft(), slot * batch_bytes)))
            slot, future = due.popleft()
            shape = future.result()
            if isinstance(shape, str):
                raise EvaluationError(shape)
            start = slot * batch_bytes
            images = torch.from_numpy(whole[start : start + math.prod(shape)].reshape(shape))
            if on_gpu:
                images = images.to(device, non_blocking=True)
                copying.append((slot, torch.cuda.current_stream(device).record_event()))
            else:
                images = images.clone()
                free.append(slot)
            yield images
    except BrokenProcessPool:
        raise EvaluationError(
            f"one of {workers} decoding processes was killed, for want of memory perhaps: try "
            "fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        if pinned:
            torch.cuda.synchronize(device)
            torch.cuda.cudart().cudaHostUnregister(whole.ctypes.data)
