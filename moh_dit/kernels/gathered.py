"""Compute attention on CPUs, routed heads only for the tokens that selected them."""

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
    """Compute the gated attention output (B, N, h·d) without the unselected queries.

    Shared heads are computed by dense attention. For each routed head of an image, the selected
    queries are gathered, attended and scattered back. All routed heads of an image are padded to
    the longest list, so the time depends on the most selected head.

    Args:
        query: (B, h, N, d).
        key, value: (B, h, M, d).
        gates: (B, N, h), zero where a head is not selected.
        shared: number of shared heads; they come first.
        mask: attention mask of torch, broadcastable to (B, h, N, M).
        is_causal: torch's flag of causal attention; requires N = M.
    """
    batch, heads, tokens, width = query.shape
    gates = gates.transpose(1, 2).to(query.dtype)  # (B, h, N)
    # Split instead of slicing: the gradient of a split is a single concatenation.
    (query0, query), (key0, key), (value0, value), (gates0, gates) = (
        tensor.split([shared, heads - shared], dim=1) for tensor in (query, key, value, gates)
    )
    mask0 = None
    if is_causal:  # shared heads keep the flag, which is faster than a mask
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
        # A stable sort puts the selected tokens first and keeps their order.
        slots = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :longest]
        rows = slots.unsqueeze(-1).expand(-1, -1, -1, width)
        if mask is not None:
            mask = mask.gather(2, slots.unsqueeze(-1).expand(-1, -1, -1, key.shape[2]))
        some = F.scaled_dot_product_attention(query.gather(2, rows), key, value, mask)
        # Shorter lists are padded with unselected tokens. Their gate is 0, so they write zeros.
        some = some * gates.gather(2, slots).unsqueeze(-1)
        output[:, :, shared:].scatter_(1, rows.transpose(1, 2), some.transpose(1, 2))
    return output.flatten(2)
