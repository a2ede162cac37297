"""Count the FLOPs of a model, and look up the peak FLOP/s of a GPU."""

from typing import cast

import torch

from .attention import MoHAttention
from .blocks import DiTBlock
from .transformer import MoHDiTTransformer2DModel

# Dense peaks from the data sheets, in TFLOP/s: matrix products in bf16 or fp16, in TF32, and in
# float32. A key is a part of torch.cuda.get_device_name(); the first key that matches is used.
PEAKS = {
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100 NVL": (835.0, 417.5, 60.0),
    "H100": (989.4, 494.7, 66.9),
    "H200 NVL": (835.0, 417.5, 60.0),
    "H200": (989.4, 494.7, 66.9),
    "GH200": (989.4, 494.7, 66.9),
    "A100": (312.0, 156.0, 19.5),
}


def count_flops(model: MoHDiTTransformer2DModel) -> dict[str, int]:
    """Return the FLOPs of one image's forward pass by part: two per multiply-add of a product.

    In a routed layer, ``"attention"`` (q kᵀ and p v) counts only selected (token, head) pairs. This
    is what the method needs; a backend may compute more.
    """
    config = model.config
    tokens, width = (config.sample_size // config.patch_size) ** 2, config.hidden_size
    pixels = config.patch_size**2
    timestep = model.t_embedder.num_features * width + width**2
    parts = {
        "patches, timestep": tokens * pixels * config.in_channels * width + timestep,
        "adaLN": 2 * width**2,  # of the final layer
        "projections": 0,
        "routers": 0,
        "attention": 0,
        "MLP": 0,
        "output": tokens * width * pixels * config.out_channels,
    }
    for block in model.blocks:
        attention, mlp = cast(DiTBlock, block).attn, cast(DiTBlock, block).mlp
        inner = attention.num_heads * attention.head_dim
        parts["adaLN"] += 6 * width**2
        parts["projections"] += 4 * tokens * width * inner
        parts["routers"] += tokens * width * sum(map(len, attention.router_weights()))
        heads = attention.num_heads - skipped_heads(attention)
        parts["attention"] += 2 * tokens**2 * attention.head_dim * heads
        parts["MLP"] += 2 * tokens * mlp.fc1.in_features * mlp.fc1.out_features
    return {name: 2 * multiply_adds for name, multiply_adds in parts.items()}


def flops_per_image(model: MoHDiTTransformer2DModel) -> int:
    """Return the FLOPs of one image's forward pass, see :func:`count_flops`.

    A training step takes three times as many; recomputed activations are not counted.
    """
    return sum(count_flops(model).values())


def skipped_flops(model: MoHDiTTransformer2DModel) -> int:
    """Return the FLOPs that unselected heads would add to one image's forward pass."""
    tokens = (model.config.sample_size // model.config.patch_size) ** 2
    layers = [cast(DiTBlock, block).attn for block in model.blocks]
    return sum(4 * tokens**2 * layer.head_dim * skipped_heads(layer) for layer in layers)


def skipped_heads(attention: MoHAttention) -> int:
    """Return the number of heads of a layer that are not active for a token."""
    if attention.num_shared_heads is None:
        return 0
    active = attention.num_shared_heads + attention.num_active_routed_heads
    return attention.num_heads - active


def peak_flops(mixed_precision: str, allow_tf32: bool) -> float | None:
    """Return the peak FLOP/s of the current GPU at a run's precision, ``None`` if unknown."""
    if not torch.cuda.is_available():
        return None
    return peak_of(torch.cuda.get_device_name(), mixed_precision, allow_tf32)


def peak_of(gpu: str, mixed_precision: str, allow_tf32: bool) -> float | None:
    """Return the peak FLOP/s of the GPU of this name, ``None`` if it is not in ``PEAKS``."""
    column = 0 if mixed_precision != "no" else 1 if allow_tf32 else 2
    return next((1e12 * peak[column] for part, peak in PEAKS.items() if part in gpu), None)
