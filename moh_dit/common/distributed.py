"""Run a function on rank 0 for all ranks, and own an output folder for a launch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from .errors import UserError
from .folder_lock import FolderLock
from .launcher import end_with_launcher

Result = TypeVar("Result")


def run_on_main_process(
    state: Accelerator | PartialState, function: Callable[[], Result]
) -> Result:
    """Call ``function`` on the main process only, and return its result on all processes.

    Raises:
        UserError: ``function`` raised it; all processes raise it.
    """
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome = [function()]
        except UserError as error:
            outcome = [error]
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def acquire_folder(state: Accelerator | PartialState, folder: Path) -> FolderLock:
    """Acquire an output folder on rank 0, which owns it for all ranks of its launch.

    Every rank calls this function. From here on, the ranks end with their launcher.

    Returns:
        The lock. On other ranks than 0, its methods do nothing.

    Raises:
        UserError: another process owns the folder; raised on all ranks.
    """
    end_with_launcher()
    lock = FolderLock(folder)
    run_on_main_process(state, lock.acquire)
    return lock


@contextmanager
def own_folder(state: Accelerator | PartialState, folder: Path) -> Iterator[FolderLock]:
    """Own an output folder inside the block; see :func:`acquire_folder`."""
    lock = acquire_folder(state, folder)
    try:
        yield lock
    finally:
        lock.release()
