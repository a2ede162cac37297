"""What one of several processes does for all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from .errors import UserError

Result = TypeVar("Result")


def run_on_main_process(
    state: Accelerator | PartialState, function: Callable[[], Result]
) -> Result:
    """``function()`` on the main process alone; its result, or its ``UserError``, on all."""
    heard: list[Any] = [None]
    if state.is_main_process:
        try:
            heard = [function()]
        except UserError as error:
            heard = [error]
    if state.num_processes > 1:
        broadcast_object_list(heard)
    if isinstance(heard[0], UserError):
        raise heard[0]
    return heard[0]
