"""Triton kernel: attention of the selected queries over so few keys that they stay where they are.

As :func:`.triton_forward.attend`, for N up to a few hundred. There every tile of a head's queries
fetches the same keys and values. Here a program fetches them once and takes ``SPAN`` tiles of
queries in turn; with all scores of a row at hand, its softmax needs one pass.
"""

import triton
import triton.language as tl

from .triton_forward import (
    load_block,
    load_rows,
    mean_statistics,
    store_rows,
    wait_for_previous,
    zero_unselected,
)


@triton.jit
def _attend_tiles(
    projected,
    kv0,
    kv1,
    gates,
    index,
    out,
    lse,
    limit,
    first,
    b,
    head,
    N,
    scale_log2,
    H: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V1: tl.constexpr,
    STRIDE: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    EARLY: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Tiles first … first+SPAN-1 of one head's ``limit`` queries over its N ≤ BN keys."""
    query = projected + b.to(tl.int64) * N * STRIDE + head * D
    key = query + H * D
    value = key + H * D
    keys = tl.arange(0, BN)
    inside = keys < N
    k0 = load_block(
        kv0, key, b, 0, H + head, keys, inside, STRIDE, 0, D0, D, BN, not EVEN_KEYS, TMA
    )
    v0 = load_block(
        kv0, value, b, 0, 2 * H + head, keys, inside, STRIDE, 0, D0, D, BN, not EVEN_KEYS, TMA
    )
    if D1 > 0:
        k1 = load_block(
            kv1, key, b, 0, H + head, keys, inside, STRIDE, D0, D1, D, BN, not EVEN_KEYS, TMA
        )
        v1 = load_block(
            kv1, value, b, 0, 2 * H + head, keys, inside, STRIDE, D0, V1, D, BN, not EVEN_KEYS, TMA
        )
    row_of = (b * H + head).to(tl.int64) * N
    target = out + b.to(tl.int64) * N * (H * D) + head * D
    last = tl.minimum(first + SPAN, tl.cdiv(limit, BM))
    for tile in tl.range(first, last, num_stages=1):
        slots = tile * BM + tl.arange(0, BM)
        valid = slots < limit
        rows = tl.load(index + slots, mask=valid, other=0) if GATHER else slots
        q0 = load_rows(query, rows, valid, STRIDE, 0, D0, D, MASKED)
        s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if D1 > 0:
            q1 = load_rows(query, rows, valid, STRIDE, D0, D1, D, MASKED)
            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
        if not EVEN_KEYS:
            s = tl.where(inside[None, :], s, float("-inf"))
        m = tl.max(s, 1) * scale_log2
        p = tl.exp2(s * scale_log2 - m[:, None])
        total = tl.sum(p, 1)
        p = p.to(projected.dtype.element_ty)
        acc0 = tl.dot(p, v0, input_precision=PRECISION)
        wait_for_previous(EARLY)  # shared heads have not needed routing until here
        gate = tl.load(gates + row_of + rows, mask=valid, other=0.0)
        tl.store(lse + row_of + rows, m + tl.log2(total) - tl.log2(gate), mask=valid)
        gate = gate / total
        store_rows(target, rows, valid, acc0 * gate[:, None], H * D, 0, D0, D, MASKED)
        if D1 > 0:
            acc1 = tl.dot(p, v1, input_precision=PRECISION)
            store_rows(target, rows, valid, acc1 * gate[:, None], H * D, D0, V1, D, MASKED)


@triton.jit
def attend_short(
    projected,
    kv0,
    kv1,
    gates,
    index,
    count,
    out,
    lse,
    image_stats,
    stats,
    N,
    scale_log2,
    H: tl.constexpr,
    S: tl.constexpr,
    E_PAD: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V1: tl.constexpr,
    STRIDE: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    EVEN_QUERIES: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    EARLY: tl.constexpr,
    BM: tl.constexpr,
    BM_ROUTED: tl.constexpr,
    BN: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Gated attention. Grid (S·⌈N/(SPAN·BM)⌉ + E·⌈N/(SPAN·BM_ROUTED)⌉, B)."""
    pid = tl.program_id(0)
    b = tl.program_id(1)
    spans = tl.cdiv(N, SPAN * BM)
    if pid < S * spans:
        _attend_tiles(
            projected, kv0, kv1, gates, index, out, lse, N, pid % spans * SPAN, b, pid // spans, N,
            scale_log2,
            H, D, D0, D1, V1, STRIDE, EVEN_KEYS, not EVEN_QUERIES, False, PRECISION, TMA, EARLY,
            BM, BN, SPAN,
        )  # fmt: skip
    elif S < H:
        wait_for_previous(EARLY)
        routed_spans = tl.cdiv(N, SPAN * BM_ROUTED)
        routed = (pid - S * spans) // routed_spans
        first = (pid - S * spans) % routed_spans * SPAN
        list_of = b * (H - S) + routed
        limit = tl.load(count + list_of)
        for tile in tl.range(first, first + SPAN, num_stages=1):
            zero_unselected(
                gates + (b * H + S + routed).to(tl.int64) * N,
                out + b.to(tl.int64) * N * (H * D) + (S + routed) * D, tile, N,
                H * D, D, D0, D1, BM_ROUTED,
            )  # fmt: skip
        if first * BM_ROUTED < limit:
            _attend_tiles(
                projected, kv0, kv1, gates, index + list_of.to(tl.int64) * N, out, lse, limit,
                first, b, S + routed, N, scale_log2,
                H, D, D0, D1, V1, STRIDE, EVEN_KEYS, True, True, PRECISION, TMA, False,
                BM_ROUTED, BN, SPAN,
            )  # fmt: skip
    mean_statistics(image_stats, stats, H, S, E_PAD)
