"""Fast implementations of ``moh_dit.attention`` and ``moh_dit.modulation``, held to those."""

from importlib.util import find_spec

import torch
from torch import Tensor

from ..errors import UserError
from .gathered import attend_gathered
from .table import auto_backend, auto_modulation_backend

BACKENDS = ("auto", "reference", "gathered", "triton")
MODULATION_BACKENDS = ("auto", "reference", "triton")
# Of torch operators: torch has one of a name, and code beside weights may be of another version.
NAMESPACE = __name__.partition(".")[0]

__all__ = [
    "BACKENDS",
    "MODULATION_BACKENDS",
    "NAMESPACE",
    "adaln_triton",
    "attend_gathered",
    "choose_backend",
    "choose_modulation_backend",
    "moh_attention_triton",
]


def choose_backend(
    backend: str, projected: Tensor, heads: int, shared: int, active: int, head_dim: int
) -> str:
    """The backend that will run: the one asked for, checked, or for "auto" the table's choice."""
    _check("attention_backend", backend, BACKENDS, projected)
    if backend != "auto":
        return backend
    return auto_backend(
        _capability(projected), projected.dtype, projected.shape[1], heads, shared, active, head_dim
    )


def choose_modulation_backend(backend: str, x: Tensor, modulation: Tensor) -> str:
    """As :func:`choose_backend`, for ``moh_dit.modulation``."""
    _check("modulation_backend", backend, MODULATION_BACKENDS, x)
    if backend != "auto":
        return backend
    return auto_modulation_backend(_capability(x), modulation.dtype)


def _check(setting: str, backend: str, backends: tuple[str, ...], x: Tensor) -> None:
    if backend not in backends:
        raise UserError(f"{setting} is {backend!r}; choose one of {', '.join(backends)}")
    if backend != "triton":
        return
    if not _installed():
        raise UserError(f'{setting} "triton" needs Triton: pip install triton, or "auto"')
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(
            f'{setting} "triton" has no kernels for {x.dtype}; use float32, float16 or bfloat16, '
            'or the backend "auto"'
        )
    if not (x.is_cuda or _interpreted()):
        raise UserError(f'{setting} "triton" needs a GPU, the input is on {x.device}; use "auto"')


def _capability(x: Tensor) -> tuple[int, int] | None:
    return _capability_of(x.device.index) if x.is_cuda else None


@torch.compiler.assume_constant_result
def _capability_of(device: int) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if _installed() else None


@torch.compiler.assume_constant_result
def _installed() -> bool:
    return find_spec("triton") is not None


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


def adaln_triton(
    x: Tensor, gate: Tensor | None, branch: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The Triton backend of :func:`moh_dit.modulation.adaln`."""
    from .triton_adaln import AdaLN

    return AdaLN.apply(x, gate, branch, shift, scale)
