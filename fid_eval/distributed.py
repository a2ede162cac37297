"""Run collective operations on several ranks, or on a single process.

Ranks are those of ``torchrun`` or ``accelerate launch``, or of a process group that the caller has
initialized.
"""

import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import EvaluationError, describe_error
from .time_limit import interruptible

T = TypeVar("T")
TIMEOUT = timedelta(days=1)  # rank 0 may compute metrics for hours while the other ranks wait
_group: Any = None
_initialized_here = False


def rank_and_world_size() -> tuple[int, int]:
    """Return (rank, world size). Initialize the process group of the launcher if necessary."""
    global _group, _initialized_here
    is_launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not dist.is_available() or not (is_launched or dist.is_initialized()):
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=TIMEOUT)
        _initialized_here = True
    if _group is None:  # Features are gathered on the CPU, whatever backend the caller uses.
        _group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return dist.get_rank(), dist.get_world_size()


def local_world_size() -> int:
    """Return the number of ranks that share the cores and memory of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def destroy_process_group() -> None:
    """Destroy the process group if ``rank_and_world_size`` initialized it."""
    global _group, _initialized_here
    if _initialized_here:
        dist.destroy_process_group()
        _group, _initialized_here = None, False


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """Return the device called ``name``; by default the GPU of this rank, else the CPU.

    Raises:
        EvaluationError: the device is unknown or not available.
    """
    if name is not None:
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except Exception as error:  # torch raises many types
            reason = " ".join(str(error).split()).split(". ")[0]
            raise EvaluationError(f"device {str(name)!r} cannot be used: {reason}") from None
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    return torch.device("cpu")


def move_if_small(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to the GPU if it takes at most a quarter of the GPU's free memory.

    Otherwise, and for other devices, return it unchanged.
    """
    if device.type != "cuda" or tensor.nbytes > torch.cuda.mem_get_info(device)[0] / 4:
        return tensor
    return tensor.to(device)


def gather_on_rank0(item: T) -> list[T] | None:
    """Return the items of all ranks, in the order of ranks, on rank 0; None on other ranks."""
    rank, size = rank_and_world_size()
    if size == 1:
        return [item]
    gathered: list[Any] | None = [None] * size if rank == 0 else None
    dist.gather_object(item, gathered, group=_group)
    return gathered


def broadcast_from_rank0(item: T) -> T:
    """Return the item of rank 0 on every rank."""
    if rank_and_world_size()[1] == 1:
        return item
    box = [item]
    dist.broadcast_object_list(box, src=0, group=_group)
    return box[0]


def run_on_all_ranks(function: Callable[[], T]) -> T:
    """Call ``function`` on each rank; if it fails on one rank, raise that error on all ranks.

    Without this, the other ranks would wait forever for the rank that failed.
    """
    result, error = _call(function)
    errors = [each for each in gather_on_rank0(error) or [] if each is not None]
    first = broadcast_from_rank0(errors[0] if errors else None)
    if first is not None:
        raise first
    return result


def run_on_rank0(function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0 and return its result, or raise its error, on all ranks."""
    rank, _ = rank_and_world_size()
    outcome: tuple[Any, Exception | None] = _call(function) if rank == 0 else (None, None)
    result, error = broadcast_from_rank0(outcome)
    if error is not None:
        raise error
    return result


def _call(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return (result, None) or (None, error). With several ranks, the error can be pickled."""
    try:
        with interruptible():
            return function(), None
    except Exception as error:
        if rank_and_world_size()[1] > 1:
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:  # Exceptions of other packages may need arguments.
                return None, RuntimeError(describe_error(error))
        return None, error
