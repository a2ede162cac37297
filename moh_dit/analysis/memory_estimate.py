"""Memory of a training step, by formula.

What autograd keeps of a block for its backward pass, in bytes per token, for width C, MLP width m,
heads h of width d, routed heads E, shared heads s, P columns of the joint projection (3·h·d, and
where there is a router its rows, padded to 64), r = 4 bytes of the residual stream and a bytes of
a matrix product's operands (2 under autocast, else 4):

    run op by op      4 r C + a (4 C + 2 m + P + h d)
    compiled          r C + a (5 C + 2 m + P + h d)       4 C for 5 C without autocast
    either            + 4 (h + 4)                         log-sum-exp; statistics of two norms
    with a router     + 24 E + 8 s + 20 + a h             scores and gates
                      + a h d                             o_i before its gate, unless a kernel fuses

Run op by op that is the block's input, its state between the branches, and the norms of both (r);
what enters each branch and what it adds (a); q, k, v, attention's output; the MLP before and after
GELU. Compiled, the norms are recomputed. To this come 9 a C per image and block of modulation;
under autocast a copy of every weight matrix; else the joint weight of projection and router.

With gradient checkpointing each block keeps its input alone, r C per token, and one at a time
everything.
"""

from typing import cast

from torch import Tensor, nn

from ..model.attention import MoHAttention
from ..model.transformer import DiTBlock, MoHDiTTransformer2DModel

RESIDUAL = 4  # bytes: weights, averages, residual stream and loss are float32


def activation_bytes(
    model: MoHDiTTransformer2DModel,
    batch_size: int,
    *,
    autocast: bool = False,
    compiled: bool = False,
    fused_gates: bool = False,
    checkpointing: bool = False,
) -> int:
    """Bytes that a forward pass of ``batch_size`` images keeps for the backward pass.

    Args:
        model: may be on the meta device.
        batch_size: images at once in one process.
        autocast: matrix products in bf16 or fp16.
        compiled: each block compiled.
        fused_gates: gates are applied inside the attention kernel (the Triton backend).
        checkpointing: gradient checkpointing, a block at a time.
    """
    config, operand = model.config, 2 if autocast else 4
    tokens, width = (config.sample_size // config.patch_size) ** 2, config.hidden_size
    blocks = [
        _block_bytes(
            cast(DiTBlock, block), batch_size, batch_size * tokens, operand, compiled, fused_gates
        )
        for block in model.blocks
    ]
    patch = config.patch_size**2 * config.in_channels
    ends = batch_size * tokens * (operand * (width + patch) + RESIDUAL * 2 * width)
    if autocast:
        final = model.final_layer
        copied = (model.x_embedder.proj, model.t_embedder.mlp[2], final.adaLN_modulation[1])
        ends += operand * _elements(*copied, final.linear)
    kept = sum(blocks)
    if checkpointing:
        kept = len(blocks) * batch_size * tokens * RESIDUAL * width + max(blocks)
    return kept + ends


def _block_bytes(
    block: DiTBlock, images: int, tokens: int, operand: int, compiled: bool, fused_gates: bool
) -> int:
    """What one block keeps for ``tokens`` of ``images``: the formula above."""
    attention, hidden = block.attn, block.mlp.fc1.out_features
    width, heads = block.mlp.fc1.in_features, attention.num_heads
    inner, projected = heads * attention.head_dim, projected_width(attention)
    branches = 5 if compiled and operand < RESIDUAL else 4
    token = RESIDUAL * width * (1 if compiled else 4)
    token += operand * (branches * width + 2 * hidden + projected + inner) + 4 * (heads + 4)
    gated = attention.num_shared_heads is not None
    if gated:
        shared = attention.num_shared_heads or 0
        token += 24 * (heads - shared) + 8 * shared + 20 + operand * heads
        token += 0 if fused_gates else operand * inner
    weights = projected * width if gated or operand < RESIDUAL else 0
    if operand < RESIDUAL:
        others = (block.adaLN_modulation[1], attention.proj, block.mlp.fc1, block.mlp.fc2)
        weights += _elements(*others)
    return tokens * token + images * 9 * operand * width + operand * weights


def _elements(*layers: nn.Module) -> int:
    return sum(cast(Tensor, layer.weight).numel() for layer in layers)


def projected_width(attention: MoHAttention) -> int:
    """Columns of the joint projection: queries, keys, values, router logits, padding."""
    rows = 3 * attention.num_heads * attention.head_dim
    if attention.num_shared_heads is None:
        return rows
    rows += sum(map(len, attention.router_weights()))
    return -(-rows // 64) * 64


def state_bytes(model: MoHDiTTransformer2DModel, num_averages: int) -> dict[str, int]:
    """Bytes of what outlives a step in one process, all float32: by part."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in model.parameters())
    return {
        "weights": RESIDUAL * every,
        "gradients": RESIDUAL * trained,
        "AdamW": 2 * RESIDUAL * trained,
        "averages": num_averages * RESIDUAL * every,
    }
