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
    gates = gates.transpose(1, 2).to(query.dtype)  # (B, h, N)
    # Split, not sliced: the gradient of a split is one concatenation.
    (query0, query), (key0, key), (value0, value), (gates0, gates) = (
        tensor.split([shared, heads - shared], dim=1) for tensor in (query, key, value, gates)
    )
    output = query.new_zeros(batch, tokens, heads, width)
    if shared:
        dense = F.scaled_dot_product_attention(query0, key0, value0)
        output[:, :, :shared] = (dense * gates0.unsqueeze(-1)).transpose(1, 2)
    if shared < heads:
        chosen = gates.detach() != 0
        longest = max(1, int(chosen.sum(-1).max()))
        # Selected tokens first, in token order (stable), each list cut at the longest.
        slots = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :longest]
        rows = slots.unsqueeze(-1).expand(-1, -1, -1, width)
        some = F.scaled_dot_product_attention(query.gather(2, rows), key, value)
        # Beyond a head's own list stand unselected tokens, whose gate makes them write zeros.
        some = some * gates.gather(2, slots).unsqueeze(-1)
        output[:, :, shared:].scatter_(1, rows.transpose(1, 2), some.transpose(1, 2))
    return output.flatten(2)
