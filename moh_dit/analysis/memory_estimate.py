"""Estimate the memory of a training step by a formula.

The formula gives the bytes per token that autograd keeps of one block for the backward pass:

    eager             4 r C + a (4 C + 2 m + P + h d)
    compiled          r C + a (5 C + 2 m + P + h d)       4 C instead of 5 C without autocast
    both              + 4 (h + 4)                         log-sum-exp; statistics of two norms
    with a router     + 24 E + 8 s + 20 + a h             scores and gates
                      + a h d                             o_i before its gate, if not fused

    C  width                              r  bytes of a residual value: 4
    m  MLP width                          a  bytes of a matrix operand: 2 under autocast, else 4
    h  heads of width d                   P  columns of the joint projection: 3 h d, with a router
    E  routed heads                          plus its rows, padded to a multiple of 64
    s  shared heads

In eager mode the r terms are the input of the block, the sum after the attention branch, and the
norms of both. The a terms are the input and output of each branch, q, k, v, the attention output,
and the MLP before and after GELU. Compiled blocks recompute the norms.

Three terms do not depend on the number of tokens: 9 a C of modulation per image and block, under
autocast a copy of each weight matrix, and otherwise the joint weight of projection and router.

With gradient checkpointing each block keeps only its input, r C per token. In the backward pass one
block at a time keeps everything.
"""

from typing import cast

from torch import Tensor, nn

from ..model.attention import MoHAttention
from ..model.blocks import DiTBlock
from ..model.transformer import MoHDiTTransformer2DModel

RESIDUAL = 4  # bytes of a float32 value: weights, averages, residual stream, loss


def activation_bytes(
    model: MoHDiTTransformer2DModel,
    batch_size: int,
    *,
    autocast: bool = False,
    compiled: bool = False,
    fused_gates: bool = False,
    checkpointing: bool = False,
) -> int:
    """Return the bytes that a forward pass keeps for the backward pass.

    Args:
        model: the model, possibly on the meta device.
        batch_size: images of one micro-batch in one process.
        autocast: whether matrix products run in bf16 or fp16.
        compiled: whether each block is compiled.
        fused_gates: whether the attention kernel applies the gates (Triton backend).
        checkpointing: whether each block is checkpointed.
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
    """Return the bytes that one block keeps for ``tokens`` tokens of ``images`` images."""
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
    """Return the columns of the joint projection: q, k, v, router logits and padding."""
    rows = attention.qkv.out_features + sum(map(len, attention.router_weights()))
    return rows if attention.num_shared_heads is None else -(-rows // 64) * 64


def state_bytes(model: MoHDiTTransformer2DModel, num_averages: int) -> dict[str, int]:
    """Return the bytes that one process keeps between steps, by part; all values are float32."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in model.parameters())
    return {
        "weights": RESIDUAL * every,
        "gradients": RESIDUAL * trained,
        "AdamW": 2 * RESIDUAL * trained,
        "averages": num_averages * RESIDUAL * every,
    }
