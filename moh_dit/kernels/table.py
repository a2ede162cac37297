"""Measured choices, as data (NVIDIA H200, torch 2.11, triton 3.6; ``benchmarks/tune.py``).

Every configuration was timed and held against float64 on the chip (``docs/performance.md``);
``benchmarks/check_kernels.py`` repeats the latter.
"""

import torch


def _block(bm, bm_routed, bn, stages, tma=False, **more) -> dict:
    return dict(BM=bm, BM_ROUTED=bm_routed, BN=bn, TMA=tma, num_warps=4, num_stages=stages, **more)


# Fastest found, by (kernel, padded width of a head's tail): rows of (first N it holds for,
# configuration). The 72-wide heads have a tail, the 64-wide ones none. ``EARLY``: attend and what
# routes for it start while the kernel before them runs; 72 wide, that is slower from 512 tokens on.
LAUNCH: dict[tuple[str, bool], list[tuple[int, dict]]] = {
    ("attend", True): [
        (512, _block(128, 128, 64, 3, tma=True)),
        (0, _block(128, 64, 32, 3, EARLY=True)),
    ],
    ("attend", False): [
        (2048, _block(64, 64, 128, 2, tma=True)),
        (0, _block(64, 64, 64, 3, EARLY=True)),
    ],
    ("query_gradient", True): [
        (2048, _block(64, 64, 64, 3)),
        (0, _block(64, 64, 32, 3, tma=True)),
    ],
    ("query_gradient", False): [(0, _block(64, 64, 32, 3))],
    ("key_value_gradient", True): [
        (2048, _block(64, 32, 64, 3)),
        (512, _block(32, 32, 64, 3, tma=True, maxnreg=168)),
        (0, _block(32, 32, 64, 2, tma=True, maxnreg=168)),
    ],
    ("key_value_gradient", False): [
        (2048, _block(64, 64, 64, 3, tma=True)),
        (0, _block(32, 32, 64, 3, tma=True)),
    ],
}
# Untuned, for what ``auto`` never takes: float32 and other head widths.
PLAIN = _block(32, 32, 32, 1)
TUNED_HEAD_DIMS = (64, 72)


def launch_configuration(kernel: str, projected: torch.Tensor, head_dim: int) -> dict:
    """Block sizes, warps and pipeline stages of one kernel for this input."""
    tokens = projected.shape[1]
    if projected.dtype == torch.float32 or head_dim not in TUNED_HEAD_DIMS:
        return dict(PLAIN)
    rows = LAUNCH[kernel, head_dim not in (64,)]
    return dict(next(config for first, config in rows if tokens >= first))


# Where ``auto`` takes which backend. GPU: by compute capability and head width, as far as measured
# and verified; anything else takes "reference", that is dense attention and a multiplication by
# gates: eager, that was slower at every size, also in layers whose every head is shared.
GPU_BACKENDS: dict[tuple[int, int], dict[int, str]] = {
    (9, 0): {64: "triton", 72: "triton"},
}
GPU_DTYPES = (torch.bfloat16, torch.float16)
# The same of adaLN, whatever the width of the model.
GPU_MODULATION_BACKENDS: dict[tuple[int, int], str] = {(9, 0): "triton"}
# Where the MLP's first linear layer takes its GELU along, in evaluation.
GPU_LINEAR_GELU = {(9, 0)}
# CPU: gathering pays from this many tokens and up to this share of active heads.
GATHERED_FROM_TOKENS, GATHERED_UP_TO_SHARE = 256, 0.8


def auto_backend(capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int) -> str:
    """The fastest backend by measurement; ``capability`` is ``None`` where Triton cannot run."""
    if capability is None or dtype not in GPU_DTYPES:
        return "reference"
    return GPU_BACKENDS.get(capability, {}).get(head_dim, "reference")


def auto_cpu_backend(tokens: int, heads: int, shared: int, active: int) -> str:
    """As :func:`auto_backend`."""
    pays = tokens >= GATHERED_FROM_TOKENS and shared + active <= GATHERED_UP_TO_SHARE * heads
    # Its lists are as long as the data make them, which a compiled graph cannot hold.
    return "gathered" if pays and not torch.compiler.is_compiling() else "reference"


def auto_modulation_backend(capability: tuple[int, int] | None, dtype: torch.dtype) -> str:
    """As :func:`auto_backend`, by the dtype of shift, scale and gate."""
    if capability is None or dtype not in GPU_DTYPES:
        return "reference"
    return GPU_MODULATION_BACKENDS.get(capability, "reference")
