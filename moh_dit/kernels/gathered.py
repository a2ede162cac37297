"""CPU: shared heads in one dense attention, routed heads over the queries that selected them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_gathered(
    query: Tensor, key: Tensor, value: Tensor, gates: Tensor, shared: int
) -> Tensor:
    """Gated attention output (B, N, h·d) that leaves unselected queries uncomputed.

    Args:
        query, key, value: (B, h, N, d).
        gates: (B, N, h), zero where a head is not selected.
        shared: heads 0 … shared-1 are computed for every token.

    The lists of an image's routed heads are padded to the longest among them, so time follows the
    busiest head.
    """
    batch, heads, tokens, width = query.shape
    gates = gates.transpose(1, 2)  # (B, h, N)
    parts = []
    if shared:
        dense = F.scaled_dot_product_attention(
            query[:, :shared], key[:, :shared], value[:, :shared]
        )
        parts.append(dense * gates[:, :shared].to(dense.dtype).unsqueeze(-1))
    if shared < heads:
        routed = gates[:, shared:]
        chosen = routed.detach() != 0
        longest = max(1, int(chosen.sum(-1).max()))
        # Selected tokens first, in token order (stable), each list cut at the longest.
        slots = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :longest]
        rows = slots.unsqueeze(-1).expand(-1, -1, -1, width)
        some = F.scaled_dot_product_attention(
            query[:, shared:].gather(2, rows), key[:, shared:], value[:, shared:]
        )
        some = some * routed.gather(2, slots).to(some.dtype).unsqueeze(-1)
        # Beyond a head's own list stand unselected tokens, whose gate makes them write zeros.
        empty = some.new_zeros(batch, heads - shared, tokens, width)
        parts.append(empty.scatter(2, rows, some))
    return torch.cat(parts, dim=1).transpose(1, 2).flatten(2)
