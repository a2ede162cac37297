"""Launch Triton kernels, and register operators, with little work on the host."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.compat import never_compiled
from .backends import NAMESPACE

LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


class Launch:
    """A Triton kernel with fixed constants.

    ``kernel[grid](…)`` looks up the compiled variant of a kernel in every call, from the dtype and
    alignment of each tensor, from each integer, and from all constants. A ``Launch`` looks it up
    once and calls it directly, as Triton's tutorial on fused softmax does. So all calls of a
    ``Launch`` must have the same device, dtypes and integers, and ``None`` in the same places. A
    call with a tensor that is not aligned to 16 bytes is looked up as usual.

    Args:
        kernel: the kernel; its last parameters are the ``tl.constexpr`` ones.
        constants: values of these, and options such as ``num_warps``.
    """

    def __init__(self, kernel: Any, **constants: Any):
        self.kernel, self.constants = kernel, constants
        self.values = [constants[name] for name in kernel.arg_names if name in constants]
        self.compiled: Any = None

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launch the kernel on the current device and stream."""
        addresses = 0
        for each in arguments:
            if isinstance(each, Tensor):
                addresses |= each.data_ptr()
        if addresses % 16:
            self.kernel[grid](*arguments, **self.constants)
        elif self.compiled is not None:
            self.compiled[grid](*arguments, *self.values)
        else:  # the interpreter returns None
            self.compiled = self.kernel[grid](*arguments, **self.constants)


def operator(function: Callable[..., Any]) -> Any:
    """Register a function of tensors as an operator of torch, named without its suffix ``_op``.

    ``torch.library.custom_op`` does the same, and checks in every call that no output is an input.
    This takes longer than the function itself.
    """
    name = function.__name__.removesuffix("_op")
    LIBRARY.define(
        name + torch.library.infer_schema(function, mutates_args=()),
        tags=torch.Tag.pt2_compliant_tag,
    )
    LIBRARY.impl(name, never_compiled(function), "CompositeExplicitAutograd")
    return getattr(getattr(torch.ops, NAMESPACE), name).default
