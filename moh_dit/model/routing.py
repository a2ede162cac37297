"""Choose and weigh the heads of each token: gates, router statistics, load-balance loss.

MoH (arXiv 2410.11842) §3, and §4.4 for the router without parameters. Of h heads, the first s are
shared and the other E = h - s are routed. Each token activates its top k routed heads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.errors import UserError

ROUTERS = ("learned", "query_norm")


def moh_gates(logits: Tensor, heads: int, shared: int, active: int) -> tuple[Tensor, Tensor | None]:
    """Compute gates and router statistics from router logits (MoH §3).

    Args:
        logits: (B, N, columns) with the columns W_shared x (s), W_routed x (E) and, if the layer
            has both kinds of heads, W_stage x (2). Further columns are ignored.
        heads, shared: h and s.
        active: routed heads k that each token activates; 0 for a layer without routed heads. If
            scores are equal, every backend takes the head with the lowest index.

    Returns:
        ``(gates, router_stats)``. ``gates`` (B, N, h) are float32 (float64 for float64 logits) and
        zero for heads that are not selected. Their mean is 1 over the shared heads and 1 over the
        active routed heads; if both kinds exist, these means are α_1 and α_2 instead.
        ``router_stats`` (2, E) holds, for each routed head, the fraction f of tokens that selected
        it and its mean score P̄. Only P̄ has a gradient. Both are means over the batch, so
        processes with equal batch sizes can average them. ``None`` without routed heads.
    """
    # In bf16 the softmax would round the gates to 8 bits, so compute them in at least float32.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))

    shared_gates = routed_gates = router_stats = None
    if shared > 0:
        shared_gates = shared * logits[..., :shared].softmax(-1)  # S
    if active > 0:
        scores = logits[..., shared:heads].softmax(-1)  # P
        selected = select_top(logits[..., shared:heads], active)  # M
        kept = scores * selected
        routed_gates = active * kept / kept.sum(-1, keepdim=True)  # R; the sum is at least 1/E
        router_stats = mean_load_and_score(selected, scores)

    if shared_gates is None:
        assert routed_gates is not None
        return routed_gates, router_stats
    if routed_gates is None:
        return shared_gates, router_stats
    alpha = 2 * logits[..., heads : heads + 2].softmax(-1)  # two-stage α
    gates = torch.cat([alpha[..., :1] * shared_gates, alpha[..., 1:] * routed_gates], dim=-1)
    return gates, router_stats


def query_norm_gates(query: Tensor, shared: int, active: int) -> tuple[Tensor, Tensor | None]:
    """Compute gates and router statistics without parameters, for continue-tuning (MoH §4.4).

    Shared and selected heads have gate 1. The gradient of a selected gate is passed to its score P
    (straight-through estimator, arXiv 1308.3432). If k = E, every head is active: the layer and
    its gradients then equal plain attention.

    Args:
        query: (B, h, N, d), before any rotary embedding (which would not change its norm).
        shared, active: s and k.

    Returns:
        ``(gates, router_stats)`` as :func:`moh_gates`: gates (B, N, h), each exactly 1 or 0, and
        router_stats (2, E).
    """
    logits = query_norm_logits(query, shared)
    ones = logits.new_ones(*logits.shape[:2], shared)
    if active == 0:
        return ones, None
    scores, selected = logits.softmax(-1), select_top(logits, active)  # P, M
    gates = selected
    if active < logits.shape[-1]:
        gates = selected * (1 + (scores - scores.detach()))
    return torch.cat([ones, gates], dim=-1), mean_load_and_score(selected, scores)


def query_norm_logits(query: Tensor, shared: int) -> Tensor:
    """Return ‖q_i‖₂ over its standard deviation among the routed heads, (B, N, E).

    Queries are (B, h, N, d); the result is at least float32. If all norms are equal, the logits are
    equal and the gradients finite.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    norms = torch.linalg.vector_norm(query[:, shared:], dim=-1, dtype=dtype).transpose(1, 2)
    unbiased = norms.shape[-1] > 1
    return norms * (norms.var(-1, keepdim=True, correction=int(unbiased)) + 1e-12).rsqrt()


def select_top(logits: Tensor, active: int) -> Tensor:
    """Return 1 for the ``active`` highest logits of the last axis, else 0; ties go to the first."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(logits).scatter(-1, order[..., :active], 1.0)


def mean_load_and_score(selected: Tensor, scores: Tensor) -> Tensor:
    """Return router_stats (2, E): the means of M and P (B, N, E) over all tokens."""
    return torch.stack([selected.flatten(0, -2).mean(0), scores.flatten(0, -2).mean(0)])


def load_balance_loss(
    router_stats: Sequence[Tensor], num_active_routed_heads: list[int], published: bool = False
) -> Tensor:
    """Return the mean over routed layers of the load-balance term (MoH eq. 8), a scalar.

    Args:
        router_stats: f and P̄ of each routed layer, (2, E) each. They may be averages over several
            processes or micro-batches.
        num_active_routed_heads: k of each of these layers.
        published: whether to use the published scale ``L_b = E Σ f_i P̄_i``, which is k at even
            routing, so layers with a larger k weigh more. The default ``L_b / k`` is 1 at even
            routing for every layer.
    """
    f, mean_scores = torch.cat(tuple(router_stats), dim=1)  # (ΣE,) each
    # Sum neighbouring layers of equal scale E / k at once: one sum per layer launches hundreds of
    # tiny kernels. torch.compile cannot trace itertools.groupby.
    scales: list[float] = []
    columns: list[int] = []
    for stats, k in zip(router_stats, num_active_routed_heads, strict=True):
        scale = stats.shape[1] / (1 if published else k)
        if not scales or scale != scales[-1]:
            scales.append(scale)
            columns.append(0)
        columns[-1] += stats.shape[1]
    products = (f * mean_scores).split(columns)
    terms = [scale * part.sum() for scale, part in zip(scales, products, strict=True)]
    return torch.stack(terms).sum() / len(router_stats)


def check_head_plan(
    dim: int, num_heads: int, shared: int | None, active: int | None, head_dim: int | None
) -> None:
    """Raise ``UserError`` unless the numbers of heads of one layer are consistent."""
    if num_heads < 1:
        raise UserError(f"num_heads is {num_heads}; a layer needs at least one head")
    if head_dim is None and dim % num_heads:
        raise UserError(f"width {dim} is not divisible by num_heads {num_heads}; set head_dim")
    if head_dim is not None and head_dim < 1:
        raise UserError(f"head_dim is {head_dim}; it must be at least 1")
    if shared is None:
        if active:
            raise UserError(
                f"num_active_routed_heads is {active} but num_shared_heads is not set; "
                "give num_shared_heads (0 for none), or neither for dense attention"
            )
        return
    active = active or 0
    if not 0 <= shared <= num_heads:
        raise UserError(f"num_shared_heads is {shared}; it must lie in 0 … num_heads ({num_heads})")
    if not 0 <= active <= num_heads - shared:
        raise UserError(
            f"num_active_routed_heads is {active}, but {num_heads} heads with {shared} shared "
            f"leave {num_heads - shared} to route over"
        )
    if active == 0 and shared < num_heads:
        raise UserError(
            f"num_active_routed_heads is 0 with {num_heads - shared} routed heads, which no token "
            f"could ever use; set num_shared_heads to {num_heads} or activate at least one"
        )
