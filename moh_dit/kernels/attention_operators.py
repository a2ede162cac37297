"""Define torch operators for the attention kernels: one for the forward, one for the backward pass.

Both have fake implementations, so torch.compile can trace them. The input ``projected``
(B, N, 3·h·d + router columns) is contiguous. Its columns are queries, keys, values, the router
logits of shared heads (s), of routed heads (E) and of the two stages (2, if both kinds of heads
exist), then padding that is never read. The gradient of ``projected`` has the same layout. So one
matrix product computes all columns, and one product computes the gradient of its input.
"""

import math

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import triton_backward, triton_forward, triton_routing
from .backends import NAMESPACE, compute_capability
from .block_sizes import cdiv, next_power_of_2, split_head_dim
from .launch_table import launch_configuration


def _launch_config(kernel, projected, heads, shared, head_dim, config) -> tuple[dict, dict]:
    """Return the launch configuration (default: from the table) and other kernel constants."""
    tokens = projected.shape[1]
    d0, d1 = split_head_dim(head_dim)
    config = dict(config or launch_configuration(kernel, projected, head_dim))
    # The copy engine (TMA) needs strides that are multiples of 16 bytes, also for lse and delta
    # (B, h, N) in float32, hence the condition on the number of tokens.
    size = projected.element_size()
    aligned = not (head_dim * size % 16 or projected.shape[2] * size % 16 or tokens % 4)
    aligned = aligned and projected.data_ptr() % 16 == 0 and projected.numel() > 0
    config["TMA"] = config["TMA"] and aligned
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    tf32 = tf32 and projected.dtype == torch.float32
    constants = dict(
        H=heads, S=shared, D=head_dim, D0=d0, D1=d1, STRIDE=projected.shape[2],
        EVEN_KEYS=tokens % config["BN"] == 0, EVEN_QUERIES=tokens % config["BM"] == 0,
        PRECISION="tf32" if tf32 else "ieee",
        scale_log2=math.log2(math.e) / math.sqrt(head_dim),
    )  # fmt: skip
    return config, constants


def _early_launch(projected: Tensor, head_dim: int, config: dict | None = None) -> dict:
    """Return the options that start a kernel while the previous one runs (Hopper and later)."""
    config = config or launch_configuration("attend", projected, head_dim)
    early = config.get("EARLY", False) and (compute_capability(projected) or (0, 0)) >= (9, 0)
    return dict(EARLY=True, launch_pdl=True) if early else dict(EARLY=False)


def _query_tiles(tokens: int, heads: int, shared: int, config: dict) -> int:
    routed_tiles = cdiv(tokens, config["BM_ROUTED"])
    return shared * cdiv(tokens, config["BM"]) + (heads - shared) * routed_tiles


def _head_descriptors(tensor: Tensor, heads: int, head_dim: int, block: int, tma: bool) -> tuple:
    """Return TMA descriptors (B, N, heads, d) for both column parts of a head, or ``None``."""
    if not tma:
        return None, None
    batch, tokens, stride = tensor.shape
    shape, strides = [batch, tokens, heads, head_dim], [tokens * stride, stride, head_dim, 1]
    return tuple(
        TensorDescriptor(tensor, shape, strides, [1, block, 1, width]) if width else None
        for width in split_head_dim(head_dim)
    )


def _row_descriptor(rows: Tensor, block: int, tma: bool) -> TensorDescriptor | None:
    return TensorDescriptor.from_tensor(rows, [1, 1, block]) if tma else None


