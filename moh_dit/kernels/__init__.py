"""Fast implementations of mixture-of-head attention, held to ``moh_dit.attention``."""

from importlib.util import find_spec

import torch
from torch import Tensor

from ..errors import UserError
from .gathered import attend_gathered
from .table import auto_backend

BACKENDS = ("auto", "reference", "gathered", "triton")

__all__ = ["BACKENDS", "attend_gathered", "choose_backend", "moh_attention_triton"]


def choose_backend(
    backend: str, projected: Tensor, heads: int, shared: int, active: int, head_dim: int
) -> str:
    """The backend that will run: the one asked for, checked, or for "auto" the table's choice."""
    if backend not in BACKENDS:
        raise UserError(f"attention_backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "triton":
        if find_spec("triton") is None:
            raise UserError(
                'attention_backend "triton" needs Triton: pip install triton, or "auto"'
            )
        if projected.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise UserError(
                f'attention_backend "triton" has no kernels for {projected.dtype}; use float32, '
                'float16 or bfloat16, or the backend "auto"'
            )
        if not (projected.is_cuda or _interpreted()):
            raise UserError(
                f'attention_backend "triton" needs a GPU, the input is on {projected.device}; '
                'use "auto"'
            )
    if backend != "auto":
        return backend
    capability = _capability(projected.device.index) if projected.is_cuda else None
    return auto_backend(
        capability, projected.dtype, projected.shape[1], heads, shared, active, head_dim
    )


@torch.compiler.assume_constant_result
def _capability(device: int) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if find_spec("triton") else None


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def moh_attention_triton(
    projected: Tensor, heads: int, shared: int, active: int, head_dim: int
) -> tuple[Tensor, Tensor | None]:
    """The Triton backend of :func:`moh_dit.attention.moh_attention`."""
    from .ops import moh_attention_triton as run  # Triton is imported where it runs

    return run(projected, heads, shared, active, head_dim)
