"""Names of the backends, and which one runs for an input."""

from importlib.util import find_spec

import torch
from torch import Tensor

from ..common.errors import UserError
from .table import auto_backend, auto_cpu_backend, auto_modulation_backend

BACKENDS = ("auto", "reference", "gathered", "triton")
MODULATION_BACKENDS = ("auto", "reference", "triton")
MLP_BACKENDS = ("auto", "reference")
LAYER_NORM_EPSILON = 1e-6  # of adaLN (DiT's code)
# Operator names are process-global, so bundled copies of this package need their own prefix.
NAMESPACE = __name__.partition(".")[0]


def choose_backend(
    backend: str, projected: Tensor, heads: int, shared: int, active: int, head_dim: int
) -> str:
    """The backend that will run: the one asked for, checked, or for "auto" the table's choice."""
    _check("attention_backend", backend, BACKENDS, projected)
    if backend != "auto":
        return backend
    if projected.device.type == "cpu" and projected.numel() > 0:
        return auto_cpu_backend(projected.shape[1], heads, shared, active)
    return auto_backend(capability(projected), projected.dtype, head_dim)


def choose_modulation_backend(
    backend: str,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor | None,
    branch: Tensor | None,
) -> str:
    """As :func:`choose_backend`, for :func:`moh_dit.model.modulation.adaln`."""
    _check("modulation_backend", backend, MODULATION_BACKENDS, x)
    if backend == "auto":
        backend = auto_modulation_backend(capability(x), scale.dtype)
        return backend if _fits(x, shift, scale, gate, branch) else "reference"
    if backend == "triton" and not _fits(x, shift, scale, gate, branch):
        raise UserError(
            'modulation_backend "triton" takes shift, scale and gate of (B, 1, C) for a stream and '
            f'branch of (B, N, C), here {tuple(x.shape)}; use "auto"'
        )
    return backend


def _fits(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor | None, branch: Tensor | None
) -> bool:
    """Whether shapes are those that the kernels take, without any broadcasting."""
    parts = [part for part in (shift, scale, gate) if part is not None]
    of_image = (x.shape[0], 1, x.shape[2])
    return all(part.shape == of_image for part in parts) and (
        branch is None or branch.shape == x.shape
    )


def check_choice(setting: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ``UserError`` unless ``setting`` has a known value."""
    if value not in known:
        raise UserError(f"{setting} is {value!r}; choose one of {', '.join(known)}")


def _check(setting: str, backend: str, backends: tuple[str, ...], x: Tensor) -> None:
    check_choice(setting, backend, backends)
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


def capability(x: Tensor) -> tuple[int, int] | None:
    """NVIDIA's, where Triton can run."""
    return _capability_of(x.device.index) if x.is_cuda and not torch.version.hip else None


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
