"""List the launch configurations of the attention kernels, and look one up.

They were measured on an NVIDIA H200 with torch 2.11 and triton 3.6 (``benchmarks/tune.py``).
``benchmarks/check_kernels.py`` compares the results of each configuration with float64 on the GPU.
"""

import torch


def _block(bm, bm_routed, bn, stages, tma=False, **more) -> dict:
    return dict(BM=bm, BM_ROUTED=bm_routed, BN=bn, TMA=tma, num_warps=4, num_stages=stages, **more)


# Fastest configurations by (kernel, whether the head has a tail). A head of 72 columns is split
# into 64 and a tail of 8; a head of 64 has no tail. Each row is (smallest number of tokens,
# configuration). EARLY starts `list_tokens` and `attend` while the kernel before them still runs.
# For heads of 72, that is slower from 512 tokens on.
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
# Not tuned: float32 and other head widths, which the backend "auto" never chooses.
PLAIN = _block(32, 32, 32, 1)
TUNED_HEAD_DIMS = (64, 72)


def launch_configuration(kernel: str, dtype: torch.dtype, tokens: int, head_dim: int) -> dict:
    """Return block sizes, warps and pipeline stages of a kernel for this input."""
    if dtype == torch.float32 or head_dim not in TUNED_HEAD_DIMS:
        return dict(PLAIN)
    rows = LAUNCH[kernel, head_dim != 64]
    return dict(next(config for first, config in rows if tokens >= first))
