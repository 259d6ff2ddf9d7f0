"""Triton kernels for ELA's kernels of distance and of direction, forward and backward; which one is their parameter.

Keys and values are summed about origins, the means of a sample of tokens from all over the head, so that what tokens
have in common is not subtracted from large sums. From the sums, :func:`_finished` has the moments of a head about its
means, and queries read those as a correction of the mean value v'.

Distance, for keys g of mean m, ``g - m = n``: :mod:`visionattn.ops.distance`,

    y = v' + (2 a.C + u) / (|a|^2 + s + EPSILON),   a = q + m.

Direction, for unit vectors a of queries and b of keys, weights ``w = |k|^2 + 1`` and weighted means v' and b',

    y = v' + a.C / (1 + a.b'),   C = sum_j w_j (b_j - b') (v_j - v')^T / sum_j w_j,

which is what :mod:`visionattn.ops.signed` computes with ``w b`` and w for features, with nothing left to cancel in C.

A state is five arrays in one row of memory: C (D, E), m or b' (D,), v' (E,), u (E,) and s, or the sum of w. The same
five are what is summed on the way there, and the gradients of it. All of it is in float32. In the names of shapes, D
and E are the padded widths.

The launches are those of :mod:`visionattn.ops.fused.positive`.
"""

import triton
import triton.language as tl

from visionattn.ops.fused.tiles import arrive, load_mask, load_rows, share, store_rows, wait_for

SUM: tl.constexpr = tl.constexpr(0)
DIFF: tl.constexpr = tl.constexpr(1)
DIRECTION: tl.constexpr = tl.constexpr(2)

EPSILON: tl.constexpr = tl.constexpr(1e-6)
ROUNDING: tl.constexpr = tl.constexpr(1.2e-7)


@triton.jit
def _write(base, place, matrix, row, value, pull, single, D: tl.constexpr, E: tl.constexpr):
    """Store a state."""
    d, e = tl.arange(0, D), tl.arange(0, E)
    base += place.to(tl.int64) * (D * E + D + 2 * E + 16)
    tl.store(base + d[:, None] * E + e[None, :], matrix)
    tl.store(base + D * E + d, row)
    tl.store(base + D * E + D + e, value)
    tl.store(base + D * E + D + E + e, pull)
    tl.store(base + D * E + D + 2 * E, single)


@triton.jit
def _read(base, place, D: tl.constexpr, E: tl.constexpr):
    """Load a state."""
    d, e = tl.arange(0, D), tl.arange(0, E)
    base += place.to(tl.int64) * (D * E + D + 2 * E + 16)
    matrix = tl.load(base + d[:, None] * E + e[None, :])
    row = tl.load(base + D * E + d)
    value = tl.load(base + D * E + D + e)
    pull = tl.load(base + D * E + D + E + e)
    return matrix, row, value, pull, tl.load(base + D * E + D + 2 * E)


@triton.jit
def _joined(parts, head, chunks, D: tl.constexpr, E: tl.constexpr):
    """Add what the chunks of a head left, in their order."""
    matrix, row, value, pull, single = _read(parts, head * chunks, D, E)
    for index in range(1, chunks):
        more, more_row, more_value, more_pull, more_single = _read(parts, head * chunks + index, D, E)
        matrix += more
        row += more_row
        value += more_value
        pull += more_pull
        single += more_single
    return matrix, row, value, pull, single