def run_route(projected, heads, shared, active, head_dim, tile=32, num_warps=2):
    """Run the router.

    Returns gates (B, h, N) float32, index (B, E, N) int32 with the tokens that selected each
    routed head, their count (B, E) int32, and the router statistics of each image (B, 2, E).
    """
    batch, tokens, stride = projected.shape
    routed = heads - shared
    early = _early_launch(projected, head_dim)
    new = projected.new_empty
    gates = new(batch, heads, tokens, dtype=torch.float32)
    index = new(batch, routed, tokens, dtype=torch.int32)
    count = new(batch, routed, dtype=torch.int32)
    stats = new(batch, 2, routed, dtype=torch.float32)
    tiles = cdiv(tokens, tile)
    score_sums = new(batch, tiles, routed, dtype=torch.float32)
    triton_routing.route[(tiles, batch)](
        projected, gates, score_sums, tokens, H=heads, S=shared, K=active, D=head_dim,
        STRIDE=stride, H_PAD=next_power_of_2(heads), TOKENS=tile, EARLY=early["EARLY"],
        num_warps=num_warps,
    )  # fmt: skip
    if routed:
        triton_routing.list_tokens[(routed, batch)](
            gates, score_sums, index, count, stats, tokens, tiles, H=heads, S=shared,
            CHUNK=min(1024, max(16, next_power_of_2(tokens))), num_warps=4, **early,
        )  # fmt: skip
    return gates, index, count, stats


def run_attend(
    projected, gates, index, count, image_stats, out, stats, shared, head_dim, config=None
):
    """Write ``out`` (B, N, h·d) and ``stats`` (2, E), and return lse (B, h, N).

    lse is the base-2 log-sum-exp minus log2 of the gate, defined only for selected tokens.
    """
    batch, tokens, _ = projected.shape
    heads = gates.shape[1]
    lse = torch.empty_like(gates)
    config, constants = _launch_config("attend", projected, heads, shared, head_dim, config)
    # Without the copy engine, which loads at least 16 columns, p·v can be as narrow as 8 columns.
    tail = max(8, next_power_of_2(head_dim - constants["D0"]))
    tail = constants["D1"] if constants["D1"] and config["TMA"] else tail
    tiles = _query_tiles(tokens, heads, shared, config)
    triton_forward.attend[(tiles, batch)](
        projected, *_head_descriptors(projected, 3 * heads, head_dim, config["BN"], config["TMA"]),
        gates, index, count, out, lse, image_stats, stats, tokens, constants.pop("scale_log2"),
        E_PAD=next_power_of_2(max(1, 2 * (heads - shared))), V1=tail, **constants,
        **config | _early_launch(projected, head_dim, config),
    )  # fmt: skip
    return lse


def run_query_gradient(
    projected, grad_out, out, gates, lse, index, count, grad_projected, shared, head_dim,
    config=None,
):  # fmt: skip
    """Write dq into ``grad_projected``; return δ (B, h, N), defined only for selected tokens."""
    batch, tokens, _ = projected.shape
    heads = gates.shape[1]
    delta = torch.empty_like(gates)
    config, constants = _launch_config("query_gradient", projected, heads, shared, head_dim, config)
    triton_backward.query_gradient[(_query_tiles(tokens, heads, shared, config), batch)](
        projected, *_head_descriptors(projected, 3 * heads, head_dim, config["BN"], config["TMA"]),
        grad_out, out, gates, lse, delta, index, count, grad_projected, tokens,
        1 / math.sqrt(head_dim), constants.pop("scale_log2"), **constants, **config,
    )  # fmt: skip
    return delta


def run_key_value_gradient(
    projected, grad_out, lse, delta, index, count, grad_projected, shared, head_dim, config=None
):
    """Write dk and dv into ``grad_projected``."""
    batch, tokens, _ = projected.shape
    heads = lse.shape[1]
    config, constants = _launch_config(
        "key_value_gradient", projected, heads, shared, head_dim, config
    )
    block, tma = config["BM"], config["TMA"]
    tiles = heads * cdiv(tokens, config["BN"])
    triton_backward.key_value_gradient[(tiles, batch)](
        projected, *_head_descriptors(projected, 3 * heads, head_dim, block, tma),
        *_head_descriptors(grad_out, heads, head_dim, block, tma),
        _row_descriptor(lse, block, tma), _row_descriptor(delta, block, tma),
        grad_out, lse, delta, index, count, grad_projected, tokens,
        1 / math.sqrt(head_dim), constants.pop("scale_log2"), **constants, **config,
    )  # fmt: skip


