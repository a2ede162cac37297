"""Choose and check the backends of attention, adaLN and the MLP.

For "auto", the tables below name the fastest backend by measurement (NVIDIA H200, torch 2.11,
triton 3.6; see ``docs/performance.md``).
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from ..common.errors import UserError

BACKENDS = ("auto", "reference", "gathered", "triton")
MODULATION_BACKENDS = ("auto", "reference", "triton")
MLP_BACKENDS = ("auto", "reference")
LAYER_NORM_EPSILON = 1e-6  # of adaLN, as in DiT's code
# Operator names are process-global, so bundled copies of this package need their own prefix.
NAMESPACE = __name__.partition(".")[0]

# Attention on GPUs: backend by compute capability and head width, where measured and verified.
# Everywhere else "reference" is used: dense attention, then a multiplication by the gates.
GPU_BACKENDS: dict[tuple[int, int], dict[int, str]] = {(9, 0): {64: "triton", 72: "triton"}}
GPU_DTYPES = (torch.bfloat16, torch.float16)
# adaLN on GPUs: backend by compute capability, for every width.
GPU_MODULATION_BACKENDS: dict[tuple[int, int], str] = {(9, 0): "triton"}
# Compute capabilities on which the MLP fuses the GELU into its first linear layer in evaluation.
GPU_LINEAR_GELU = {(9, 0)}
# Attention on CPUs: "gathered" is faster from this number of tokens and up to this fraction of
# active heads.
GATHERED_MIN_TOKENS, GATHERED_MAX_ACTIVE = 256, 0.8


def auto_backend(capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int) -> str:
    """Return the attention backend for a GPU; ``capability`` is ``None`` without Triton."""
    if capability is None or dtype not in GPU_DTYPES:
        return "reference"
    return GPU_BACKENDS.get(capability, {}).get(head_dim, "reference")


def auto_cpu_backend(tokens: int, heads: int, shared: int, active: int) -> str:
    """Return the attention backend for a CPU."""
    faster = tokens >= GATHERED_MIN_TOKENS and shared + active <= GATHERED_MAX_ACTIVE * heads
    # The length of gathered lists depends on the data, which a compiled graph cannot express.
    return "gathered" if faster and not torch.compiler.is_compiling() else "reference"


def auto_modulation_backend(capability: tuple[int, int] | None, dtype: torch.dtype) -> str:
    """Return the adaLN backend for the dtype of shift, scale and gate."""
    if capability is None or dtype not in GPU_DTYPES:
        return "reference"
    return GPU_MODULATION_BACKENDS.get(capability, "reference")


def choose_backend(
    backend: str, projected: Tensor, heads: int, shared: int, active: int, head_dim: int
) -> str:
    """Return the attention backend that will run.

    Raises:
        UserError: if the given backend is unknown or cannot run on this device or dtype.
    """
    _check("attention_backend", backend, BACKENDS, projected)
    if backend != "auto":
        return backend
    if projected.device.type == "cpu" and projected.numel() > 0:
        return auto_cpu_backend(projected.shape[1], heads, shared, active)
    return auto_backend(compute_capability(projected), projected.dtype, head_dim)


def choose_modulation_backend(
    backend: str,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor | None,
    branch: Tensor | None,
) -> str:
    """Return the backend of :func:`moh_dit.model.modulation.adaln` that will run.

    Raises:
        UserError: if the given backend is unknown or cannot run on this device, dtype or shape.
    """
    _check("modulation_backend", backend, MODULATION_BACKENDS, x)
    if backend == "auto":
        backend = auto_modulation_backend(compute_capability(x), scale.dtype)
        return backend if _fits(x, shift, scale, gate, branch) else "reference"
    if backend == "triton" and not _fits(x, shift, scale, gate, branch):
        raise UserError(
            'modulation_backend "triton" takes shift, scale and gate of shape (B, 1, C) and a '
            f'branch of shape (B, N, C) for x of shape {tuple(x.shape)}; use "auto"'
        )
    return backend


def _fits(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor | None, branch: Tensor | None
) -> bool:
    """Return whether the kernels take these shapes; they do not broadcast."""
    parts = [part for part in (shift, scale, gate) if part is not None]
    of_image = (x.shape[0], 1, x.shape[2])
    return all(part.shape == of_image for part in parts) and (
        branch is None or branch.shape == x.shape
    )


def check_choice(setting: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ``UserError`` unless the value of ``setting`` is known."""
    if value not in known:
        raise UserError(f"{setting} is {value!r}; choose one of {', '.join(known)}")


def _check(setting: str, backend: str, backends: tuple[str, ...], x: Tensor) -> None:
    check_choice(setting, backend, backends)
    if backend != "triton":
        return
    if not _triton_installed():
        raise UserError(
            f'{setting} is "triton", but Triton is not installed; run pip install triton, or use '
            '"auto"'
        )
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(
            f'{setting} "triton" has no kernels for {x.dtype}; use float32, float16 or bfloat16, '
            'or the backend "auto"'
        )
    if not (x.is_cuda or _triton_interpreted()):
        raise UserError(f'{setting} "triton" needs a GPU, the input is on {x.device}; use "auto"')


def compute_capability(x: Tensor) -> tuple[int, int] | None:
    """Return the compute capability of the input's NVIDIA GPU, ``None`` without GPU or Triton."""
    return capability_of(x.device.index) if x.is_cuda else None


@torch.compiler.assume_constant_result
def capability_of(device: int) -> tuple[int, int] | None:
    """Return the compute capability of a GPU; ``None`` without an NVIDIA GPU or Triton."""
    if torch.version.hip or not _triton_installed():
        return None
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def _triton_installed() -> bool:
    return find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _triton_interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret
