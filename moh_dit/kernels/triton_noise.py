"""Draw per-image normal noise in one launch of a Triton kernel.

It computes the same numbers as ``moh_dit.diffusion.noise``. The plain tensor operations there
launch about 170 small kernels, which would slow down sampling from a small model.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .block_sizes import cdiv

BLOCK = 256  # counters per program; each gives four values


@triton.jit
def _normal_pair(radius_word, angle_word, TURN: tl.constexpr, INTERPRETED: tl.constexpr):
    """Apply the Box-Muller transform in float64; Triton's own log and cos are float32 only."""
    uniform = (radius_word.to(tl.float64) + 0.5) * 2.0**-32
    angle = angle_word.to(tl.float64) * TURN
    if INTERPRETED:
        radius = tl.sqrt(tl.log(uniform) * -2.0)
        return radius * tl.cos(angle), radius * tl.sin(angle)
    radius = tl.sqrt(libdevice.log(uniform) * -2.0)
    return radius * libdevice.cos(angle), radius * libdevice.sin(angle)


@triton.jit(do_not_specialize=["seed", "first_draw"])
def philox_normal_kernel(
    out, indices, seed, first_draw,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, TURN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Fill ``out`` float64 (draws, B, COUNT). Grid (⌈COUNT/4/BLOCK⌉, B, draws)."""
    counter = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, draw = tl.program_id(1), tl.program_id(2)
    image = tl.load(indices + row)
    zero = counter * 0
    w0, w1, w2, w3 = tl.philox(
        seed,
        counter,
        zero + (first_draw + draw).to(tl.int32),
        zero + (image & 0xFFFFFFFF).to(tl.int32),
        zero + (image >> 32).to(tl.int32),
    )
    v0, v1 = _normal_pair(w0, w1, TURN, INTERPRETED)
    v2, v3 = _normal_pair(w2, w3, TURN, INTERPRETED)
    target = out + (draw * tl.num_programs(1) + row).to(tl.int64) * COUNT + counter * 4
    tl.store(target, v0, mask=counter * 4 < COUNT)
    tl.store(target + 1, v1, mask=counter * 4 + 1 < COUNT)
    tl.store(target + 2, v2, mask=counter * 4 + 2 < COUNT)
    tl.store(target + 3, v3, mask=counter * 4 + 3 < COUNT)


def philox_normal_triton(
    seed: int, indices: Tensor, first_draw: int, draws: int, count: int
) -> Tensor:
    """Compute :func:`moh_dit.diffusion.noise.philox_normal` by the kernel."""
    out = torch.empty(draws, len(indices), count, dtype=torch.float64, device=indices.device)
    grid = (cdiv(cdiv(count, 4), BLOCK), len(indices), draws)
    interpreted = triton.knobs.runtime.interpret
    seed = (seed + 2**63) % 2**64 - 2**63  # as a signed integer with the same bits
    with torch.cuda.device_of(out):
        philox_normal_kernel[grid](
            out, indices, seed, first_draw, count, BLOCK, 2 * math.pi * 2.0**-32, interpreted
        )
    return out
