"""Triton kernels: adaLN (DiT §3.2), each direction in one pass over the tokens.

``moh_dit.model.modulation`` defines the function in plain torch. torch.compile reads a row several
times if it does not fit in registers, and once more for each gradient that is a sum over tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backends import LAYER_NORM_EPSILON, NAMESPACE
from .sizes import cdiv, power_of_2, power_of_2_up_to


@triton.jit
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def adaln_forward(
    x, gate, branch, shift, scale, residual, out, statistics, N, modulation_stride, epsilon,
    C: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """residual, out (B, N, C); statistics (2, B, N): mean and 1/σ. Grid (N, B)."""
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
    """A part of a row: n, dy, the stream's gradient and the branch; sums of dn and dn·n over it."""
    values = _load(x + offsets, mask)
    dy = _load(grad_out + offsets, mask)
    dx = _load(grad_residual + offsets, mask)
    added = dx
    if RESIDUAL:  # r again, as the forward pass had it: the branch is read anyway
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
    """Gradients of x, which is returned, and branch of a part of a row."""
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
    """grad_x, grad_branch (B, N, C); sums (B, ⌈N/TOKENS⌉, 3 or 2, C): this program's part of the
    gradients of shift, scale and, where there is a branch, gate. Grid (⌈N/TOKENS⌉, B).

    A row is C0 columns, a power of two, and the rest in C1: padded as a whole it would be kept in
    nearly twice the registers at a width of 1152.
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


# Columns of a warp; tokens of a program and stages of its loop in the backward pass. The fastest
# found at 1152 columns (H200, torch 2.11, triton 3.6; ``benchmarks/adaln.py --tune``).
FORWARD = 512
BACKWARD = (16, 512, 3)


def run_forward(x, gate, branch, shift, scale, columns_each=FORWARD):
    """As :func:`adaln_op`."""
    batch, tokens, width = x.shape
    gate, shift, scale = _strided_alike(gate, shift, scale)
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    residual, out, statistics = _results(x, branch, shift)
    adaln_forward[(tokens, batch)](
        x, gate, branch, shift, scale, residual, out, statistics, tokens, scale.stride(0),
        LAYER_NORM_EPSILON, C=width, RESIDUAL=branch is not None, BLOCK=power_of_2(width),
        num_warps=_warps(width, columns_each),
    )  # fmt: skip
    return residual, out, statistics


def run_backward(grad_residual, grad_out, x, statistics, gate, branch, scale, config=BACKWARD):
    """As :func:`adaln_backward_op`."""
    batch, tokens, width = x.shape
    tokens_each, columns_each, stages = config
    gate, scale = _strided_alike(gate, scale)
    x, grad_residual, grad_out = (t.contiguous() for t in (x, grad_residual, grad_out))
    branch = None if branch is None else branch.contiguous()
    grad_x, grad_branch, grad_modulation = _gradients(x, branch, scale)
    tiles = cdiv(tokens, tokens_each)
    # Added up afterwards, in a fixed order: the same bits in every run.
    sums = x.new_empty(batch, tiles, grad_modulation.shape[1], width, dtype=torch.float32)
    main = power_of_2_up_to(width)
    rest = power_of_2(width - main) if width > main else 0
    adaln_backward[(tiles, batch)](
        x, gate, branch, scale, statistics, grad_residual, grad_out, grad_x, grad_branch, sums,
        tokens, scale.stride(0), C=width, RESIDUAL=branch is not None, C0=main, C1=rest,
        TOKENS=tokens_each, STAGES=stages, num_warps=_warps(width, columns_each),
    )  # fmt: skip
    return grad_x, grad_branch, grad_modulation.copy_(sums.sum(1))


def _warps(width: int, columns_each: int) -> int:
    return min(16, max(1, power_of_2_up_to(width) // columns_each))


def _strided_alike(*modulation: Tensor | None) -> tuple[Tensor | None, ...]:
    """Rows (B, 1, C), dense, at one distance from image to image: parts of one product are."""
    strides = {(part.stride(0), part.stride(-1)) for part in modulation if part is not None}
    if len(strides) == 1 and next(iter(strides))[1] == 1:
        return modulation
    return tuple(None if part is None else part.contiguous() for part in modulation)


def _results(x: Tensor, branch: Tensor | None, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(0 if branch is None else x.shape),
        x.new_empty(x.shape, dtype=shift.dtype),
        x.new_empty(2, *x.shape[:2], dtype=torch.float32),
    )


def _gradients(x: Tensor, branch: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if branch is None else branch.new_empty(branch.shape),
        scale.new_empty(x.shape[0], 2 if branch is None else 3, x.shape[2]),
    )


@torch.library.custom_op(f"{NAMESPACE}::adaln", mutates_args=())
def adaln_op(
    x: Tensor, gate: Tensor | None, branch: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``r = x + gate·branch`` in the dtype of x; ``LN(r)·(1 + scale) + shift`` in that of shift.

    Without ``branch`` r is x, and the first result empty. Third: mean and 1/σ of the rows
    (2, B, N) float32, for the backward pass.
    """
    with torch.cuda.device_of(x):  # Triton launches on the current one
        return run_forward(x, gate, branch, shift, scale)


@adaln_op.register_fake
def _(x, gate, branch, shift, scale):
    return _results(x, branch, shift)


@torch.library.custom_op(f"{NAMESPACE}::adaln_backward", mutates_args=())
def adaln_backward_op(
    grad_residual: Tensor,
    grad_out: Tensor,
    x: Tensor,
    statistics: Tensor,
    gate: Tensor | None,
    branch: Tensor | None,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and branch, and of shift, scale and gate together: (B, 3, C).

    Without ``branch`` the second is empty, and the third (B, 2, C).
    """
    with torch.cuda.device_of(x):
        return run_backward(grad_residual, grad_out, x, statistics, gate, branch, scale)


@adaln_backward_op.register_fake
def _(grad_residual, grad_out, x, statistics, gate, branch, scale):
    return _gradients(x, branch, scale)


class AdaLN(torch.autograd.Function):
    """Both operators. Not joined by torch.library's own rule: x goes on as a result, so that its
    two gradients meet in the kernel instead of in another pass, and operators may not return what
    they were given."""

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
