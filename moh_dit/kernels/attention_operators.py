"""Define torch operators for the attention kernels: one for the forward, one for the backward pass.

Both have fake implementations, so torch.compile can trace them. The input ``projected``
(B, N, 3·h·d + router columns) is contiguous. Its columns are queries, keys, values, the router
logits of shared heads (s), of routed heads (E) and of the two stages (2, if both kinds of heads
exist), then padding that is never read. The gradient of ``projected`` has the same layout. So one
matrix product computes all columns, and one product computes the gradient of its input.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import triton_backward, triton_forward, triton_routing
from .backends import NAMESPACE, capability_of
from .block_sizes import cdiv, next_power_of_2, split_head_dim
from .launch_table import launch_configuration
from .launching import LIBRARY, Launch, operator

LOG2_E = math.log2(math.e)
KERNELS = {
    "attend": triton_forward.attend,
    "query_gradient": triton_backward.query_gradient,
    "key_value_gradient": triton_backward.key_value_gradient,
}


class Layout(NamedTuple):
    """Properties of the inputs that select a compiled variant of the kernels.

    Attributes:
        device: number of the GPU, -1 for the CPU.
        dtype, tokens, stride: those of ``projected`` (B, tokens, stride).
        heads, shared, head_dim: h, s, d.
        aligned: whether the copy engine (TMA) can load ``projected``, see :func:`_layout`.
        tf32: whether products of float32 use TF32.
    """

    device: int
    dtype: torch.dtype
    tokens: int
    stride: int
    heads: int
    shared: int
    head_dim: int
    aligned: bool
    tf32: bool


def _layout(projected: Tensor, heads: int, shared: int, head_dim: int) -> Layout:
    _, tokens, stride = projected.shape
    # The copy engine needs strides that are multiples of 16 bytes, also for lse and delta
    # (B, h, N) in float32, hence the condition on the number of tokens.
    size = projected.element_size()
    aligned = not (
        projected.data_ptr() % 16 or head_dim * size % 16 or stride * size % 16 or tokens % 4
    )
    tf32 = projected.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    aligned = aligned and projected.numel() > 0
    return Layout(
        projected.get_device(), projected.dtype, tokens, stride, heads, shared, head_dim, aligned,
        tf32,
    )  # fmt: skip


class Plan(NamedTuple):
    """How to launch an attention kernel."""

    launch: Launch
    query_tiles: int
    config: dict[str, Any]


@lru_cache(maxsize=1024)
def _plan(kernel: str, layout: Layout, chosen: tuple | None = None) -> Plan:
    """Plan the launch of "attend", "query_gradient" or "key_value_gradient".

    ``chosen`` is a launch configuration as a tuple of items (default: from the table).
    """
    heads, shared, head_dim, tokens = layout.heads, layout.shared, layout.head_dim, layout.tokens
    config = dict(chosen or launch_configuration(kernel, layout.dtype, tokens, head_dim))
    config["TMA"] = config["TMA"] and layout.aligned
    d0, d1 = split_head_dim(head_dim)
    constants = dict(
        H=heads, S=shared, D=head_dim, D0=d0, D1=d1, STRIDE=layout.stride,
        EVEN_KEYS=tokens % config["BN"] == 0, EVEN_QUERIES=tokens % config["BM"] == 0,
        PRECISION="tf32" if layout.tf32 else "ieee",
    )  # fmt: skip
    if kernel == "attend":
        # Without TMA, which loads at least 16 columns, p·v can be as narrow as 8 columns.
        tail = max(8, next_power_of_2(head_dim - d0))
        constants["V1"] = d1 if d1 and config["TMA"] else tail
        constants["E_PAD"] = next_power_of_2(max(1, 2 * (heads - shared)))
        config |= _early_launch(layout, config)
    routed_tiles = cdiv(tokens, config["BM_ROUTED"])
    query_tiles = shared * cdiv(tokens, config["BM"]) + (heads - shared) * routed_tiles
    return Plan(Launch(KERNELS[kernel], **constants, **config), query_tiles, config)


def _early_launch(layout: Layout, config: dict | None = None) -> dict:
    """Return the options that start a kernel while the previous one runs (Hopper and later)."""
    config = config or launch_configuration("attend", layout.dtype, layout.tokens, layout.head_dim)
    capability = capability_of(layout.device) if layout.device >= 0 else None
    early = config.get("EARLY", False) and (capability or (0, 0)) >= (9, 0)
    return dict(EARLY=True, launch_pdl=True) if early else dict(EARLY=False)


@lru_cache(maxsize=256)
def _route_plan(layout: Layout, active: int, tile: int, num_warps: int) -> tuple[Launch, Launch]:
    heads, shared, tokens = layout.heads, layout.shared, layout.tokens
    early = _early_launch(layout)
    route = Launch(
        triton_routing.route, H=heads, S=shared, K=active, D=layout.head_dim,
        STRIDE=layout.stride, H_PAD=next_power_of_2(heads), TOKENS=tile, EARLY=early["EARLY"],
        num_warps=num_warps,
    )  # fmt: skip
    list_tokens = Launch(
        triton_routing.list_tokens, H=heads, S=shared,
        CHUNK=min(1024, max(16, next_power_of_2(tokens))), num_warps=4, **early,
    )  # fmt: skip
    return route, list_tokens


@lru_cache(maxsize=256)
def _route_backward_plan(layout: Layout, tile: int, num_warps: int) -> Launch:
    heads, stride = layout.heads, layout.stride
    return Launch(
        triton_routing.route_backward, H=heads, S=layout.shared, D=layout.head_dim, STRIDE=stride,
        H_PAD=next_power_of_2(heads),
        TAIL=next_power_of_2(max(1, stride - 3 * heads * layout.head_dim - heads)),
        TOKENS=tile, num_warps=num_warps,
    )  # fmt: skip


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
    batch, tokens, _ = projected.shape
    routed = heads - shared
    layout = _layout(projected, heads, shared, head_dim)
    route, list_tokens = _route_plan(layout, active, tile, num_warps)
    new = projected.new_empty
    gates = new(batch, heads, tokens, dtype=torch.float32)
    index = new(batch, routed, tokens, dtype=torch.int32)
    count = new(batch, routed, dtype=torch.int32)
    stats = new(batch, 2, routed, dtype=torch.float32)
    tiles = cdiv(tokens, tile)
    score_sums = new(batch, tiles, routed, dtype=torch.float32)
    route((tiles, batch, 1), projected, gates, score_sums, tokens)
    if routed:
        list_tokens((routed, batch, 1), gates, score_sums, index, count, stats, tokens, tiles)
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
    layout = _layout(projected, heads, shared, head_dim)
    plan = _plan("attend", layout, config and tuple(config.items()))
    plan.launch(
        (plan.query_tiles, batch, 1), projected,
        *_head_descriptors(projected, 3 * heads, head_dim, plan.config["BN"], plan.config["TMA"]),
        gates, index, count, out, lse, image_stats, stats, tokens, LOG2_E / math.sqrt(head_dim),
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
    layout = _layout(projected, heads, shared, head_dim)
    plan = _plan("query_gradient", layout, config and tuple(config.items()))
    plan.launch(
        (plan.query_tiles, batch, 1), projected,
        *_head_descriptors(projected, 3 * heads, head_dim, plan.config["BN"], plan.config["TMA"]),
        grad_out, out, gates, lse, delta, index, count, grad_projected, tokens,
        1 / math.sqrt(head_dim), LOG2_E / math.sqrt(head_dim),
    )  # fmt: skip
    return delta


def run_key_value_gradient(
    projected, grad_out, lse, delta, index, count, grad_projected, shared, head_dim, config=None
):
    """Write dk and dv into ``grad_projected``."""
    batch, tokens, _ = projected.shape
    heads = lse.shape[1]
    layout = _layout(projected, heads, shared, head_dim)
    plan = _plan("key_value_gradient", layout, config and tuple(config.items()))
    block, tma = plan.config["BM"], plan.config["TMA"]
    plan.launch(
        (heads * cdiv(tokens, plan.config["BN"]), batch, 1), projected,
        *_head_descriptors(projected, 3 * heads, head_dim, block, tma),
        *_head_descriptors(grad_out, heads, head_dim, block, tma),
        _row_descriptor(lse, block, tma), _row_descriptor(delta, block, tma),
        grad_out, lse, delta, index, count, grad_projected, tokens,
        1 / math.sqrt(head_dim), LOG2_E / math.sqrt(head_dim),
    )  # fmt: skip


def run_route_backward(
    projected, gates, delta, grad_stats, grad_projected, shared, head_dim, tile=32, num_warps=2
):
    """Write the gradients of the router logits into ``grad_projected``."""
    batch, tokens, _ = projected.shape
    layout = _layout(projected, gates.shape[1], shared, head_dim)
    launch = _route_backward_plan(layout, tile, num_warps)
    tiles = cdiv(tokens, tile)
    launch((tiles, batch, 1), projected, gates, delta, grad_stats, grad_projected, tokens)


@operator
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


@torch.library.register_fake(f"{NAMESPACE}::attention", lib=LIBRARY)
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


@operator
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


@torch.library.register_fake(f"{NAMESPACE}::attention_backward", lib=LIBRARY)
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


torch.library.register_autograd(
    f"{NAMESPACE}::attention", _backward, setup_context=_save, lib=LIBRARY
)


def moh_attention_triton(
    projected: Tensor, heads: int, shared: int, active: int, head_dim: int
) -> tuple[Tensor, Tensor | None]:
    """Compute :func:`moh_dit.model.attention.moh_attention` by the Triton kernels."""
    out, stats, *_ = attention_op(projected, heads, shared, active, head_dim)
    return out, stats if active else None
