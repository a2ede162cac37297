"""Compute adaLN (DiT §3.2) by Triton kernels, in one pass over the tokens per direction.

``moh_dit.model.modulation`` defines the function in plain torch. The code of torch.compile reads a
row several times if it does not fit in registers, and once more for each gradient that is a sum
over tokens.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import LAYER_NORM_EPSILON, NAMESPACE
from .block_sizes import cdiv, next_power_of_2, previous_power_of_2
from .launching import LIBRARY, Launch, operator


@triton.jit
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def adaln_forward(
    x, gate, branch, shift, scale, residual, out, statistics, N, modulation_stride, epsilon,
    C: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute residual and out (B, N, C), and mean and 1/σ in statistics (2, B, N). Grid (N, B)."""
    b = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    of_image = b.to(tl.int64) * modulation_stride + columns
    row = b.to(tl.int64) * N + tl.program_id(0)
    values = _load(x + row * C + columns, inside)
    if RESIDUAL:
        values += _load(gate + of_image, inside) * _load(branch + row * C + columns, inside)
        values = values.to(residual.dtype.element_ty)
        tl.store(residual + row * C + columns, values, mask=inside)
        values = values.to(tl.float32)
    mean = tl.sum(values, 0) / C
    centred = tl.where(inside, values - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / C + epsilon)
    normal = centred * inverse * (1.0 + _load(scale + of_image, inside))
    normal += _load(shift + of_image, inside)
    tl.store(out + row * C + columns, normal.to(out.dtype.element_ty), mask=inside)
    tl.store(statistics + row, mean)
    tl.store(statistics + tl.num_programs(1).to(tl.int64) * N + row, inverse)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _read(
    x, branch, grad_residual, grad_out, gate, factor, mean, inverse, offsets, mask,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Load a part of a row: normalized n, dy, stream gradient, branch; and sum dn and dn·n."""
    values = _load(x + offsets, mask)
    dy = _load(grad_out + offsets, mask)
    dx = _load(grad_residual + offsets, mask)
    added = dx
    if RESIDUAL:  # compute r again: the branch must be read anyway
        added = _load(branch + offsets, mask)
        values = (values + gate * added).to(x.dtype.element_ty).to(tl.float32)
    normal = tl.where(mask, (values - mean) * inverse, 0.0)
    dn = dy * factor
    total, total_n = tl.reduce((dn, dn * normal), 0, _add_pairs)
    return normal, dy, dx, added, total, total_n


@triton.jit
def _write(
    grad_x, grad_branch, normal, dy, dx, factor, gate, mean_dn, mean_dn_n, inverse,
    offsets, mask, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Store the gradients of x and branch for a part of a row; return the gradient of x."""
    dx += (dy * factor - mean_dn - normal * mean_dn_n) * inverse
    tl.store(grad_x + offsets, dx.to(grad_x.dtype.element_ty), mask=mask)
    if RESIDUAL:
        tl.store(grad_branch + offsets, (dx * gate).to(grad_branch.dtype.element_ty), mask=mask)
    return dx


@triton.jit
def _modulation(scale, gate, offsets, mask, RESIDUAL: tl.constexpr):
    factor = 1.0 + _load(scale + offsets, mask)
    return factor, _load(gate + offsets, mask) if RESIDUAL else factor


@triton.jit
def _store_sums(
    part, columns, mask, shift_sum, scale_sum, gate_sum, C: tl.constexpr, RESIDUAL: tl.constexpr
):
    tl.store(part + columns, shift_sum, mask=mask)
    tl.store(part + C + columns, scale_sum, mask=mask)
    if RESIDUAL:
        tl.store(part + 2 * C + columns, gate_sum, mask=mask)


@triton.jit
def adaln_backward(
    x, gate, branch, scale, statistics, grad_residual, grad_out, grad_x, grad_branch, sums,
    N, modulation_stride,
    C: tl.constexpr, RESIDUAL: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of adaLN for TOKENS tokens of an image. Grid (⌈N/TOKENS⌉, B).

    Results are grad_x and grad_branch (B, N, C), and sums (B, ⌈N/TOKENS⌉, 3 or 2, C). The latter
    are this program's part of the gradients of shift, scale and, if there is a branch, gate.

    A row is split into C0 columns, a power of two, and the rest in C1. Padded to one power of two,
    a row of 1152 columns would need almost twice the registers.
    """
    b = tl.program_id(1)
    of_image = b.to(tl.int64) * modulation_stride
    columns0 = tl.arange(0, C0)
    every0 = columns0 < C0
    factor0, gate0 = _modulation(scale, gate, of_image + columns0, every0, RESIDUAL)
    shift_sum0 = tl.zeros([C0], tl.float32)
    scale_sum0 = shift_sum0
    gate_sum0 = shift_sum0
    if C1 > 0:
        columns1 = C0 + tl.arange(0, C1)
        every1 = columns1 < C
        factor1, gate1 = _modulation(scale, gate, of_image + columns1, every1, RESIDUAL)
        shift_sum1 = tl.zeros([C1], tl.float32)
        scale_sum1 = shift_sum1
        gate_sum1 = shift_sum1
    for i in tl.range(TOKENS, num_stages=STAGES):
        token = tl.program_id(0) * TOKENS + i
        row = b.to(tl.int64) * N + token
        mean = _load(statistics + row, token < N)
        inverse = _load(statistics + tl.num_programs(1).to(tl.int64) * N + row, token < N)
        offsets0 = row * C + columns0
        mask0 = every0 & (token < N)
        n0, dy0, dx0, added0, total, total_n = _read(
            x, branch, grad_residual, grad_out, gate0, factor0, mean, inverse, offsets0, mask0,
            RESIDUAL,
        )  # fmt: skip
        if C1 > 0:
            offsets1 = row * C + columns1
            mask1 = every1 & (token < N)
            n1, dy1, dx1, added1, more, more_n = _read(
                x, branch, grad_residual, grad_out, gate1, factor1, mean, inverse, offsets1,
                mask1, RESIDUAL,
            )  # fmt: skip
            total += more
            total_n += more_n
        shift_sum0 += dy0
        scale_sum0 += dy0 * n0
        dx0 = _write(
            grad_x, grad_branch, n0, dy0, dx0, factor0, gate0, total / C, total_n / C, inverse,
            offsets0, mask0, RESIDUAL,
        )  # fmt: skip
        if RESIDUAL:
            gate_sum0 += dx0 * added0
        if C1 > 0:
            shift_sum1 += dy1
            scale_sum1 += dy1 * n1
            dx1 = _write(
                grad_x, grad_branch, n1, dy1, dx1, factor1, gate1, total / C, total_n / C, inverse,
                offsets1, mask1, RESIDUAL,
            )  # fmt: skip
            if RESIDUAL:
                gate_sum1 += dx1 * added1
    program = (b * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    part = sums + program * ((3 if RESIDUAL else 2) * C)
    _store_sums(part, columns0, every0, shift_sum0, scale_sum0, gate_sum0, C, RESIDUAL)
    if C1 > 0:
        _store_sums(part, columns1, every1, shift_sum1, scale_sum1, gate_sum1, C, RESIDUAL)


# Columns per warp in the forward pass. Tokens per program, columns per warp and pipeline stages in
# the backward pass. The fastest measured for 1152 columns (H200, torch 2.11, triton 3.6;
# ``benchmarks/adaln.py --tune``).
FORWARD = 512
BACKWARD = (16, 512, 3)


def run_forward(x, gate, branch, shift, scale, columns_each=FORWARD):
    """Run the forward kernel; arguments and results are those of :func:`adaln_op`."""
    batch, tokens, width = x.shape
    gate, shift, scale = _with_equal_strides(gate, shift, scale)
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    residual, out, statistics = _new_results(x, branch, shift)
    modulation_stride = scale.stride(0)
    launch = _forward_launch(
        *_kinds(x, gate, branch, shift, scale), tokens, modulation_stride, width, columns_each
    )
    launch(
        (tokens, batch, 1), x, gate, branch, shift, scale, residual, out, statistics, tokens,
        modulation_stride, LAYER_NORM_EPSILON,
    )  # fmt: skip
    return residual, out, statistics


@lru_cache(maxsize=256)
def _forward_launch(device, dtypes, tokens, modulation_stride, width, columns_each):
    return Launch(
        adaln_forward, C=width, RESIDUAL=dtypes[1] is not None, BLOCK=next_power_of_2(width),
        num_warps=_warps(width, columns_each),
    )  # fmt: skip


def run_backward(grad_residual, grad_out, x, statistics, gate, branch, scale, config=BACKWARD):
    """Run the backward kernel; arguments and results are those of :func:`adaln_backward_op`."""
    batch, tokens, width = x.shape
    gate, scale = _with_equal_strides(gate, scale)
    x, grad_residual, grad_out = (t.contiguous() for t in (x, grad_residual, grad_out))
    branch = None if branch is None else branch.contiguous()
    grad_x, grad_branch, grad_modulation = _new_gradients(x, branch, scale)
    tiles = cdiv(tokens, config[0])
    # Partial sums are added afterwards, in a fixed order, so every run gives the same bits.
    sums = x.new_empty(batch, tiles, grad_modulation.shape[1], width, dtype=torch.float32)
    modulation_stride = scale.stride(0)
    launch = _backward_launch(
        *_kinds(x, gate, branch, scale, grad_residual, grad_out), tokens, modulation_stride, width,
        config,
    )  # fmt: skip
    launch(
        (tiles, batch, 1), x, gate, branch, scale, statistics, grad_residual, grad_out, grad_x,
        grad_branch, sums, tokens, modulation_stride,
    )  # fmt: skip
    return grad_x, grad_branch, grad_modulation.copy_(sums.sum(1))


@lru_cache(maxsize=256)
def _backward_launch(device, dtypes, tokens, modulation_stride, width, config):
    tokens_each, columns_each, stages = config
    main = previous_power_of_2(width)
    rest = next_power_of_2(width - main) if width > main else 0
    return Launch(
        adaln_backward, C=width, RESIDUAL=dtypes[1] is not None, C0=main, C1=rest,
        TOKENS=tokens_each, STAGES=stages, num_warps=_warps(width, columns_each),
    )  # fmt: skip


def _kinds(x: Tensor, *others: Tensor | None) -> tuple[int, tuple[torch.dtype | None, ...]]:
    """Return the device and the dtypes of tensors; ``None`` has no dtype."""
    return x.get_device(), (x.dtype, *(None if each is None else each.dtype for each in others))


def _warps(width: int, columns_each: int) -> int:
    return min(16, max(1, previous_power_of_2(width) // columns_each))


def _with_equal_strides(*modulation: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the modulation as dense rows (B, 1, C) with equal strides between images.

    Chunks of one modulation tensor are returned as they are; others are copied.
    """
    strides = {(part.stride(0), part.stride(-1)) for part in modulation if part is not None}
    if len(strides) == 1 and next(iter(strides))[1] == 1:
        return modulation
    return tuple(None if part is None else part.contiguous() for part in modulation)


def _new_results(x: Tensor, branch: Tensor | None, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(0 if branch is None else x.shape),
        x.new_empty(x.shape, dtype=shift.dtype),
        x.new_empty(2, *x.shape[:2], dtype=torch.float32),
    )


def _new_gradients(
    x: Tensor, branch: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if branch is None else branch.new_empty(branch.shape),
        scale.new_empty(x.shape[0], 2 if branch is None else 3, x.shape[2]),
    )


@operator
def adaln_op(
    x: Tensor, gate: Tensor | None, branch: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute adaLN.

    Returns ``r = x + gate·branch`` in the dtype of x, ``LN(r)·(1 + scale) + shift`` in the dtype of
    shift, and mean and 1/σ of the rows (2, B, N) in float32 for the backward pass. Without
    ``branch``, r is x and the first result is empty.
    """
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return run_forward(x, gate, branch, shift, scale)


@torch.library.register_fake(f"{NAMESPACE}::adaln", lib=LIBRARY)
def _(x, gate, branch, shift, scale):
    return _new_results(x, branch, shift)


@operator
def adaln_backward_op(
    grad_residual: Tensor,
    grad_out: Tensor,
    x: Tensor,
    statistics: Tensor,
    gate: Tensor | None,
    branch: Tensor | None,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, of branch, and of shift, scale and gate together (B, 3, C).

    Without ``branch``, the second result is empty and the third is (B, 2, C).
    """
    with torch.cuda.device_of(x):
        return run_backward(grad_residual, grad_out, x, statistics, gate, branch, scale)


@torch.library.register_fake(f"{NAMESPACE}::adaln_backward", lib=LIBRARY)
def _(grad_residual, grad_out, x, statistics, gate, branch, scale):
    return _new_gradients(x, branch, scale)


class AdaLN(torch.autograd.Function):
    """Connect both operators for autograd.

    Without a branch, x is also returned, so that its two gradients are added inside the backward
    kernel instead of in a pass of their own. ``torch.library.register_autograd`` does not allow
    this, because an operator must not return one of its inputs.
    """

    @staticmethod
    def forward(ctx, x, gate, branch, shift, scale):
        residual, out, statistics = adaln_op(x, gate, branch, shift, scale)
        ctx.save_for_backward(x, statistics, gate, branch, scale)
        return x.view_as(x) if branch is None else residual, out

    @staticmethod
    def backward(ctx, grad_residual, grad_out):
        x, statistics, gate, branch, scale = ctx.saved_tensors
        grad_x, grad_branch, sums = adaln_backward_op(
            grad_residual, grad_out, x, statistics, gate, branch, scale
        )
        of_shift, of_scale, *of_gate = sums.split(1, 1)  # (B, 1, C) each
        if branch is None:
            return grad_x, None, None, of_shift, of_scale
        return grad_x, of_gate[0], grad_branch, of_shift, of_scale
