"""A launch uses the compiled variant that Triton itself would choose."""

import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from moh_dit.kernels.launching import Launch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from launches import CompiledKernel, no_gpu, plain

from moh_dit.kernels import attention_operators, triton_adaln

PLAN = dict(heads=6, shared=3, active=2, head_dim=72)


def attention(batch, tokens, dtype, offset=0):
    columns = 3 * 6 * 72 + 6 + 2
    columns += -columns % 64
    values = torch.zeros(batch * tokens * columns + offset, dtype=dtype)
    projected = values[offset:].view(batch, tokens, columns)
    out, stats, *saved = attention_operators.attention_op(projected, *PLAN.values())
    attention_operators.attention_backward_op(out, stats, projected, out, *saved, 3, 72)


def adaln(batch, tokens, dtype, offset=0, width=144, branch=True, separate=False):
    x = torch.zeros(batch * tokens * width + offset, dtype=dtype)[offset:].view(batch, tokens, -1)
    parts = torch.zeros(batch, 1, 3 * width, dtype=torch.bfloat16).chunk(3, dim=-1)
    shift, scale, gate = (part.clone() for part in parts) if separate else parts
    more = (gate, x) if branch else (None, None)
    _, out, statistics = triton_adaln.adaln_op(x, *more, shift, scale)
    triton_adaln.adaln_backward_op(x, out, x, statistics, *more, scale)


@pytest.fixture
def launches():
    """Collect launches as (variant, grid, arguments) without a GPU."""
    with no_gpu(), patch.object(CompiledKernel, "launches", []):
        yield CompiledKernel.launches


def describe(launches):
    """Return launches with tensors replaced by dtype and shape; empty the list."""
    described = [
        (key, grid, [(a.dtype, a.shape) if isinstance(a, torch.Tensor) else repr(a) for a in given
                     if not hasattr(a, "block_shape")])
        for key, grid, given in launches
    ]  # fmt: skip
    launches.clear()
    return described


@pytest.mark.parametrize("run", [attention, adaln])
def test_launches_are_those_of_triton(launches, run):
    sizes = [(2, 64), (1, 64), (3, 256), (2, 1), (1, 16), (2, 30), (2, 2048)]
    cases = [(*size, dtype) for size in sizes for dtype in (torch.bfloat16, torch.float32)]
    cases += [(2, 64, torch.float16, 1), (2, 64, torch.float16, 8)]
    if run is adaln:
        cases += [(2, 64, torch.bfloat16, 0, *more) for more in ((1, True), (144, False),
                  (136, True, True), (20, True))]  # fmt: skip
    for _ in range(2):  # the second time, every launch knows its variant
        for case in [*cases, *reversed(cases)]:
            run(*case)
            ours = describe(launches)
            with patch.object(Launch, "__call__", plain):
                run(*case)
            assert ours == describe(launches)
            assert len(ours) == (6 if run is attention else 2)


def test_variants_are_looked_up_once(launches):
    for _ in range(3):
        attention(2, 64, torch.bfloat16)
    lookups = []
    with patch("triton.runtime.jit.JITFunction.run", lambda *a, **k: lookups.append(1)):
        attention(2, 64, torch.bfloat16)
        assert not lookups
        attention(2, 64, torch.bfloat16, 1)  # not aligned
        assert len(lookups) == 6
