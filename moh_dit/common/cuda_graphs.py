"""Capture device work into CUDA graphs, which the host launches in one call."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

Output = TypeVar("Output")


def capture_graph(function: Callable[[], Output]) -> Callable[[], Output]:
    """Capture ``function`` into a CUDA graph.

    The capture runs the Python code of ``function`` once, but none of its device work. Call the
    function a few times before, so that everything is compiled, on the stream that is current now.
    This stream must not be the default stream.

    Args:
        function: reads and writes tensors that stay at the same address, and never waits for the
            device.

    Returns:
        A function that replays the device work and returns the same tensors each time. Deleting
        it, and these tensors, releases the memory of the graph.
    """
    gc.collect()  # tensors in reference cycles would keep memory that the graph needs
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    # "relaxed": other threads, such as the one that pins memory, may call CUDA meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
        output = function()

    def replay() -> Output:
        graph.replay()
        return output

    return replay


def leave_default_stream() -> None:
    """Make a new stream the current stream of this thread, because the default cannot capture."""
    if torch.cuda.is_available():
        torch.cuda.set_stream(torch.cuda.Stream())
