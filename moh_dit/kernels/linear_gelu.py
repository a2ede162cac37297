"""Fuse a linear layer and the tanh GELU of its output into one matrix product.

cuBLASLt applies the GELU in the epilogue of the product. This is used only in evaluation mode
without gradients: the backward pass needs the values before the GELU, which are not stored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.compat import addmm_gelu, is_plain_linear
from .backends import GPU_DTYPES, GPU_LINEAR_GELU, NAMESPACE, compute_capability
from .launching import LIBRARY, operator


@operator
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``gelu(x Wᵀ + b)`` (…, M) in the dtype of x, for x (…, C) and weight (M, C).

    A custom operator, because torch.compile would separate the GELU from the product again.
    """
    return addmm_gelu(bias, x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])


@torch.library.impl(LIBRARY, "linear_gelu", "CPU")
def _(x, weight, bias):  # on a CPU, torch's fused GELU is the exact one, not the tanh form
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@torch.library.register_fake(f"{NAMESPACE}::linear_gelu", lib=LIBRARY)
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def can_fuse_gelu(x: Tensor, linear: nn.Module) -> bool:
    """Return whether :func:`linear_gelu` may replace ``gelu(linear(x))`` and is faster.

    Speed was measured for some GPUs and dtypes. Wrapped or hooked layers must be called as usual,
    see :func:`moh_dit.common.compat.is_plain_linear`.
    """
    return (
        not (linear.training or torch.is_grad_enabled())
        and compute_capability(x) in GPU_LINEAR_GELU
        and x.dtype in GPU_DTYPES
        and is_plain_linear(linear)
        and (x.dtype, x.device) == (linear.weight.dtype, linear.weight.device)
    )