@triton.jit
def _sample(base, tokens, stride_n, stride_d, WIDTH: tl.constexpr, SAMPLE: tl.constexpr, D: tl.constexpr):
    """Load tokens from all over a head, or all of them, (SAMPLE, D); what is not there is zeros."""
    n, d = tl.arange(0, SAMPLE), tl.arange(0, D)
    places = base + (n * tl.maximum(tokens, SAMPLE) // SAMPLE)[:, None] * stride_n + d[None, :] * stride_d
    return tl.load(places, mask=(n < tokens)[:, None] & (d < WIDTH)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _mean(rows, weight, MASKED: tl.constexpr):
    """Return the weighted mean of a sample; of rows that are equal, exactly. Without any weight it is zero."""
    at, total = tl.arange(0, rows.shape[0]), tl.sum(weight, 0)
    one = 0
    if MASKED:
        one = tl.argmax(weight, 0)
        rows = tl.where((weight > 0)[:, None], rows, 0.0)
        total = tl.where(total > 0, total, 1.0)
    first = tl.sum(tl.where((at == one)[:, None], rows, 0.0), 0)
    return first + tl.sum(weight[:, None] * (rows - first[None, :]), 0) / total


@triton.jit
def _counted(keep, tokens, stride_n, MASKED: tl.constexpr):
    """Return how many tokens are kept, 1 at least, in float32."""
    count = tokens.to(tl.float32)
    if MASKED:
        count = 0.0
        for at in range(0, tokens, 1024):
            count += tl.sum(load_mask(keep, at, tokens, stride_n, 1024).to(tl.float32), 0)
        count = tl.maximum(count, 1.0)
    return count


@triton.jit
def _unit(x):
    """Return ``x / sqrt(|x|^2 + EPSILON)`` and what x was multiplied by."""
    size = tl.rsqrt(tl.sum(x * x, 1) + EPSILON)[:, None]
    return x * size, size


@triton.jit
def _place(x, MAP: tl.constexpr):
    """Return where keys lie: g or b."""
    if MAP == DIRECTION:
        x, _ = _unit(x)
    elif MAP == DIFF:
        x = -x
    return x


@triton.jit
def _origins(k, v, keep, tokens, skn, skd, svn, svd, smn, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
             D: tl.constexpr, E: tl.constexpr, SAMPLE: tl.constexpr, MAP: tl.constexpr,
             MASKED: tl.constexpr):  # fmt: skip
    """Return origins for the keys' places and for the values: weighted means of a sample."""
    x = _sample(k, tokens, skn, skd, WIDTH, SAMPLE, D)
    weight = tl.sum(x * x, 1) + 1 if MAP == DIRECTION else tl.full([SAMPLE], 1.0, tl.float32)
    n = tl.arange(0, SAMPLE)
    weight = tl.where(n < tokens, weight, 0.0)
    if MASKED:
        places = (n * tl.maximum(tokens, SAMPLE) // SAMPLE).to(tl.int64) * smn
        weight = tl.where(tl.load(keep + places, mask=n < tokens, other=0) != 0, weight, 0.0)
    values = _sample(v, tokens, svn, svd, VALUE_WIDTH, SAMPLE, E)
    return _mean(_place(x, MAP), weight, MASKED), _mean(values, weight, MASKED)


@triton.jit
def _gather_block(
    k, v, keep, at, stop, skn, skd, svn, svd, smn, near, origin, matrix, row, value, pull, single,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, MASKED: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add a block of keys and values to the sums."""
    x = load_rows(k, at, stop, skn, skd, WIDTH, BLOCK, D, EDGE).to(tl.float32)
    z = load_rows(v, at, stop, svn, svd, VALUE_WIDTH, BLOCK, E, EDGE).to(tl.float32) - origin[None, :]
    if MASKED:
        inside = load_mask(keep, at, stop, smn, BLOCK)
        x = tl.where(inside[:, None], x, 0.0)
    n = _place(x, MAP) - near[None, :]
    weight = tl.sum(x * x, 1) + 1 if MAP == DIRECTION else tl.sum(n * n, 1)
    if EDGE and not MASKED:
        inside = at + tl.arange(0, BLOCK) < stop
    if EDGE or MASKED:
        n = tl.where(inside[:, None], n, 0.0)
        z = tl.where(inside[:, None], z, 0.0)
        weight = tl.where(inside, weight, 0.0)
    if MAP == DIRECTION:
        n *= weight[:, None]
        value += tl.sum(weight[:, None] * z, 0)
    else:
        value += tl.sum(z, 0)
        pull += tl.sum(weight[:, None] * z, 0)
    matrix = tl.dot(tl.trans(n), z, matrix, input_precision=P)
    return matrix, row + tl.sum(n, 0), value, pull, single + tl.sum(weight, 0)


@triton.jit
def _gather(
    k, v, keep, start, stop, skn, skd, svn, svd, smn, near, origin,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, MASKED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Sum over some tokens, about the origins.

    Distance, ``n = g - near`` and ``z = v - origin``: ``n z^T``, n, z, ``|n|^2 z`` and ``|n|^2``. Direction, for
    ``n = w (b - near)``: ``n z^T``, n, ``w z``, nothing and w.
    """
    matrix = tl.zeros([D, E], tl.float32)
    row = tl.zeros([D], tl.float32)
    value = tl.zeros([E], tl.float32)
    pull = tl.zeros([E], tl.float32)
    single = 0.0
    edge = start + (stop - start) // BLOCK * BLOCK
    for at in tl.range(start, edge, BLOCK, num_stages=STAGES):
        matrix, row, value, pull, single = _gather_block(
            k, v, keep, at, stop, skn, skd, svn, svd, smn, near, origin, matrix, row, value, pull, single,
            WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, MASKED, P, False)  # fmt: skip
    if edge < stop:
        matrix, row, value, pull, single = _gather_block(
            k, v, keep, edge, stop, skn, skd, svn, svd, smn, near, origin, matrix, row, value, pull, single,
            WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, MASKED, P, True)  # fmt: skip
    return matrix, row, value, pull, single


@triton.jit
def _finished(matrix, row, value, pull, single, near, origin, count, MAP: tl.constexpr):
    """Return the state of a head from its sums about the origins."""
    mass = count
    if MAP == DIRECTION:  # no weight is below 1
        single = tl.maximum(single, 1.0)
        mass = single
    row, value = row / mass, value / mass
    matrix = matrix / mass - row[:, None] * value[None, :]
    if MAP != DIRECTION:
        single /= mass
        pull = pull / mass - single * value - 2 * tl.sum(row[:, None] * matrix, 0)
        single = tl.maximum(single - tl.sum(row * row, 0), 0.0)
    return matrix, near + row, origin + value, pull, single


@triton.jit
def _query(x, row, single, MAP: tl.constexpr):
    """Return a of queries (BLOCK, D), the denominator, and what unit vectors were multiplied by."""
    size = 0.0
    if MAP == DIRECTION:
        a, size = _unit(x)
        mass = tl.maximum(1 + tl.sum(a * row[None, :], 1), ROUNDING)
    else:
        a = x + row[None, :]
        mass = tl.sum(a * a, 1) + (single + EPSILON)
    return a, mass[:, None], size


@triton.jit
def _answer_block(
    q, o, at, stop, sqn, sqd, son, matrix, row, value, pull, single,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Read a state by a block of queries."""
    x = load_rows(q, at, stop, sqn, sqd, WIDTH, BLOCK, D, EDGE).to(tl.float32)
    a, mass, _ = _query(x, row, single, MAP)
    apart = tl.dot(a, matrix, input_precision=P)
    if MAP != DIRECTION:
        apart = 2 * apart + pull[None, :]
    store_rows(o, value[None, :] + apart / mass, at, stop, son, VALUE_WIDTH, BLOCK, E, EDGE)


@triton.jit
def _answer(
    q, o, start, stop, sqn, sqd, son, matrix, row, value, pull, single,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, MAP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Read a state by some queries."""
    edge = start + (stop - start) // BLOCK * BLOCK
    for at in tl.range(start, edge, BLOCK, num_stages=STAGES):
        _answer_block(q, o, at, stop, sqn, sqd, son, matrix, row, value, pull, single,
                      WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, P, False)  # fmt: skip
    if edge < stop:
        _answer_block(q, o, edge, stop, sqn, sqd, son, matrix, row, value, pull, single,
                      WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, P, True)  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "fillers", "chunks", "readers"])
def forward(
    q, k, v, keep, o, state, parts, flags,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, smb, smh, smn, sob, soh, son,
    heads, tokens, fillers, chunks, readers,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, SAMPLE: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, SAVE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Attend. Grid: (heads,) if WHOLE, else (heads x (chunks + readers),): the keys of all heads, then the queries."""
    item = tl.program_id(0)
    if WHOLE:
        head, start, stop, answers = item, 0, tokens, False
    else:
        item, head, start, stop, answers = share(item, fillers, chunks, readers, heads, tokens, BLOCK, QUERY_BLOCK)
    b, h = (head // heads).to(tl.int64), head % heads
    q += b * sqb + h * sqh
    k += b * skb + h * skh
    v += b * svb + h * svh
    o += b * sob + h * soh
    if MASKED:
        keep += b * smb + h * smh

    if WHOLE:
        total = _counted(keep, tokens, smn, MASKED)
        near, origin = _origins(k, v, keep, tokens, skn, skd, svn, svd, smn, WIDTH, VALUE_WIDTH, D, E, SAMPLE, MAP,
                                MASKED)  # fmt: skip
        matrix, row, value, pull, single = _gather(
            k, v, keep, start, stop, skn, skd, svn, svd, smn, near, origin,
            WIDTH, VALUE_WIDTH, D, E, BLOCK, STAGES, MAP, MASKED, P)  # fmt: skip
        matrix, row, value, pull, single = _finished(matrix, row, value, pull, single, near, origin, total, MAP)
        if SAVE:
            _write(state, head, matrix, row, value, pull, single, D, E)
        _answer(q, o, start, stop, sqn, sqd, son, matrix, row, value, pull, single,
                WIDTH, VALUE_WIDTH, D, E, QUERY_BLOCK, STAGES, MAP, P)  # fmt: skip
    elif answers:
        wait_for(flags, head, fillers // chunks, chunks, readers)
        matrix, row, value, pull, single = _read(state, head, D, E)
        _answer(q, o, start, stop, sqn, sqd, son, matrix, row, value, pull, single,
                WIDTH, VALUE_WIDTH, D, E, QUERY_BLOCK, STAGES, MAP, P)  # fmt: skip
    else:
        total = _counted(keep, tokens, smn, MASKED)
        near, origin = _origins(k, v, keep, tokens, skn, skd, svn, svd, smn, WIDTH, VALUE_WIDTH, D, E, SAMPLE, MAP,
                                MASKED)  # fmt: skip
        matrix, row, value, pull, single = _gather(
            k, v, keep, start, stop, skn, skd, svn, svd, smn, near, origin,
            WIDTH, VALUE_WIDTH, D, E, BLOCK, STAGES, MAP, MASKED, P)  # fmt: skip
        _write(parts, item, matrix, row, value, pull, single, D, E)
        if arrive(flags + head) == chunks - 1:
            matrix, row, value, pull, single = _joined(parts, head, chunks, D, E)
            matrix, row, value, pull, single = _finished(matrix, row, value, pull, single, near, origin, total, MAP)
            _write(state, head, matrix, row, value, pull, single, D, E)
            arrive(flags + head)


@triton.jit
def _query_gradient_block(
    q, do, dq, at, stop, sqn, sqd, sgn, sgd, sdn, dmatrix, drow, dvalue, dpull, dsingle, matrix, row, pull, single,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a block of queries and add to those of the state."""
    x = load_rows(q, at, stop, sqn, sqd, WIDTH, BLOCK, D, EDGE).to(tl.float32)
    g = load_rows(do, at, stop, sgn, sgd, VALUE_WIDTH, BLOCK, E, EDGE).to(tl.float32)
    a, mass, size = _query(x, row, single, MAP)
    dvalue += tl.sum(g, 0)
    g /= mass
    da = tl.dot(g, tl.trans(matrix), input_precision=P)
    if MAP == DIRECTION:
        dmass = -tl.sum(a * da, 1)[:, None] / mass
        dmass = tl.where(mass > ROUNDING, dmass, 0.0)
        da += row[None, :] * dmass
        dx = size * (da - a * tl.sum(a * da, 1)[:, None])
        drow += tl.sum(a * dmass, 0)
    else:
        dmass = -(2 * tl.sum(a * da, 1) + tl.sum(g * pull[None, :], 1))[:, None] / mass
        dx = 2 * (da + a * dmass)
        drow += tl.sum(dx, 0)
        dpull += tl.sum(g, 0)
        dsingle += tl.sum(tl.sum(dmass, 1), 0)
    store_rows(dq, dx, at, stop, sdn, WIDTH, BLOCK, D, EDGE)
    dmatrix = tl.dot(tl.trans(a), g, dmatrix, input_precision=P)
    return dmatrix, drow, dvalue, dpull, dsingle


@triton.jit
def _query_gradients(
    q, do, dq, start, stop, sqn, sqd, sgn, sgd, sdn, matrix, row, pull, single,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Store the gradients of some queries; return those of the state: of the distance, half of the matrix's.

    With the numerator's gradient ``t = g / mass`` and its change of the mean value, ``c = y - v'``, that of the mass
    is ``-t.c``.
    """
    dmatrix = tl.zeros([D, E], tl.float32)
    drow = tl.zeros([D], tl.float32)
    dvalue = tl.zeros([E], tl.float32)
    dpull = tl.zeros([E], tl.float32)
    dsingle = 0.0
    edge = start + (stop - start) // BLOCK * BLOCK
    for at in tl.range(start, edge, BLOCK, num_stages=STAGES):
        dmatrix, drow, dvalue, dpull, dsingle = _query_gradient_block(
            q, do, dq, at, stop, sqn, sqd, sgn, sgd, sdn, dmatrix, drow, dvalue, dpull, dsingle,
            matrix, row, pull, single, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, P, False)  # fmt: skip
    if edge < stop:
        dmatrix, drow, dvalue, dpull, dsingle = _query_gradient_block(
            q, do, dq, edge, stop, sqn, sqd, sgn, sgd, sdn, dmatrix, drow, dvalue, dpull, dsingle,
            matrix, row, pull, single, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, P, True)  # fmt: skip
    return dmatrix, drow, dvalue, dpull, dsingle


@triton.jit
def _turned(dmatrix, drow, dvalue, dpull, dsingle, matrix, single, count, MAP: tl.constexpr):
    """Return what keys need of the gradients of the state.

    The moments are about means: moving a key moves those of all. What that adds, the same for all keys, is in here.
    """
    if MAP == DIRECTION:
        mass = single
        dsingle = tl.sum(tl.sum(dmatrix * matrix, 1), 0)
    else:
        mass = count
        dmatrix *= 2
        drow -= 2 * tl.sum(matrix * dpull[None, :], 1)
        dvalue -= single * dpull
    return dmatrix / mass, drow / mass, dvalue / mass, dpull / mass, dsingle / mass


@triton.jit
def _key_gradient_block(
    k, v, keep, dk, dv, at, stop, skn, skd, svn, svd, smn, sdn, sen, row, value, dmatrix, drow, dvalue, dpull, dsingle,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, MASKED: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a block of keys and values."""
    x = load_rows(k, at, stop, skn, skd, WIDTH, BLOCK, D, EDGE).to(tl.float32)
    z = load_rows(v, at, stop, svn, svd, VALUE_WIDTH, BLOCK, E, EDGE).to(tl.float32) - value[None, :]
    if MASKED:
        kept = load_mask(keep, at, stop, smn, BLOCK)[:, None]
        x, z = tl.where(kept, x, 0.0), tl.where(kept, z, 0.0)
    n = _place(x, MAP) - row[None, :]
    dn = tl.dot(z, tl.trans(dmatrix), input_precision=P) + drow[None, :]
    dz = tl.dot(n, dmatrix, input_precision=P) + dvalue[None, :]
    if MAP == DIRECTION:
        b, size = _unit(x)
        weight = tl.sum(x * x, 1)[:, None] + 1
        dweight = (tl.sum(n * dn, 1) + tl.sum(z * dvalue[None, :], 1))[:, None] - dsingle
        dz *= weight
        dx = size * weight * (dn - b * tl.sum(b * dn, 1)[:, None]) + 2 * x * dweight
    else:
        dx = dn + 2 * n * (dsingle + tl.sum(z * dpull[None, :], 1)[:, None])
        dz += tl.sum(n * n, 1)[:, None] * dpull[None, :]
        if MAP == DIFF:
            dx = -dx
    if MASKED:
        dx, dz = tl.where(kept, dx, 0.0), tl.where(kept, dz, 0.0)
    store_rows(dk, dx, at, stop, sdn, WIDTH, BLOCK, D, EDGE)
    store_rows(dv, dz, at, stop, sen, VALUE_WIDTH, BLOCK, E, EDGE)


@triton.jit
def _key_gradients(
    k, v, keep, dk, dv, start, stop, skn, skd, svn, svd, smn, sdn, sen, row, value, dmatrix, drow, dvalue, dpull,
    dsingle, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, MASKED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Store the gradients of some keys and values."""
    edge = start + (stop - start) // BLOCK * BLOCK
    for at in tl.range(start, edge, BLOCK, num_stages=STAGES):
        _key_gradient_block(
            k, v, keep, dk, dv, at, stop, skn, skd, svn, svd, smn, sdn, sen, row, value, dmatrix, drow, dvalue, dpull,
            dsingle, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, MASKED, P, False)  # fmt: skip
    if edge < stop:
        _key_gradient_block(
            k, v, keep, dk, dv, edge, stop, skn, skd, svn, svd, smn, sdn, sen, row, value, dmatrix, drow, dvalue, dpull,
            dsingle, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, MASKED, P, True)  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "fillers", "chunks", "readers"])
def backward(
    q, k, v, keep, do, dq, dk, dv, state, dstate, parts, flags,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, smb, smh, smn,
    sgb, sgh, sgn, sgd, sdb, sdh, sdn, seb, seh, sen,
    heads, tokens, fillers, chunks, readers,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Take gradients. The grid is that of :func:`forward`, with the roles of queries and keys exchanged."""
    item = tl.program_id(0)
    if WHOLE:
        head, start, stop, answers = item, 0, tokens, False
    else:
        item, head, start, stop, answers = share(item, fillers, chunks, readers, heads, tokens, BLOCK, BLOCK)
    b, h = (head // heads).to(tl.int64), head % heads
    q += b * sqb + h * sqh
    k += b * skb + h * skh
    v += b * svb + h * svh
    do += b * sgb + h * sgh
    dq += b * sdb + h * sdh
    dk += b * sdb + h * sdh
    dv += b * seb + h * seh
    if MASKED:
        keep += b * smb + h * smh

    matrix, row, value, pull, single = _read(state, head, D, E)
    total = _counted(keep, tokens, smn, MASKED)
    if WHOLE:
        dmatrix, drow, dvalue, dpull, dsingle = _query_gradients(
            q, do, dq, start, stop, sqn, sqd, sgn, sgd, sdn, matrix, row, pull, single,
            WIDTH, VALUE_WIDTH, D, E, BLOCK, STAGES, MAP, P)  # fmt: skip
        dmatrix, drow, dvalue, dpull, dsingle = _turned(
            dmatrix, drow, dvalue, dpull, dsingle, matrix, single, total, MAP
        )
        _key_gradients(
            k, v, keep, dk, dv, start, stop, skn, skd, svn, svd, smn, sdn, sen, row, value, dmatrix, drow, dvalue,
            dpull, dsingle, WIDTH, VALUE_WIDTH, D, E, BLOCK, STAGES, MAP, MASKED, P)  # fmt: skip
    elif answers:
        wait_for(flags, head, fillers // chunks, chunks, readers)
        dmatrix, drow, dvalue, dpull, dsingle = _read(dstate, head, D, E)
        _key_gradients(
            k, v, keep, dk, dv, start, stop, skn, skd, svn, svd, smn, sdn, sen, row, value, dmatrix, drow, dvalue,
            dpull, dsingle, WIDTH, VALUE_WIDTH, D, E, BLOCK, STAGES, MAP, MASKED, P)  # fmt: skip
    else:
        dmatrix, drow, dvalue, dpull, dsingle = _query_gradients(
            q, do, dq, start, stop, sqn, sqd, sgn, sgd, sdn, matrix, row, pull, single,
            WIDTH, VALUE_WIDTH, D, E, BLOCK, STAGES, MAP, P)  # fmt: skip
        _write(parts, item, dmatrix, drow, dvalue, dpull, dsingle, D, E)
        if arrive(flags + head) == chunks - 1:
            dmatrix, drow, dvalue, dpull, dsingle = _joined(parts, head, chunks, D, E)
            dmatrix, drow, dvalue, dpull, dsingle = _turned(
                dmatrix, drow, dvalue, dpull, dsingle, matrix, single, total, MAP
            )
            _write(dstate, head, dmatrix, drow, dvalue, dpull, dsingle, D, E)
            arrive(flags + head)
