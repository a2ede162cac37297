"""Compute the gradients of queries, keys, values and gates by Triton kernels.

Conventions are those of :mod:`.triton_forward`. There are two passes, one over tiles of queries and
one over tiles of keys, instead of a single pass with atomic additions. This costs a little more
arithmetic and gives the same bits in every run.
"""

import triton
import triton.language as tl

from .triton_forward import load_head_rows, load_rows, store_rows, zero_unselected


@triton.jit
def _query_gradient_tile(
    projected, kv0, kv1, grad_out, out, gates, lse, delta, index, grad_projected, limit, tile, b,
    head, N, scale, scale_log2,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, STRIDE: tl.constexpr,
    EVEN_KEYS: tl.constexpr, MASKED: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    slots = tile * BM + tl.arange(0, BM)
    valid = slots < limit
    rows = tl.load(index + slots, mask=valid, other=0) if GATHER else slots
    query = projected + b.to(tl.int64) * N * STRIDE + head * D
    upstream = grad_out + b.to(tl.int64) * N * (H * D) + head * D
    q0 = load_rows(query, rows, valid, STRIDE, 0, D0, D, MASKED)
    y0 = load_rows(upstream, rows, valid, H * D, 0, D0, D, MASKED)
    if D1 > 0:
        q1 = load_rows(query, rows, valid, STRIDE, D0, D1, D, MASKED)
        y1 = load_rows(upstream, rows, valid, H * D, D0, D1, D, MASKED)
    row_of = (b * H + head).to(tl.int64) * N
    norm = tl.load(lse + row_of + rows, mask=valid, other=float("inf"))[:, None]
    # δ = Σ dy·o is the row sum of FlashAttention's backward pass. ``out`` holds g·o.
    result = out + b.to(tl.int64) * N * (H * D) + head * D
    o0 = load_rows(result, rows, valid, H * D, 0, D0, D, MASKED)
    sums = tl.sum(o0.to(tl.float32) * y0.to(tl.float32), 1)
    if D1 > 0:
        o1 = load_rows(result, rows, valid, H * D, D0, D1, D, MASKED)
        sums += tl.sum(o1.to(tl.float32) * y1.to(tl.float32), 1)
    gate = tl.load(gates + row_of + rows, mask=valid, other=0.0)
    shift = tl.where(gate != 0.0, sums / gate, 0.0)
    tl.store(delta + row_of + rows, shift, mask=valid)
    shift = shift[:, None]

    dq0 = tl.zeros([BM, D0], tl.float32)
    if D1 > 0:
        dq1 = tl.zeros([BM, D1], tl.float32)
    keys = tl.arange(0, BN)
    key = query + H * D
    value = key + H * D
    for start in tl.range(0, N, BN):
        inside = start + keys < N
        k0 = load_head_rows(
            kv0, key, b, start, H + head, keys, inside, STRIDE, 0, D0, D, BN, not EVEN_KEYS, TMA
        )
        v0 = load_head_rows(
            kv0, value, b, start, 2 * H + head, keys, inside, STRIDE, 0, D0, D, BN, not EVEN_KEYS,
            TMA,
        )  # fmt: skip
        s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        dp = tl.dot(y0, tl.trans(v0), input_precision=PRECISION)
        if D1 > 0:
            k1 = load_head_rows(
                kv1, key, b, start, H + head, keys, inside, STRIDE, D0, D1, D, BN, not EVEN_KEYS,
                TMA,
            )  # fmt: skip
            v1 = load_head_rows(
                kv1, value, b, start, 2 * H + head, keys, inside, STRIDE, D0, D1, D, BN,
                not EVEN_KEYS, TMA,
            )  # fmt: skip
            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
            dp = tl.dot(y1, tl.trans(v1), dp, input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - norm)
        if not EVEN_KEYS:  # beyond N, k is zero but p may be infinite
            p = tl.where(inside[None, :], p, 0.0)
        ds = (p * (dp - shift)).to(projected.dtype.element_ty)
        dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
        if D1 > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)

    target = grad_projected + b.to(tl.int64) * N * STRIDE + head * D
    store_rows(target, rows, valid, dq0 * scale, STRIDE, 0, D0, D, MASKED)
    if D1 > 0:
        store_rows(target, rows, valid, dq1 * scale, STRIDE, D0, D1, D, MASKED)


