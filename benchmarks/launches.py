"""Time the host's work for a call of each operator. It needs Triton, but no GPU.

    python benchmarks/launches.py

Triton's compiler and driver are replaced by functions that return at once, so the time is that of
Python and torch alone. Prints microseconds of one thread, for XL/2 at 256 px, and how much of that
is spent if every launch looks its compiled kernel up, as ``kernel[grid](…)`` does.
"""

import contextlib
import time
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moh_dit.kernels import attention_operators, triton_adaln
from moh_dit.kernels.launching import Launch

BATCH, TOKENS, WIDTH, HEADS, SHARED, ACTIVE, HEAD_DIM = 2, 256, 1152, 24, 14, 2, 72


class NoDriver:
    """Stands for a GPU of compute capability 9.0 that does nothing."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


class CompiledKernel:
    """Stands for a compiled kernel; ``key`` names its variant."""

    function = packed_metadata = None
    launches: list | None = None  # if it is a list, launches are appended

    def __init__(self, key):
        self.key = key

    def launch_metadata(self, *arguments):
        return None

    def run(self, x, y, z, stream, function, packed, metadata, enter, exit, *arguments):
        if self.launches is not None:
            self.launches.append((self.key, (x, y, z), arguments))

    def __getitem__(self, grid):
        return lambda *arguments: self.run(*grid, *[None] * 6, *arguments)


@contextlib.contextmanager
def no_gpu():
    """Replace Triton's driver and compiler inside the block."""

    def compile(kernel, key, *details):
        cache = kernel.device_caches[0][0]
        return cache.setdefault(key, CompiledKernel((kernel.__name__, key)))

    modules = vars(attention_operators), vars(triton_adaln)
    plans = [each for names in modules for each in names.values() if hasattr(each, "cache_clear")]
    with contextlib.ExitStack() as restore:
        for plan in plans:  # they hold compiled kernels
            plan.cache_clear()
            restore.callback(plan.cache_clear)
        restore.enter_context(patch.object(driver, "_active", NoDriver()))
        restore.enter_context(patch.object(JITFunction, "_do_compile", compile))
        yield


def plain(launch, grid, *arguments):
    """Launch as ``kernel[grid](…)`` does."""
    launch.kernel[grid](*arguments, **launch.constants)


def microseconds(call, calls=50, turns=200):
    """Return the time of this thread for one call, the fastest tenth of several turns."""
    times = []
    for _ in range(turns):
        began = time.thread_time()
        for _ in range(calls):
            call()
        times.append((time.thread_time() - began) / calls * 1e6)
    return sorted(times)[turns // 10]


def operators():
    """Return a call of each operator of an inference pass."""
    columns = 3 * HEADS * HEAD_DIM + HEADS + 2
    projected = torch.randn(BATCH, TOKENS, columns + -columns % 64).bfloat16()
    x, branch = torch.randn(2, BATCH, TOKENS, WIDTH).bfloat16()
    shift, scale, gate = torch.randn(BATCH, 1, 3 * WIDTH).bfloat16().chunk(3, dim=-1)
    plan = HEADS, SHARED, ACTIVE, HEAD_DIM
    return {
        "attention": lambda: attention_operators.attention_op(projected, *plan),
        "adaLN": lambda: triton_adaln.AdaLN.apply(x, gate, branch, shift, scale),
    }


def main():
    with no_gpu(), torch.no_grad():
        for name, call in operators().items():
            call()
            fast = microseconds(call)
            with patch.object(Launch, "__call__", plain):
                slow = microseconds(call)
            print(f"{name}: {fast:.1f} µs; with kernel[grid](…) {slow:.1f} µs")


if __name__ == "__main__":
    main()