def run_route_backward(
    projected, gates, delta, grad_stats, grad_projected, shared, head_dim, tile=32, num_warps=2
):
    """Write the gradients of the router logits into ``grad_projected``."""
    batch, tokens, stride = projected.shape
    heads = gates.shape[1]
    triton_routing.route_backward[(cdiv(tokens, tile), batch)](
        projected, gates, delta, grad_stats, grad_projected, tokens, H=heads, S=shared, D=head_dim,
        STRIDE=stride, H_PAD=next_power_of_2(heads),
        TAIL=next_power_of_2(max(1, stride - 3 * heads * head_dim - heads)),
        TOKENS=tile, num_warps=num_warps,
    )  # fmt: skip


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def attention_op(
    projected: Tensor, heads: int, shared: int, active: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute gated attention.

    Returns the output (B, N, h·d), the router statistics (2, E), and what the backward pass needs:
    gates, lse, index and count.
    """
    projected = projected.contiguous()
    out = projected.new_empty(*projected.shape[:2], heads * head_dim)
    with torch.cuda.device_of(projected):  # Triton launches on the current device
        gates, index, count, image_stats = run_route(projected, heads, shared, active, head_dim)
        stats = gates.new_empty(2, heads - shared)
        lse = run_attend(projected, gates, index, count, image_stats, out, stats, shared, head_dim)
    return out, stats, gates, lse, index, count


@attention_op.register_fake
def _(projected, heads, shared, active, head_dim):
    batch, tokens, _ = projected.shape
    routed = heads - shared
    new = projected.new_empty
    return (
        new(batch, tokens, heads * head_dim),
        new(2, routed, dtype=torch.float32),
        new(batch, heads, tokens, dtype=torch.float32),
        new(batch, heads, tokens, dtype=torch.float32),
        new(batch, routed, tokens, dtype=torch.int32),
        new(batch, routed, dtype=torch.int32),
    )


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=())
def attention_backward_op(
    grad_out: Tensor,
    grad_stats: Tensor,
    projected: Tensor,
    out: Tensor,
    gates: Tensor,
    lse: Tensor,
    index: Tensor,
    count: Tensor,
    shared: int,
    head_dim: int,
) -> Tensor:
    """Compute the gradient of ``projected``, without atomic additions and so reproducibly."""
    grad_out, grad_stats, projected = (t.contiguous() for t in (grad_out, grad_stats, projected))
    if grad_out.data_ptr() % 16:  # a view into another tensor, which the copy engine cannot load
        grad_out = grad_out.clone()
    grad_projected = torch.empty_like(projected)
    with torch.cuda.device_of(projected):
        delta = run_query_gradient(
            projected, grad_out, out, gates, lse, index, count, grad_projected, shared, head_dim
        )
        run_key_value_gradient(
            projected, grad_out, lse, delta, index, count, grad_projected, shared, head_dim
        )
        run_route_backward(projected, gates, delta, grad_stats, grad_projected, shared, head_dim)
    return grad_projected


@attention_backward_op.register_fake
def _(grad_out, grad_stats, projected, out, gates, lse, index, count, shared, head_dim):
    return torch.empty_like(projected, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    projected, _, ctx.shared, _, ctx.head_dim = inputs
    out, stats, gates, lse, index, count = output
    ctx.save_for_backward(projected, out, gates, lse, index, count)
    ctx.mark_non_differentiable(gates, lse, index, count)
    ctx.stats_shape = stats.shape


def _backward(ctx, grad_out, grad_stats, *_):
    projected, out, gates, lse, index, count = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if grad_stats is None:
        grad_stats = gates.new_zeros(ctx.stats_shape)
    grad = attention_backward_op(
        grad_out, grad_stats, projected, out, gates, lse, index, count, ctx.shared, ctx.head_dim
    )
    return grad, None, None, None, None


attention_op.register_autograd(_backward, setup_context=_save)


def moh_attention_triton(
    projected: Tensor, heads: int, shared: int, active: int, head_dim: int
) -> tuple[Tensor, Tensor | None]:
    """Compute :func:`moh_dit.model.attention.moh_attention` by the Triton kernels."""
    out, stats, *_ = attention_op(projected, heads, shared, active, head_dim)
    return out, stats if active else None
