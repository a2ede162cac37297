"""Compute softmax attention of the selected (token, head) pairs by Triton kernels.

Tensors are described in :mod:`.attention_operators`. Queries, keys and values are read directly
from the output of the projection, in rows that are ``STRIDE`` apart. The columns of a head are
split into ``D0``, a power of two, and ``D1``, the padded tail (72 = 64 + 8, instead of padding to
128). All strides are compile-time constants: 72 is not a multiple of 16, so with run-time strides
the compiler could not use 16-byte loads. Exponentials are base 2, ``scale_log2 = log2(e)/√d``.

Shared heads read their queries in order, routed heads through the list of selected tokens. There
are no atomic additions, so results are the same in every run. With ``TMA``, consecutive rows are
loaded by the copy engine (descriptors ``kv0`` and ``kv1`` for the two column parts) instead of
through pointers. With ``EARLY``, a kernel starts while the previous one runs (programmatic
dependent launch) and waits for it before it reads its results.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_previous_kernel(EARLY: tl.constexpr):
    """Wait until the previous kernel has finished and its writes are visible."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def allow_next_kernel(EARLY: tl.constexpr):
    """Allow the next kernel to start once every program of this kernel has reached this call."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def load_rows(
    base, rows, valid,
    STRIDE: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Load columns FIRST … FIRST+WIDTH-1 of rows; zero beyond column D and in invalid rows."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * STRIDE + columns[None, :]
    if FIRST + WIDTH > D:
        if MASKED:
            return tl.load(pointers, mask=valid[:, None] & (columns < D)[None, :], other=0.0)
        return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    if MASKED:
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(
    base, rows, valid, values,
    STRIDE: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * STRIDE + columns[None, :]
    values = values.to(base.dtype.element_ty)
    if FIRST + WIDTH > D:
        if MASKED:
            tl.store(pointers, values, mask=valid[:, None] & (columns < D)[None, :])
        else:
            tl.store(pointers, values, mask=(columns < D)[None, :])
    elif MASKED:
        tl.store(pointers, values, mask=valid[:, None])
    else:
        tl.store(pointers, values)


@triton.jit
def load_head_rows(
    descriptor, base, b, start, head, rows, valid,
    STRIDE: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Load rows of one head, by the copy engine (zeros out of bounds) or through pointers."""
    if TMA:
        return descriptor.load([b, start, head, FIRST]).reshape(BLOCK, WIDTH)
    return load_rows(base + start * STRIDE, rows, valid, STRIDE, FIRST, WIDTH, D, MASKED)


