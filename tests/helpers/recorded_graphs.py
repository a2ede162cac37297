"""Stand in for CUDA graphs on a CPU: a replay calls the captured function again."""

from collections.abc import Callable
from typing import Any


class RecordedGraphs:
    """Captures functions as ``capture_graph`` does, and counts captures and replays.

    As in a graph, the function sees only the tensors that it was captured with.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def capture(self, function: Callable[[], Any]) -> Callable[[], Any]:
        self.captures += 1

        def replay() -> Any:
            self.replays += 1
            return function()

        return replay


class FailingGraphs:
    """Fails like a capture that runs out of memory in the middle of a step."""

    def capture(self, function: Callable[[], Any]) -> Callable[[], Any]:
        function()
        raise RuntimeError("CUDA out of memory.\nmore lines")
