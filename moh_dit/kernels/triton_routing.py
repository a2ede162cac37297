"""Compute gates, lists of selected tokens, router statistics and gradients by Triton kernels.

Tensors are described in :mod:`.attention_operators`. The router logits of a token follow its
queries, keys and values: shared heads, routed heads, then two for the two-stage weights.
"""

import triton
import triton.language as tl

from .triton_forward import allow_next_kernel, wait_for_previous_kernel


@triton.jit
def _router_logits(
    logits, tokens, valid,
    H: tl.constexpr, STRIDE: tl.constexpr, H_PAD: tl.constexpr,
):  # fmt: skip
    """Load logits (tokens, H_PAD) of shared and routed heads; padded heads are zero."""
    heads = tl.arange(0, H_PAD)
    return tl.load(
        logits + tokens[:, None] * STRIDE + heads[None, :],
        mask=valid[:, None] & (heads < H)[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _group_softmax(raw, group):
    """Compute the softmax over the columns of a group; other columns are zero."""
    raw = tl.where(group, raw, float("-inf"))
    weights = tl.exp(raw - tl.max(raw, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _centred(values, weights):
    """Compute ``values - Σ weights·values`` along rows of weights that sum to 1.

    The value of the column with the largest weight is subtracted first. This avoids cancellation
    if that weight is almost 1.
    """
    columns = tl.arange(0, weights.shape[1])[None, :]
    heaviest = columns == tl.argmax(weights, 1)[:, None]
    values = values - tl.sum(tl.where(heaviest, values, 0.0), 1)[:, None]
    return values - tl.sum(weights * values, 1)[:, None]


@triton.jit
def _stages(logits, tokens, valid, H: tl.constexpr, STRIDE: tl.constexpr):
    """Compute the two-stage softmax, α₁/2 and α₂/2."""
    l0 = tl.load(logits + tokens * STRIDE + H, mask=valid, other=0.0).to(tl.float32)
    l1 = tl.load(logits + tokens * STRIDE + H + 1, mask=valid, other=0.0).to(tl.float32)
    return 1.0 / (1.0 + tl.exp(l1 - l0)), 1.0 / (1.0 + tl.exp(l0 - l1))


@triton.jit
def route(
    projected, gates, score_sums, N,
    H: tl.constexpr, S: tl.constexpr, K: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr,
    H_PAD: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Compute gates (MoH eq. 5–7) and the sum of P for a tile of tokens. Grid (⌈N/TOKENS⌉, B)."""
    allow_next_kernel(EARLY)
    E: tl.constexpr = H - S
    tile = tl.program_id(0)
    b = tl.program_id(1)
    tokens = tile * TOKENS + tl.arange(0, TOKENS)
    valid = tokens < N
    heads = tl.arange(0, H_PAD)
    logits = projected + b.to(tl.int64) * N * STRIDE + 3 * H * D
    raw = _router_logits(logits, tokens, valid, H, STRIDE, H_PAD)
    gate = tl.zeros([TOKENS, H_PAD], tl.float32)
    if S > 0:
        gate = S * _group_softmax(raw, (heads < S)[None, :])
    if E > 0:
        is_routed = ((heads >= S) & (heads < H))[None, :]
        scores = _group_softmax(raw, is_routed)
        # Top K by repeated maximum; among equal logits, the head with the lowest index is chosen.
        chosen = tl.zeros([TOKENS, H_PAD], tl.int1)
        left = tl.where(is_routed, raw, float("-inf"))
        for _ in tl.static_range(K):
            best = heads[None, :] == tl.argmax(left, 1)[:, None]
            chosen = chosen | best
            left = tl.where(best, float("-inf"), left)
        kept = tl.where(chosen, scores, 0.0)
        routed_gate = K * kept / tl.sum(kept, 1)[:, None]
        if S > 0:
            first, second = _stages(logits, tokens, valid, H, STRIDE)
            gate = gate * (2 * first)[:, None]
            routed_gate = routed_gate * (2 * second)[:, None]
        # From here on, "selected" means gate != 0, so a selected gate must not underflow to 0.
        gate += tl.where(chosen, tl.maximum(routed_gate, 1e-37), 0.0)
        tl.store(
            score_sums + (b * tl.num_programs(0) + tile) * E + heads - S,
            tl.sum(tl.where(valid[:, None], scores, 0.0), 0),
            mask=(heads >= S) & (heads < H),
        )
    tl.store(
        gates + b.to(tl.int64) * H * N + heads[None, :] * N + tokens[:, None],
        gate,
        mask=valid[:, None] & (heads < H)[None, :],
    )


@triton.jit
def list_tokens(
    gates, score_sums, index, count, stats, N, tiles,
    H: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """List the tokens that selected a routed head, in order; sum f and P̄. Grid (E, B).

    One program per head and image lists its tokens, so no atomic additions are needed.
    """
    allow_next_kernel(EARLY)
    wait_for_previous_kernel(EARLY)
    E: tl.constexpr = H - S
    routed = tl.program_id(0)
    b = tl.program_id(1)
    row = gates + (b * H + S + routed).to(tl.int64) * N
    target = index + (b * E + routed).to(tl.int64) * N
    offsets = tl.arange(0, CHUNK)
    length = tl.zeros([], tl.int32)
    score_sum = tl.zeros([], tl.float32)
    for start in range(0, N, CHUNK):
        tokens = start + offsets
        selected = tl.load(row + tokens, mask=tokens < N, other=0.0) != 0.0
        ones = selected.to(tl.int32)
        tl.store(target + length + tl.cumsum(ones, 0) - 1, tokens, mask=selected)
        length += tl.sum(ones, 0)
    for start in range(0, tiles, CHUNK):
        tile = start + offsets
        sums = tl.load(score_sums + (b * tiles + tile) * E + routed, mask=tile < tiles, other=0.0)
        score_sum += tl.sum(sums, 0)
    tl.store(count + b * E + routed, length)
    tl.store(stats + (b * 2) * E + routed, length.to(tl.float32) / N)
    tl.store(stats + (b * 2 + 1) * E + routed, score_sum / N)


@triton.jit
def route_backward(
    projected, gates, delta, grad_stats, grad_projected, N,
    H: tl.constexpr, S: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr, H_PAD: tl.constexpr,
    TAIL: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the router logits from δ = ∂L/∂g. Grid (⌈N/TOKENS⌉, B).

    Shared heads and selected routed heads are two softmax groups. With the weights w of a group,
    ``dl_i = g_i (δ_i - Σ w δ)``. For the two stages with softmax a,
    ``dl_0 = a_1 Σ_shared g δ - a_0 Σ_routed g δ = -dl_1``. The gradient c of P̄ adds
    ``P_i (c_i - Σ P c)/(B N)``.
    """
    E: tl.constexpr = H - S
    b = tl.program_id(1)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    valid = tokens < N
    heads = tl.arange(0, H_PAD)
    inside = valid[:, None] & (heads < H)[None, :]
    slots = b.to(tl.int64) * H * N + heads[None, :] * N + tokens[:, None]
    gate = tl.load(gates + slots, mask=inside, other=0.0)
    pull = tl.load(delta + slots, mask=inside & (gate != 0.0), other=0.0)

    logits = projected + b.to(tl.int64) * N * STRIDE + 3 * H * D
    target = grad_projected + b.to(tl.int64) * N * STRIDE + 3 * H * D
    raw = _router_logits(logits, tokens, valid, H, STRIDE, H_PAD)
    grad = tl.zeros([TOKENS, H_PAD], tl.float32)
    shared_sum = tl.zeros([TOKENS], tl.float32)
    if S > 0:
        is_shared = (heads < S)[None, :]
        shared_sum = tl.sum(tl.where(is_shared, gate * pull, 0.0), 1)
        weights = _group_softmax(raw, is_shared)
        grad += tl.where(is_shared, gate * _centred(pull, weights), 0.0)
    if E > 0:
        is_routed = ((heads >= S) & (heads < H))[None, :]
        routed_gate = tl.where(is_routed, gate, 0.0)
        weights = routed_gate / tl.maximum(tl.sum(routed_gate, 1), 1e-37)[:, None]
        routed_sum = tl.sum(tl.where(is_routed, gate * pull, 0.0), 1)
        grad += routed_gate * _centred(pull, weights)
        scores = _group_softmax(raw, is_routed)
        balance = tl.load(grad_stats + E + heads - S, mask=(heads >= S) & (heads < H), other=0.0)
        balance = (balance / (tl.num_programs(1) * N))[None, :] + tl.zeros_like(scores)
        grad += scores * _centred(balance, scores)
        if S > 0:
            first, second = _stages(logits, tokens, valid, H, STRIDE)
            stage = second * shared_sum - first * routed_sum
            slot = target + tokens * STRIDE + H
            tl.store(slot, stage.to(target.dtype.element_ty), mask=valid)
            tl.store(slot + 1, (-stage).to(target.dtype.element_ty), mask=valid)
    tl.store(
        target + tokens[:, None] * STRIDE + heads[None, :],
        grad.to(target.dtype.element_ty),
        mask=inside,
    )
    USED: tl.constexpr = H + 2 if (S > 0 and E > 0) else H
    PAD: tl.constexpr = STRIDE - 3 * H * D - USED
    if PAD > 0:
        pad = tl.arange(0, TAIL)
        tl.store(
            target + tokens[:, None] * STRIDE + (USED + pad)[None, :],
            tl.zeros([TOKENS, TAIL], target.dtype.element_ty),
            mask=valid[:, None] & (pad < PAD)[None, :],
        )
