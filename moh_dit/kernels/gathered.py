"""CPU: shared heads in one dense attention, routed heads over the queries that selected them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    shared: int,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Gated attention output (B, N, h·d) that leaves unselected queries uncomputed.

    Args:
        query, key, value: (B, h, N, d), of keys and values (B, h, M, d).
        gates: (B, N, h), zero where a head is not selected.
        shared: heads 0 … shared-1 are computed for every token.
        mask, is_causal: one of torch's masks, broadcastable to (B, h, N, M), or its flag (N = M).

    The lists of an image's routed heads are padded to the longest among them, so time follows the
    busiest head.
    """
    batch, heads, tokens, width = query.shape
    gates = gates.transpose(1, 2).to(query.dtype)  # (B, h, N)
    # Split, not sliced: the gradient of a split is one concatenation.
    (query0, query), (key0, key), (value0, value), (gates0, gates) = (
        tensor.split([shared, heads - shared], dim=1) for tensor in (query, key, value, gates)
    )
    mask0 = None
    if is_causal:  # the shared heads keep the flag, which is faster than a mask
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
        mask = mask.expand(batch, heads - shared, -1, -1)
    elif mask is not None:
        mask = mask.expand(batch, heads, tokens, key.shape[2])
        mask0, mask = mask.split([shared, heads - shared], dim=1)
    output = query.new_zeros(batch, tokens, heads, width)
    if shared:
        dense = F.scaled_dot_product_attention(query0, key0, value0, mask0, is_causal=is_causal)
        output[:, :, :shared] = (dense * gates0.unsqueeze(-1)).transpose(1, 2)
    if shared < heads:
        chosen = gates.detach() != 0
        longest = max(1, int(chosen.sum(-1).max()))
        # Selected tokens first, in token order (stable), each list cut at the longest.
        slots = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :longest]
        rows = slots.unsqueeze(-1).expand(-1, -1, -1, width)
        if mask is not None:
            mask = mask.gather(2, slots.unsqueeze(-1).expand(-1, -1, -1, key.shape[2]))
        some = F.scaled_dot_product_attention(query.gather(2, rows), key, value, mask)
        # Beyond a head's own list stand unselected tokens, whose gate makes them write zeros.
        some = some * gates.gather(2, slots).unsqueeze(-1)
        output[:, :, shared:].scatter_(1, rows.transpose(1, 2), some.transpose(1, 2))
    return output.flatten(2)