@triton.jit
def query_gradient(
    projected, kv0, kv1, grad_out, out, gates, lse, delta, index, count, grad_projected, N, scale,
    scale_log2,
    H: tl.constexpr, S: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    STRIDE: tl.constexpr, EVEN_KEYS: tl.constexpr, EVEN_QUERIES: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BM_ROUTED: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Compute dq and δ (B, h, N) of selected queries; dq of others is zero. Grid as `attend`."""
    pid = tl.program_id(0)
    b = tl.program_id(1)
    tiles = tl.cdiv(N, BM)
    if pid < S * tiles:
        _query_gradient_tile(
            projected, kv0, kv1, grad_out, out, gates, lse, delta, index, grad_projected, N,
            pid % tiles, b, pid // tiles, N, scale, scale_log2,
            H, D, D0, D1, STRIDE, EVEN_KEYS, not EVEN_QUERIES, False, PRECISION, TMA, BM, BN,
        )  # fmt: skip
    elif S < H:
        routed_tiles = tl.cdiv(N, BM_ROUTED)
        routed = (pid - S * tiles) // routed_tiles
        tile = (pid - S * tiles) % routed_tiles
        list_of = b * (H - S) + routed
        limit = tl.load(count + list_of)
        zero_unselected(
            gates + (b * H + S + routed).to(tl.int64) * N,
            grad_projected + b.to(tl.int64) * N * STRIDE + (S + routed) * D, tile, N,
            STRIDE, D, D0, D1, BM_ROUTED,
        )  # fmt: skip
        if tile * BM_ROUTED < limit:
            _query_gradient_tile(
                projected, kv0, kv1, grad_out, out, gates, lse, delta,
                index + list_of.to(tl.int64) * N, grad_projected, limit, tile, b, S + routed, N,
                scale, scale_log2,
                H, D, D0, D1, STRIDE, EVEN_KEYS, True, True, PRECISION, TMA, BM_ROUTED, BN,
            )  # fmt: skip


@triton.jit
def _key_value_gradient_tile(
    projected, q0_blocks, q1_blocks, y0_blocks, y1_blocks, lse_blocks, delta_blocks, grad_out, lse,
    delta, index, grad_projected, limit, tile, b, head, N, scale, scale_log2,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, STRIDE: tl.constexpr,
    EVEN_KEYS: tl.constexpr, MASKED: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    keys = tile * BN + tl.arange(0, BN)
    inside = keys < N
    query = projected + b.to(tl.int64) * N * STRIDE + head * D
    upstream = grad_out + b.to(tl.int64) * N * (H * D) + head * D
    k0 = load_rows(query + H * D, keys, inside, STRIDE, 0, D0, D, not EVEN_KEYS)
    v0 = load_rows(query + 2 * H * D, keys, inside, STRIDE, 0, D0, D, not EVEN_KEYS)
    dk0 = tl.zeros([BN, D0], tl.float32)
    dv0 = tl.zeros([BN, D0], tl.float32)
    if D1 > 0:
        k1 = load_rows(query + H * D, keys, inside, STRIDE, D0, D1, D, not EVEN_KEYS)
        v1 = load_rows(query + 2 * H * D, keys, inside, STRIDE, D0, D1, D, not EVEN_KEYS)
        dk1 = tl.zeros([BN, D1], tl.float32)
        dv1 = tl.zeros([BN, D1], tl.float32)
    row_of = (b * H + head).to(tl.int64) * N
    offsets = tl.arange(0, BM)
    BLOCKS: tl.constexpr = TMA and not GATHER
    for start in tl.range(0, limit, BM):
        slots = start + offsets
        valid = slots < limit
        if GATHER:
            rows = tl.load(index + slots, mask=valid, other=0)
            origin = 0
        else:
            rows = offsets
            origin = start
        q0 = load_head_rows(
            q0_blocks, query, b, origin, head, rows, valid, STRIDE, 0, D0, D, BM, MASKED, BLOCKS
        )  # fmt: skip
        y0 = load_head_rows(
            y0_blocks, upstream, b, origin, head, rows, valid, H * D, 0, D0, D, BM, MASKED, BLOCKS
        )  # fmt: skip
        if BLOCKS:  # beyond N, q, dy, lse and δ are zero, so they add nothing
            norm = lse_blocks.load([b, head, start]).reshape(1, BM)
            shift = delta_blocks.load([b, head, start]).reshape(1, BM)
        elif MASKED:  # beyond the list, lse is infinite and p = exp2(-inf) = 0
            norm = tl.load(lse + row_of + origin + rows, mask=valid, other=float("inf"))[None, :]
            shift = tl.load(delta + row_of + origin + rows, mask=valid, other=0.0)[None, :]
        else:
            norm = tl.load(lse + row_of + origin + rows)[None, :]
            shift = tl.load(delta + row_of + origin + rows)[None, :]
        s = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)
        dp = tl.dot(v0, tl.trans(y0), input_precision=PRECISION)
        if D1 > 0:
            q1 = load_head_rows(
                q1_blocks, query, b, origin, head, rows, valid, STRIDE, D0, D1, D, BM, MASKED,
                BLOCKS,
            )  # fmt: skip
            y1 = load_head_rows(
                y1_blocks, upstream, b, origin, head, rows, valid, H * D, D0, D1, D, BM, MASKED,
                BLOCKS,
            )  # fmt: skip
            s = tl.dot(k1, tl.trans(q1), s, input_precision=PRECISION)
            dp = tl.dot(v1, tl.trans(y1), dp, input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - norm)
        ds = (p * (dp - shift)).to(projected.dtype.element_ty)
        p = p.to(projected.dtype.element_ty)
        dv0 = tl.dot(p, y0, dv0, input_precision=PRECISION)
        dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
        if D1 > 0:
            dv1 = tl.dot(p, y1, dv1, input_precision=PRECISION)
            dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)

    dk = grad_projected + b.to(tl.int64) * N * STRIDE + H * D + head * D
    dv = dk + H * D
    store_rows(dk, keys, inside, dk0 * scale, STRIDE, 0, D0, D, not EVEN_KEYS)
    store_rows(dv, keys, inside, dv0, STRIDE, 0, D0, D, not EVEN_KEYS)
    if D1 > 0:
        store_rows(dk, keys, inside, dk1 * scale, STRIDE, D0, D1, D, not EVEN_KEYS)
        store_rows(dv, keys, inside, dv1, STRIDE, D0, D1, D, not EVEN_KEYS)


@triton.jit
def key_value_gradient(
    projected, q0_blocks, q1_blocks, y0_blocks, y1_blocks, lse_blocks, delta_blocks, grad_out, lse,
    delta, index, count, grad_projected, N, scale, scale_log2,
    H: tl.constexpr, S: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    STRIDE: tl.constexpr, EVEN_KEYS: tl.constexpr, EVEN_QUERIES: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BM_ROUTED: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of every key from the selected queries. Grid (H·⌈N/BN⌉, B)."""
    pid = tl.program_id(0)
    b = tl.program_id(1)
    tiles = tl.cdiv(N, BN)
    head = pid // tiles
    if head < S:
        _key_value_gradient_tile(
            projected, q0_blocks, q1_blocks, y0_blocks, y1_blocks, lse_blocks, delta_blocks,
            grad_out, lse, delta, index, grad_projected, N, pid % tiles, b, head,
            N, scale, scale_log2,
            H, D, D0, D1, STRIDE, EVEN_KEYS, not EVEN_QUERIES, False, PRECISION, TMA, BM, BN,
        )  # fmt: skip
    elif S < H:
        list_of = b * (H - S) + head - S
        limit = tl.load(count + list_of)
        _key_value_gradient_tile(
            projected, q0_blocks, q1_blocks, y0_blocks, y1_blocks, lse_blocks, delta_blocks,
            grad_out, lse, delta, index + list_of.to(tl.int64) * N,
            grad_projected, limit, pid % tiles, b, head, N, scale, scale_log2,
            H, D, D0, D1, STRIDE, EVEN_KEYS, True, True, PRECISION, TMA, BM_ROUTED, BN,
        )  # fmt: skip
