"""How much arithmetic a model is, and how much a GPU could do."""

from typing import cast

import torch

from .transformer import DiTBlock, MoHDiTTransformer2DModel

# Dense peaks of the data sheets in TFLOP/s, by what torch.cuda.get_device_name contains: matrix
# products in bf16 or fp16, in TF32, and in float32. The first name that fits counts.
PEAKS = {
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100 NVL": (835.0, 417.5, 60.0),
    "H100": (989.4, 494.7, 66.9),
    "H200 NVL": (835.0, 417.5, 60.0),
    "H200": (989.4, 494.7, 66.9),
    "GH200": (989.4, 494.7, 66.9),
    "A100": (312.0, 156.0, 19.5),
}


def flops_per_image(model: MoHDiTTransformer2DModel) -> int:
    """FLOPs of one image's forward pass: two for each multiply-add of a matrix product.

    Of a routed layer only the queries that a token's selected heads ask are counted: what the
    method needs, however it is computed. A training step is three times as much; recomputed
    activations do not count.
    """
    config = model.config
    tokens, width = (config.sample_size // config.patch_size) ** 2, config.hidden_size
    pixels = config.patch_size**2
    per_token = pixels * config.in_channels * width + width * pixels * config.out_channels
    per_image = model.t_embedder.num_features * width + width**2  # timestep MLP
    per_image += 2 * width**2  # adaLN of the last layer
    for block in model.blocks:
        attention, mlp = cast(DiTBlock, block).attn, cast(DiTBlock, block).mlp
        per_image += 6 * width**2  # adaLN
        per_token += 2 * mlp.fc1.in_features * mlp.fc1.out_features
        inner, active = attention.num_heads * attention.head_dim, attention.num_heads
        per_token += 4 * width * inner + width * sum(map(len, attention.router_weights()))
        if attention.num_shared_heads is not None:
            active = attention.num_shared_heads + attention.num_active_routed_heads
        per_token += 2 * tokens * attention.head_dim * active  # q kᵀ and p v
    return 2 * (tokens * per_token + per_image)


def peak_flops(mixed_precision: str, allow_tf32: bool) -> float | None:
    """FLOP/s of the current GPU in the arithmetic of a run; ``None`` where no figure is known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    column = 0 if mixed_precision != "no" else 1 if allow_tf32 else 2
    return next((1e12 * peak[column] for part, peak in PEAKS.items() if part in name), None)
