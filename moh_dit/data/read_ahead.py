"""Compute ahead of the consumer, so that reading, encoding and writing overlap."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
IMAGES_PER_WORKER = 256  # fewer are decoded in less time than a worker needs to start


def map_ahead(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[Result]:
    """Yield ``function(item)`` of each item in order.

    ``depth`` results are computed ahead in the pool. Items are taken from their iterator in the
    calling thread, which continues while the pool computes.
    """
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Waiting(Generic[Item]):
    """Iterate over items and count the seconds that the consumer waits for them."""

    def __init__(self, items: Iterable[Item]):
        self.items, self.seconds = items, 0.0

    def __iter__(self) -> Iterator[Item]:
        start = time.perf_counter()
        for item in self.items:
            self.seconds += time.perf_counter() - start
            yield item
            start = time.perf_counter()


def default_workers(num_images: int | None) -> int:
    """Return the number of data-loader workers that decode images for this process.

    It is the number of cores, divided by the number of processes on this machine, but at most one
    for every 256 images.

    Args:
        num_images: images to decode; ``None`` if unknown.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return workers if num_images is None else min(workers, num_images // IMAGES_PER_WORKER)
