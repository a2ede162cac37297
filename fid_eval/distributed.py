"""The processes of ``torchrun`` or ``accelerate launch``, or just this one."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import EvaluationError

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # one process may measure for hours while the others wait
_group: Any = None
_joined = False


def world() -> tuple[int, int]:
    """(rank, number of processes); joins the launcher's group if that is not done yet."""
    global _group, _joined
    if not dist.is_available() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if not (dist.is_available() and dist.is_initialized()):
            return 0, 1
    elif not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
        _joined = True
    if _group is None:  # features travel through the CPU, whatever the caller's own group uses
        _group = dist.new_group(backend="gloo", timeout=PATIENCE)
    return dist.get_rank(), dist.get_world_size()


def local_processes() -> int:
    """How many processes of the run share this machine's cores and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def leave() -> None:
    """Leave the group again, if ``world`` joined it."""
    global _group, _joined
    if _joined:
        dist.destroy_process_group()
        _group, _joined = None, False


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """The device called ``name``; unless given, this process's GPU, else the CPU."""
    if name is not None:
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except Exception as error:  # torch raises many kinds
            reason = " ".join(str(error).split()).split(". ")[0]
            raise EvaluationError(f"device {str(name)!r} cannot be used: {reason}") from None
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    return torch.device("cpu")


def gather(item: T) -> list[T] | None:
    """The items of all processes, in their order, on process 0; None on the others."""
    rank, size = world()
    if size == 1:
        return [item]
    gathered: list[Any] | None = [None] * size if rank == 0 else None
    dist.gather_object(item, gathered, group=_group)
    return gathered


def broadcast(item: T) -> T:
    """Process 0's item, on every process."""
    if world()[1] == 1:
        return item
    box = [item]
    dist.broadcast_object_list(box, src=0, group=_group)
    return box[0]


def together(function: Callable[[], T]) -> T:
    """``function()`` on each process; if it fails on any, the same error on all.

    Without this, the others would wait for ever for the one that left.
    """
    if world()[1] == 1:
        return function()
    result: Any = None
    failure: Any = None
    try:
        result = function()
    except EvaluationError as error:
        failure = str(error)
    except Exception as error:
        failure = error
    failures = broadcast([f for f in gather(failure) or [] if f is not None])
    if failures:
        first = failures[0]
        raise EvaluationError(first) if isinstance(first, str) else first
    return result


def on_first(function: Callable[[], T]) -> T:
    """``function()`` on process 0 alone; its result, or its error, on all."""
    if world()[1] == 1:
        return function()
    outcome: tuple[bool, Any] = (True, None)
    if world()[0] == 0:
        try:
            outcome = (True, function())
        except EvaluationError as error:
            outcome = (False, str(error))
        except Exception as error:
            outcome = (False, error)
    good, value = broadcast(outcome)
    if good:
        return value
    raise EvaluationError(value) if isinstance(value, str) else value
