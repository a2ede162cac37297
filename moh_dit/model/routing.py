"""Which heads a token uses and with what weight: gates, their statistics, the load-balance loss.

MoH (arXiv 2410.11842) §3, and §4.4 for the router without parameters. Of h heads the first s are
shared, the other E = h - s routed, of which each token activates its top k.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.errors import UserError

ROUTERS = ("learned", "query_norm")


def moh_gates(logits: Tensor, heads: int, shared: int, active: int) -> tuple[Tensor, Tensor | None]:
    """Gates and routing statistics (MoH §3) from router logits.

    Args:
        logits: (B, N, ≥ h, or h + 2 where there are shared and routed heads), columns W_shared x,
            W_routed x, W_stage x; whatever follows is ignored.
        heads, shared: h and s.
        active: routed heads k that each token activates, 0 for none. Of equal scores the lowest
            head wins, in every backend.

    Returns:
        ``gates`` (B, N, h), at least float32, zero where a head is not selected, with mean 1
        over the shared and over the active routed heads (twice that share of α where both
        exist); ``router_stats`` (2, E): the share f of tokens that selected each routed head
        and its mean score P̄ (the gradient flows through P̄ alone), ``None`` without routed
        heads. Both are batch means, so processes of equal batch size average them.
    """
    # Softmax in bf16 would quantise the gates to 8 bits: at least float32 from here.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))

    shared_gates = routed_gates = router_stats = None
    if shared > 0:
        shared_gates = shared * logits[..., :shared].softmax(-1)  # S
    if active > 0:
        scores = logits[..., shared:heads].softmax(-1)  # P
        selected = select(logits[..., shared:heads], active)  # M
        kept = scores * selected
        routed_gates = active * kept / kept.sum(-1, keepdim=True)  # R; the sum is at least 1/E
        router_stats = load_and_score(selected, scores)

    if shared_gates is None:
        assert routed_gates is not None
        return routed_gates, router_stats
    if routed_gates is None:
        return shared_gates, router_stats
    alpha = 2 * logits[..., heads : heads + 2].softmax(-1)  # two-stage α
    gates = torch.cat([alpha[..., :1] * shared_gates, alpha[..., 1:] * routed_gates], dim=-1)
    return gates, router_stats


def query_norm_gates(query: Tensor, shared: int, active: int) -> tuple[Tensor, Tensor | None]:
    """Gates and routing statistics without parameters, for continue-tuning (MoH §4.4).

    Shared and selected heads have the gate 1. That of a selected one passes its gradient on to the
    score P as if the gate were P (straight-through, arXiv 1308.3432), but for k = E, where nothing
    was selected: there the layer and its gradients are those of plain attention.

    Args:
        query: (B, h, N, d), before any rotation (which would not change its norm).
        shared, active: s and k.

    Returns:
        As :func:`moh_gates`: gates (B, N, h), exactly 1 or 0, and router_stats (2, E).
    """
    logits = query_norm_logits(query, shared)
    ones = logits.new_ones(*logits.shape[:2], shared)
    if active == 0:
        return ones, None
    scores, selected = logits.softmax(-1), select(logits, active)  # P, M
    gates = selected
    if active < logits.shape[-1]:
        gates = selected * (1 + (scores - scores.detach()))
    return torch.cat([ones, gates], dim=-1), load_and_score(selected, scores)


def query_norm_logits(query: Tensor, shared: int) -> Tensor:
    """‖q_i‖₂ of queries (B, h, N, d) over its standard deviation among the routed heads (B, N, E).

    At least float32. Heads of equal norm have equal logits, and finite gradients.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    norms = torch.linalg.vector_norm(query[:, shared:], dim=-1, dtype=dtype).transpose(1, 2)
    unbiased = norms.shape[-1] > 1
    return norms * (norms.var(-1, keepdim=True, correction=int(unbiased)) + 1e-12).rsqrt()


def select(logits: Tensor, active: int) -> Tensor:
    """One for the ``active`` highest of the last axis, else zero; of equal ones the lowest wins."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(logits).scatter(-1, order[..., :active], 1.0)


def load_and_score(selected: Tensor, scores: Tensor) -> Tensor:
    """router_stats (2, E): means over all tokens of M and P (B, N, E)."""
    return torch.stack([selected.flatten(0, -2).mean(0), scores.flatten(0, -2).mean(0)])


def load_balance_loss(
    router_stats: Sequence[Tensor], num_active_routed_heads: list[int], published: bool = False
) -> Tensor:
    """Mean over routed layers of the load-balance term (MoH eq. 8), as a scalar.

    Args:
        router_stats: (2, E) of each routed layer, f and P̄, averaged over as large a batch as the
            caller likes (all processes, all micro-steps).
        num_active_routed_heads: k of the same layers.
        published: the published scale, ``L_b = E Σ f_i P̄_i``, which is k at even routing, so that
            layers of different k weigh differently. Default: ``L_b / k``, 1 at even routing
            whatever the mix.
    """
    f, mean_scores = torch.cat(tuple(router_stats), dim=1)  # (ΣE,) each
    # Neighbours of one scale E / k are summed at once: a sum per layer is hundreds of tiny kernels.
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
    """Raise ``UserError`` unless one layer's heads add up."""
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
