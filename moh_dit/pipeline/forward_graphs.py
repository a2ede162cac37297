"""Replay forward passes as CUDA graphs, so that the host launches each in one call."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from threading import Lock
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..common.compat import forward_state
from ..common.errors import UserError

Mode: TypeAlias = bool | Literal["auto"]
Function: TypeAlias = Callable[..., Tensor]
# Each batch size needs graphs of its own, and guided steps have twice the batch size.
MAX_SHAPES = 4

logger = logging.getLogger(__name__)


def capture_forward(function: Callable[[], Any], pool: Any) -> Callable[[], Any]:
    """Capture ``function`` into a CUDA graph with memory from ``pool``; return its replay."""
    graph, stream = torch.cuda.CUDAGraph(), capture_stream(torch.cuda.current_device())
    # "relaxed": other threads may call CUDA, and kernels may be loaded at their first use.
    with torch.cuda.graph(graph, pool, stream, capture_error_mode="relaxed"):
        function()
    return graph.replay


@lru_cache
def capture_stream(device: int) -> torch.cuda.Stream:
    """Return the stream for captures on a GPU; cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream(device)


@dataclass
class SharedBuffers:
    """Inputs and output of all graphs with the same shapes, and these graphs.

    Attributes:
        inputs, output: tensors that the graphs read and write; the output is empty at first.
        graphs: the state of each module, and its replay once it is captured.
    """

    inputs: list[Tensor]
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    graphs: WeakKeyDictionary[nn.Module, tuple[list[int], Callable[[], Any] | None]] = field(
        default_factory=WeakKeyDictionary
    )


class ForwardGraphs:
    """Call modules by CUDA graphs where possible: in evaluation mode, no gradients, no autocast.

    The first call with inputs of some shapes runs the module as usual, which also compiles its
    kernels. The second call captures the same work. This and later calls replay it. The results are
    equal to the last bit, because a graph launches the same kernels on the same values.

    A module is captured again after one of its weights, modules or attributes was replaced. Changes
    of weights in place need no new graph. A module that may run other Python code, such as a hook
    or an adapter, is called without a graph.

    Args:
        mode: ``"auto"`` uses graphs where possible, True requires them, False never uses them.
        capture: captures a function with memory from a pool; tests without a GPU replace it.
    """

    def __init__(
        self,
        mode: Mode = "auto",
        capture: Callable[[Callable[[], Any], Any], Callable[[], Any]] = capture_forward,
    ):
        self.mode, self.capture = mode, capture
        self._lock = Lock()
        self._failed = False
        self._forget()

    def __reduce__(self) -> tuple:
        return ForwardGraphs, (self.mode, self.capture)  # a copy starts without graphs

    def obstacle(self, module: nn.Module) -> str | None:
        """Return why ``module`` is called without a graph; ``None`` if a graph is used.

        Raises:
            UserError: the mode is True, but the module cannot be captured.
        """
        return self._examine(module, next(module.parameters()).device, True)[1]

    def __call__(
        self, module: nn.Module, *inputs: Tensor, function: Function | None = None
    ) -> Tensor:
        """Return ``function(*inputs)``, or the first output of ``module``.

        Args:
            module: contains all weights that the function uses.
            inputs: tensors on one device.
            function: a method of ``module``; ``None`` to call ``module`` itself, with its hooks.

        Raises:
            UserError: the mode is True, but the module cannot be captured.
        """
        call = partial(first_output, module) if function is None else function
        # Under autocast, a capture would leave rounded weights in torch's cache of them.
        if torch.is_grad_enabled() or module.training or torch.is_autocast_enabled("cuda"):
            return call(*inputs)
        state, obstacle = self._examine(module, inputs[0].device, function is None)
        if obstacle is not None:
            return call(*inputs)
        if function is not None:
            state.append(id(getattr(function, "__func__", function)))
        with self._lock:  # graphs share their buffers
            return self._call_captured(module, call, inputs, state)

    def release(self) -> None:
        """Free the memory of all graphs. Later calls capture them again."""
        with self._lock:
            captured = self._pool is not None
            self._forget()
        if captured:
            torch.cuda.empty_cache()

    def _forget(self) -> None:
        self._shared: dict[tuple, SharedBuffers] = {}  # by shapes and settings
        self._pool: Any = None
        self._stream: Any = None

    def _examine(
        self, module: nn.Module, device: torch.device, calls_module: bool
    ) -> tuple[list[int], str | None]:
        """Return the state of the module, and why it is called without a graph."""
        if self.mode is False:
            return [], "cuda_graphs is false"
        if self._failed:
            return [], "the capture failed"
        state: list[int] = []
        if (obstacle := device_obstacle(device)) is None:
            state, obstacle = forward_state(module, calls_module)
        if obstacle is not None and self.mode is True:
            raise UserError(f"cuda_graphs is true, but {obstacle}; set it to auto or false")
        return state, obstacle

    def _call_captured(
        self, module: nn.Module, function: Function, inputs: tuple[Tensor, ...], state: list[int]
    ) -> Tensor:
        key = (*((each.shape, each.dtype) for each in inputs), global_settings())
        shared = self._shared.get(key)
        if shared is None:
            while len(self._shared) >= MAX_SHAPES:
                del self._shared[next(iter(self._shared))]  # the oldest
            shared = self._shared[key] = SharedBuffers([each.clone() for each in inputs])
        self._follow_current_stream(inputs[0].device)
        for buffer, given in zip(shared.inputs, inputs, strict=True):
            buffer.copy_(given)
        known, replay = shared.graphs.get(module, (None, None))
        if known != state:
            output = function(*shared.inputs)
            if shared.output.shape != output.shape:
                shared.output = torch.empty_like(output)
                shared.graphs.clear()
            shared.graphs[module] = state, None
            return output
        if replay is None:
            try:
                replay = self._captured(shared, function)
            except Exception as error:  # of CUDA, or of any code inside the model
                # Ending a capture that failed raises a second, less specific error.
                cause = " ".join(str(error.__context__ or error).split())[:300]
                if self.mode is True:
                    raise UserError(
                        f"cuda_graphs is true, but the capture failed ({cause}); set it to false"
                    ) from error
                logger.warning("CUDA graphs are off, because the capture failed: %s", cause)
                self._forget()
                self._failed = True
                return function(*inputs)
            shared.graphs[module] = state, replay
        replay()
        return shared.output.clone()

    def _captured(self, shared: SharedBuffers, function: Function) -> Callable[[], Any]:
        if self._pool is None and shared.output.is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device_of(shared.output):
            return self.capture(lambda: shared.output.copy_(function(*shared.inputs)), self._pool)

    def _follow_current_stream(self, device: torch.device) -> None:
        """Let the current stream wait for the stream of the call before, which used the buffers."""
        if device.type == "cuda":
            stream, before = torch.cuda.current_stream(device), self._stream
            if before is not None and before != stream:
                stream.wait_stream(before)
            self._stream = stream


def first_output(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Call ``module`` and return its output, the first one if there are several."""
    output = module(*inputs)
    return output if isinstance(output, Tensor) else output[0]


def device_obstacle(device: torch.device) -> str | None:
    """Return why this device has no CUDA graphs; ``None`` if it has."""
    if device.type == "cuda" and torch.version.hip is None:
        return None
    return f"the device is {device.type}, not an NVIDIA GPU"


def global_settings() -> tuple:
    """Return the settings of torch that a graph and its buffers depend on."""
    return (
        torch.is_inference_mode_enabled(),  # its tensors cannot be changed outside of it
        torch.backends.cuda.matmul.fp32_precision == "tf32",
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