@triton.jit
def zero_unselected(
    gates, target, tile, N,
    STRIDE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Store zeros for those of BM tokens, from tile·BM on, that did not select this head."""
    tokens = tile * BM + tl.arange(0, BM)
    empty = tl.load(gates + tokens, mask=tokens < N, other=1.0) == 0.0
    store_rows(target, tokens, empty, tl.zeros([BM, D0], tl.float32), STRIDE, 0, D0, D, True)
    if D1 > 0:
        store_rows(target, tokens, empty, tl.zeros([BM, D1], tl.float32), STRIDE, D0, D1, D, True)


@triton.jit
def _attend_tile(
    projected, kv0, kv1, gates, index, out, lse, limit, tile, b, head, N, scale_log2,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V1: tl.constexpr,
    STRIDE: tl.constexpr, EVEN_KEYS: tl.constexpr, MASKED: tl.constexpr, GATHER: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, EARLY: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Attend with BM queries of one head to all keys (online softmax), apply the gate, store."""
    slots = tile * BM + tl.arange(0, BM)
    valid = slots < limit
    rows = tl.load(index + slots, mask=valid, other=0) if GATHER else slots
    query = projected + b.to(tl.int64) * N * STRIDE + head * D
    q0 = load_rows(query, rows, valid, STRIDE, 0, D0, D, MASKED)
    q1 = q0  # a placeholder: not used if the head has no tail
    if D1 > 0:
        q1 = load_rows(query, rows, valid, STRIDE, D0, D1, D, MASKED)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc0 = tl.zeros([BM, D0], tl.float32)
    acc1 = tl.zeros([BM, V1], tl.float32)
    keys = tl.arange(0, BN)
    key = query + H * D
    value = key + H * D
    for start in tl.range(0, N, BN):
        inside = start + keys < N
        k0 = load_head_rows(
            kv0, key, b, start, H + head, keys, inside, STRIDE, 0, D0, D, BN, not EVEN_KEYS, TMA
        )  # fmt: skip
        s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if D1 > 0:
            k1 = load_head_rows(
                kv1, key, b, start, H + head, keys, inside, STRIDE, D0, D1, D, BN,
                not EVEN_KEYS, TMA,
            )  # fmt: skip
            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
        if not EVEN_KEYS:
            s = tl.where(inside[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - m_new[:, None])
        rescale = tl.exp2(m - m_new)
        total = total * rescale + tl.sum(p, 1)
        m = m_new
        p = p.to(projected.dtype.element_ty)
        v0 = load_head_rows(
            kv0, value, b, start, 2 * H + head, keys, inside, STRIDE, 0, D0, D, BN,
            not EVEN_KEYS, TMA,
        )  # fmt: skip
        acc0 = tl.dot(p, v0, acc0 * rescale[:, None], input_precision=PRECISION)
        if D1 > 0:
            v1 = load_head_rows(
                kv1, value, b, start, 2 * H + head, keys, inside, STRIDE, D0, V1, D, BN,
                not EVEN_KEYS, TMA,
            )  # fmt: skip
            acc1 = tl.dot(p, v1, acc1 * rescale[:, None], input_precision=PRECISION)

    wait_for_previous_kernel(EARLY)  # shared heads do not need the router until here
    row_of = (b * H + head).to(tl.int64) * N
    gate = tl.load(gates + row_of + rows, mask=valid, other=0.0)
    # The gate is part of lse: exp2(s - lse) is g·p, which is all that the backward pass needs.
    tl.store(lse + row_of + rows, m + tl.log2(total) - tl.log2(gate), mask=valid)
    gate = gate / total
    target = out + b.to(tl.int64) * N * (H * D) + head * D
    store_rows(target, rows, valid, acc0 * gate[:, None], H * D, 0, D0, D, MASKED)
    if D1 > 0:
        store_rows(target, rows, valid, acc1 * gate[:, None], H * D, D0, V1, D, MASKED)


@triton.jit
def attend(
    projected, kv0, kv1, gates, index, count, out, lse, image_stats, stats, N, scale_log2,
    H: tl.constexpr, S: tl.constexpr, E_PAD: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, V1: tl.constexpr, STRIDE: tl.constexpr, EVEN_KEYS: tl.constexpr,
    EVEN_QUERIES: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, EARLY: tl.constexpr,
    BM: tl.constexpr, BM_ROUTED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute gated attention. Grid (S·⌈N/BM⌉ + E·⌈N/BM_ROUTED⌉, B).

    The first program also averages the router statistics over the batch, which saves a launch.
    """
    pid = tl.program_id(0)
    b = tl.program_id(1)
    tiles = tl.cdiv(N, BM)
    if pid < S * tiles:
        _attend_tile(
            projected, kv0, kv1, gates, index, out, lse, N, pid % tiles, b, pid // tiles, N,
            scale_log2,
            H, D, D0, D1, V1, STRIDE, EVEN_KEYS, not EVEN_QUERIES, False, PRECISION, TMA, EARLY,
            BM, BN,
        )  # fmt: skip
    elif S < H:
        wait_for_previous_kernel(EARLY)
        routed_tiles = tl.cdiv(N, BM_ROUTED)
        routed = (pid - S * tiles) // routed_tiles
        tile = (pid - S * tiles) % routed_tiles
        list_of = b * (H - S) + routed
        limit = tl.load(count + list_of)
        zero_unselected(
            gates + (b * H + S + routed).to(tl.int64) * N,
            out + b.to(tl.int64) * N * (H * D) + (S + routed) * D, tile, N,
            H * D, D, D0, D1, BM_ROUTED,
        )  # fmt: skip
        if tile * BM_ROUTED < limit:
            _attend_tile(
                projected, kv0, kv1, gates, index + list_of.to(tl.int64) * N, out, lse, limit,
                tile, b, S + routed, N, scale_log2,
                H, D, D0, D1, V1, STRIDE, EVEN_KEYS, True, True, PRECISION, TMA, False,
                BM_ROUTED, BN,
            )  # fmt: skip
    if S < H and pid + b == 0:  # this program has waited for the router above
        columns = tl.arange(0, E_PAD)
        inside = columns < 2 * (H - S)
        sums = tl.zeros([E_PAD], tl.float32)
        batch = tl.num_programs(1)
        for first in range(0, batch, 32):
            images = first + tl.arange(0, 32)
            slots = images[:, None] * 2 * (H - S) + columns[None, :]
            mask = (images < batch)[:, None] & inside[None, :]
            sums += tl.sum(tl.load(image_stats + slots, mask=mask, other=0.0), 0)
        tl.store(stats + columns, sums / batch, mask=inside)
