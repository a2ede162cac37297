"""A linear layer and the GELU (tanh) of its result as one product: the epilogue of cuBLASLt.

In evaluation without gradients alone: the backward pass needs what the layer gave before its GELU,
and a pass that is only repeated with gradients should round as that one does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends import NAMESPACE, capability
from .table import GPU_DTYPES, GPU_LINEAR_GELU


@torch.library.custom_op(f"{NAMESPACE}::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``gelu(x Wᵀ + b)`` of x (…, C) and weight (M, C): (…, M) in the dtype of x.

    An operator because torch.compile would take the product and its epilogue apart.
    """
    rows = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return rows.unflatten(0, x.shape[:-1])


@linear_gelu.register_kernel("cpu")
def _(x, weight, bias):  # where torch's own would take the GELU without tanh
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@linear_gelu.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def takes_linear_gelu(x: Tensor, linear: nn.Module) -> bool:
    """Whether it was measured to pay for these, and ``linear`` is no more than its weights.

    Adapters, quantisers, sharding and offloading put something else in the layer's or its weight's
    place, or wait for a call of the layer: accelerate and diffusers by hooks that replace
    ``forward``, which torch.compile sees by their names alone.
    """
    return (
        not (linear.training or torch.is_grad_enabled())
        and capability(x) in GPU_LINEAR_GELU
        and x.dtype in GPU_DTYPES
        and type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and linear.bias is not None
        and (x.dtype, x.device) == (linear.weight.dtype, linear.weight.device)
        and "forward" not in linear.__dict__
        and not (hasattr(linear, "_hf_hook") or hasattr(linear, "_diffusers_hook"))
        and not (linear._forward_hooks or linear._forward_pre_hooks)
    )
