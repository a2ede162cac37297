"""Compute linear layers in FP8, the option ``--float8`` of model.py and training.py.

Operands are scaled by their largest value at every use: e4m3 in the forward pass, e5m2 for
gradients of outputs (Micikevicius et al., arXiv 2209.05433). Results are bf16. Only products over
tokens use FP8; embedders and modulation do not. MoH's router logits are rows of the query/key/value
product, so they use FP8, too. The figures were measured with the private ``torch._scaled_mm``.
"""

import contextlib
from unittest.mock import patch

import torch
import torch.nn.functional as F

original = F.linear


def quantise(x, kind):
    """Return ``x`` in FP8, and the float32 factor that scales it back."""
    largest = torch.finfo(kind).max
    scale = largest / x.abs().amax().float().clamp(min=1e-12)
    return (x.float() * scale).clamp(-largest, largest).to(kind), scale.reciprocal()


def column_major(matrix):
    return matrix.t().contiguous().t()


class Product(torch.autograd.Function):
    """Multiply x (M, K) by the transpose of weight (N, K): (M, N)."""

    @staticmethod
    def forward(ctx, x, weight):
        x8, x_scale = quantise(x, torch.float8_e4m3fn)
        weight8, weight_scale = quantise(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, weight8, weight_scale)
        return torch._scaled_mm(
            x8, weight8.t(), x_scale, weight_scale, out_dtype=x.dtype, use_fast_accum=True
        )

    @staticmethod
    def backward(ctx, upstream):
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        up8, up_scale = quantise(upstream, torch.float8_e5m2)
        kind = upstream.dtype
        grad_x = torch._scaled_mm(
            up8, column_major(weight8), up_scale, weight_scale, out_dtype=kind
        )
        grad_weight = torch._scaled_mm(
            up8.t().contiguous(), column_major(x8), up_scale, x_scale, out_dtype=kind
        )
        return grad_x, grad_weight


def linear(x, weight, bias=None):
    """Compute ``F.linear``, in FP8 if it is a product over tokens."""
    if x.dim() != 3 or any(size % 16 for size in (*weight.shape, x.shape[0] * x.shape[1])):
        return original(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(kind), weight.to(kind)
        bias = bias if bias is None else bias.to(kind)
    product = Product.apply(x.flatten(0, 1), weight).unflatten(0, x.shape[:2])
    return product if bias is None else product + bias


def float8_linears(wanted):
    """Return a context in which linear layers are computed, and traced, in FP8 (if wanted)."""
    return patch.object(F, "linear", linear) if wanted else contextlib.nullcontext()
