"""Run a function on rank 0 and broadcast the result or the exception."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from .errors import UserError

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
