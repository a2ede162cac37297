"""Write checkpoints in a background thread while training continues."""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from tqdm import tqdm

from ..common.errors import UserError


class CheckpointWriter:
    """Copies tensors to host memory, and writes the copies in one background thread.

    At most one checkpoint is in flight. Call :meth:`wait` before copying the next one, because its
    copies use the same memory. As a context manager, the writer waits on exit.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Return a copy of ``tensor`` in host memory, complete after :meth:`start`.

        The memory is allocated at the first call with a name and used again at the next.
        With a GPU it is page-locked, so the copy runs at the speed of the bus.
        """
        if name not in self._copies:
            self._copies[name] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
            )
        return self._copies[name].copy_(tensor.detach(), non_blocking=True)

    def start(self, write: Callable[[], None]) -> None:
        """Wait until all copies are complete, then call ``write`` in the background."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self._pending = self._threads.submit(write)

    def check(self) -> None:
        """Raise the error of the last call of :meth:`start`, if it has failed by now."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is in flight.

        Raises:
            UserError: the disk is full or not writable.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except UserError as failed:
            if error is None:
                raise
            tqdm.write(f"error: {failed}", file=sys.stderr)  # keep the error that ended the block
