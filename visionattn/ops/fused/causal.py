"""Triton kernels for causal attention by positive features, forward and backward.

The mathematics is that of :mod:`visionattn.ops.positive`. Kernels take logarithms of features, to base e, from memory:
x of queries, z of keys; the maps stay in PyTorch. In the names of shapes, F is the padded number of features and E the
padded width of values, or what one program has of either.

A state holds some tokens: for each feature a logarithm ``top``, the sum ``mass`` of ``exp(log - top)`` times a number
that each token has, and the sums ``slots`` of ``exp(log - top)`` times its values. Heads are split into chunks.
:func:`gather` makes states of chunks, :func:`join` adds to each those before it, and each program of :func:`forward`
goes on from there, in blocks: queries read the state, then attend to the keys of their own block pair by pair, then the
keys join the state. Logarithms are added before an exponential is taken, and what is subtracted, ``peak``, is the
maximum of the sum over all that a query reads: whatever the range of logarithms, no exponential overflows, and none
underflows that counts.

With the gradient g of a query's output y, and the weight ``p = exp(x + z - peak) / total`` of a feature of a pair,

    dx_i = sum_j p_ij (g_i.v_j - g_i.y_i),   dz_j = sum_i p_ij (g_i.v_j - g_i.y_i),   dv_j = sum_i sum_f p_ij g_i:

the first reads states of the keys before, as :func:`forward` does, the others read states of the queries after. In
those, logarithms are ``x + mark - peak``, and keys read them with ``z - mark``, where the mark is the ``top`` of all
keys before a block: where weights are large, both are small, and little of them is lost in rounding.

All sums are taken in fixed order: results are the same, bit by bit, from run to run.
"""

import triton
import triton.language as tl

from visionattn.ops.fused.tiles import span

NEVER: tl.constexpr = tl.constexpr(-1e30)
BLOCK: tl.constexpr = tl.constexpr(16)
UNROLL: tl.constexpr = tl.constexpr(4)


@triton.jit
def _tile(base, at, stop, first, stride_n, stride_d, other, WIDTH: tl.constexpr, D: tl.constexpr):
    """Load rows from ``at`` and columns from ``first`` on of (tokens, WIDTH) as (BLOCK, D), in float32."""
    n, d = at + tl.arange(0, BLOCK), first + tl.arange(0, D)
    inside = (n < stop)[:, None] & (d < WIDTH)[None, :]
    return tl.load(base + n[:, None] * stride_n + d[None, :] * stride_d, mask=inside, other=other).to(tl.float32)


@triton.jit
def _row(base, n, first, stride_n, stride_d, other, WIDTH: tl.constexpr, D: tl.constexpr):
    """Load columns from ``first`` on of row n of (tokens, WIDTH) as (D,), in float32."""
    d = first + tl.arange(0, D)
    return tl.load(base + n * stride_n + d * stride_d, mask=d < WIDTH, other=other).to(tl.float32)


@triton.jit
def _bounded(logs):
    """Return logarithms that are finite: minus infinity stands for the logarithm of zero, NaN stays."""
    return tl.maximum(logs, NEVER, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _logs(base, at, stop, first, stride_n, stride_d, WIDTH: tl.constexpr, F: tl.constexpr):
    """Load logarithms as (BLOCK, F), NEVER outside."""
    return _bounded(_tile(base, at, stop, first, stride_n, stride_d, float("-inf"), WIDTH, F))


@triton.jit
def _log_row(base, n, first, stride_n, stride_d, WIDTH: tl.constexpr, F: tl.constexpr):
    """Load logarithms of one token as (F,), NEVER outside."""
    return _bounded(_row(base, n, first, stride_n, stride_d, float("-inf"), WIDTH, F))


@triton.jit
def _put(base, value, at, stop, first, stride_n, WIDTH: tl.constexpr, D: tl.constexpr):
    """Store (BLOCK, D) in rows from ``at`` and columns from ``first`` on of (tokens, WIDTH)."""
    n, d = at + tl.arange(0, BLOCK), first + tl.arange(0, D)
    inside = (n < stop)[:, None] & (d < WIDTH)[None, :]
    tl.store(base + n[:, None] * stride_n + d[None, :], value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _number(base, at, stop, other):
    """Load one number a token as (BLOCK,)."""
    n = at + tl.arange(0, BLOCK)
    return tl.load(base + n, mask=n < stop, other=other)


@triton.jit
def _state(tops, masses, slots, place, known, first, left, FEATURES: tl.constexpr, VALUES: tl.constexpr,
           F: tl.constexpr, E: tl.constexpr):  # fmt: skip
    """Load the features from ``first`` and values from ``left`` on of a state; that of no tokens if not ``known``."""
    f, e = first + tl.arange(0, F), left + tl.arange(0, E)
    there = place * FEATURES + f
    exists = (f < FEATURES) & known
    top = tl.load(tops + there, mask=exists, other=NEVER)
    mass = tl.load(masses + there, mask=exists, other=0.0)
    return top, mass, tl.load(slots + there[:, None] * VALUES + e[None, :], mask=exists[:, None], other=0.0)


@triton.jit
def _keep(tops, masses, slots, place, first, top, mass, sums, FEATURES: tl.constexpr, F: tl.constexpr,
          E: tl.constexpr):  # fmt: skip
    """Store the features from ``first`` on of a state."""
    f, e = first + tl.arange(0, F), tl.arange(0, E)
    there = place * FEATURES + f
    tl.store(tops + there, top)
    tl.store(masses + there, mass)
    tl.store(slots + there[:, None] * E + e[None, :], sums)


@triton.jit
def _mark(marks, head, at, first, tokens, FEATURES: tl.constexpr, F: tl.constexpr):
    """Load the mark of the block of a token, (F,)."""
    block = head * tl.cdiv(tokens, BLOCK) + at // BLOCK
    return tl.load(marks + block * FEATURES + first + tl.arange(0, F))


@triton.jit
def _taken(top, mass, slots, logs, numbers, values, P: tl.constexpr):
    """Return the state with some tokens taken in, with logarithms (n, F), numbers (n,) and values (n, E)."""
    above = tl.maximum(top, tl.max(logs, 0))
    weights = tl.exp(logs - above[None, :])
    fade = tl.exp(top - above)
    mass = mass * fade + tl.sum(weights * numbers[:, None], 0)
    return above, mass, tl.dot(tl.trans(weights), values, slots * fade[:, None], input_precision=P)


@triton.jit(do_not_specialize=["tokens", "parts"])
def gather(
    logs, values, peaks, totals, deltas, marks, tops, masses, slots,
    slb, slh, sln, sld, svb, svh, svn, svd, heads, tokens, parts,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, FEATURES: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    QUERIES: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Make the states of chunks. Grid: (batch x heads x parts, tiles of features).

    There is one chunk more than there are parts: that of keys which come last, or that of QUERIES which come first, is
    in no state that is read.
    """
    item, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * F
    head = item // parts
    start, stop = span((item % parts).to(tl.int32) + QUERIES, parts + 1, tokens, BLOCK)
    logs += head // heads * slb + head % heads * slh
    values += head // heads * svb + head % heads * svh
    top = tl.full([F], NEVER, tl.float32)
    mass = tl.zeros([F], tl.float32)
    sums = tl.zeros([F, E], tl.float32)
    if QUERIES:
        mark = _mark(marks, head, start, first, tokens, FEATURES, F)[None, :]
    for at in range(start, stop, BLOCK):
        x = _logs(logs, at, stop, first, sln, sld, WIDTH, F)
        y = _tile(values, at, stop, 0, svn, svd, 0.0, VALUE_WIDTH, E)
        if QUERIES:
            own = _mark(marks, head, at, first, tokens, FEATURES, F)[None, :]
            x = x + own - _number(peaks + head * tokens, at, stop, 0.0)[:, None] - (own - mark)
            y /= _number(totals + head * tokens, at, stop, 1.0)[:, None]
            numbers = _number(deltas + head * tokens, at, stop, 0.0)
        else:
            numbers = (at + tl.arange(0, BLOCK) < stop).to(tl.float32)
        top, mass, sums = _taken(top, mass, sums, x, numbers, y, P)
    _keep(tops, masses, slots, item, first, top, mass, sums, FEATURES, F, E)


@triton.jit(do_not_specialize=["tokens", "parts"])
def join(
    marks, tops, masses, slots, tokens, parts,
    FEATURES: tl.constexpr, F: tl.constexpr, E: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Add to each state of a head those of keys before, or of QUERIES after.

    Grid: (batch x heads, tiles of features).
    """
    head, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * F
    top = tl.full([F], NEVER, tl.float32)
    mass = tl.zeros([F], tl.float32)
    sums = tl.zeros([F, E], tl.float32)
    for step in range(parts):
        part = step
        if QUERIES:
            part = parts - 1 - step
            start, stop = span(part + 1, parts + 1, tokens, BLOCK)
            if step > 0:
                top -= _mark(marks, head, stop, first, tokens, FEATURES, F)
                top += _mark(marks, head, start, first, tokens, FEATURES, F)
        place = head * parts + part
        new_top, new_mass, new_sums = _state(tops, masses, slots, place, True, first, 0, FEATURES, E, F, E)
        above = tl.maximum(top, new_top)
        fade, share = tl.exp(top - above), tl.exp(new_top - above)
        top, mass = above, mass * fade + new_mass * share
        sums = sums * fade[:, None] + new_sums * share[:, None]
        _keep(tops, masses, slots, place, first, top, mass, sums, FEATURES, F, E)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def forward(
    a, b, v, o, wide, peaks, totals, tops, masses, slots,
    sab, sah, san, sad, sbb, sbh, sbn, sbd, svb, svh, svn, svd, sob, soh, son, heads, tokens, chunks,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, F: tl.constexpr, VALUES: tl.constexpr, E: tl.constexpr,
    SAVE: tl.constexpr, WIDE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Attend. Grid: (batch x heads x chunks, tiles of values)."""
    item, left = tl.program_id(0).to(tl.int64), tl.program_id(1) * E
    head, chunk = item // chunks, (item % chunks).to(tl.int32)
    start, stop = span(chunk, chunks, tokens, BLOCK)
    a += head // heads * sab + head % heads * sah
    b += head // heads * sbb + head % heads * sbh
    v += head // heads * svb + head % heads * svh
    there = head // heads * sob + head % heads * soh
    mine = tl.arange(0, BLOCK)
    place = head * (chunks - 1) + chunk - 1
    top, mass, sums = _state(tops, masses, slots, place, chunk > 0, 0, left, F, VALUES, F, E)
    for at in range(start, stop, BLOCK):
        count = tl.minimum(BLOCK, stop - at)
        x = _logs(a, at, stop, 0, san, sad, WIDTH, F)
        reach = tl.zeros([BLOCK, F], tl.float32) + top[None, :]
        for j in tl.range(count, loop_unroll_factor=UNROLL):
            key = _log_row(b, at + j, 0, sbn, sbd, WIDTH, F)[None, :]
            reach = tl.where((mine >= j)[:, None], tl.maximum(reach, key), reach)
        peak = tl.max(x + reach, 1)
        weights = tl.exp(x + top[None, :] - peak[:, None])
        total = tl.sum(weights * mass[None, :], 1)
        mixed = tl.dot(weights, sums, input_precision=P)
        for j in tl.range(count, loop_unroll_factor=UNROLL):
            key = _log_row(b, at + j, 0, sbn, sbd, WIDTH, F)[None, :]
            value = _row(v, at + j, left, svn, svd, 0.0, VALUE_WIDTH, E)[None, :]
            weight = tl.sum(tl.exp(x + key - tl.where(mine >= j, peak, -NEVER)[:, None]), 1)
            total += weight
            mixed += weight[:, None] * value
        mixed /= total[:, None]
        _put(o + there, mixed, at, stop, left, son, VALUE_WIDTH, E)
        if SAVE:
            if WIDE:
                _put(wide + there, mixed, at, stop, left, son, VALUE_WIDTH, E)
            if left == 0:
                tl.store(peaks + head * tokens + at + mine, peak, mask=mine < count)
                tl.store(totals + head * tokens + at + mine, total, mask=mine < count)
        z = _logs(b, at, stop, 0, sbn, sbd, WIDTH, F)
        y = _tile(v, at, stop, left, svn, svd, 0.0, VALUE_WIDTH, E)
        top, mass, sums = _taken(top, mass, sums, z, (mine < count).to(tl.float32), y, P)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def query_gradients(
    a, b, v, o, do, da, peaks, totals, deltas, marks, tops, masses, slots,
    sab, sah, san, sad, sbb, sbh, sbn, sbd, svb, svh, svn, svd, sgb, sgh, sgn, sgd, sdb, sdh, sdn, sob, soh, son,
    heads, tokens, chunks,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, FEATURES: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Take the gradients of queries; leave the marks, and ``g.y / total`` as deltas.

    Grid: (batch x heads x chunks, tiles of features).
    """
    item, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * F
    head, chunk = item // chunks, (item % chunks).to(tl.int32)
    start, stop = span(chunk, chunks, tokens, BLOCK)
    a += head // heads * sab + head % heads * sah
    b += head // heads * sbb + head % heads * sbh
    v += head // heads * svb + head % heads * svh
    do += head // heads * sgb + head % heads * sgh
    da += head // heads * sdb + head % heads * sdh
    o += head // heads * sob + head % heads * soh
    mine = tl.arange(0, BLOCK)
    place = head * (chunks - 1) + chunk - 1
    top, mass, sums = _state(tops, masses, slots, place, chunk > 0, first, 0, FEATURES, E, F, E)
    for at in range(start, stop, BLOCK):
        count = tl.minimum(BLOCK, stop - at)
        x = _logs(a, at, stop, first, san, sad, WIDTH, F)
        peak = _number(peaks + head * tokens, at, stop, 0.0)
        g = _tile(do, at, stop, 0, sgn, sgd, 0.0, VALUE_WIDTH, E)
        g /= _number(totals + head * tokens, at, stop, 1.0)[:, None]
        delta = tl.sum(g * _tile(o, at, stop, 0, son, 1, 0.0, VALUE_WIDTH, E), 1)
        if first == 0:
            tl.store(deltas + head * tokens + at + mine, delta, mask=mine < count)
        block = head * tl.cdiv(tokens, BLOCK) + at // BLOCK
        tl.store(marks + block * FEATURES + first + tl.arange(0, F), top)
        dx = tl.dot(g, tl.trans(sums), input_precision=P) - delta[:, None] * mass[None, :]
        dx *= tl.exp(x + top[None, :] - peak[:, None])
        for j in tl.range(count, loop_unroll_factor=UNROLL):
            key = _log_row(b, at + j, first, sbn, sbd, WIDTH, F)[None, :]
            value = _row(v, at + j, 0, svn, svd, 0.0, VALUE_WIDTH, E)[None, :]
            pull = tl.sum(g * value, 1) - delta
            dx += tl.exp(x + key - tl.where(mine >= j, peak, -NEVER)[:, None]) * pull[:, None]
        _put(da, dx, at, stop, first, sdn, WIDTH, F)
        z = _logs(b, at, stop, first, sbn, sbd, WIDTH, F)
        y = _tile(v, at, stop, 0, svn, svd, 0.0, VALUE_WIDTH, E)
        top, mass, sums = _taken(top, mass, sums, z, (mine < count).to(tl.float32), y, P)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def key_gradients(
    a, b, v, do, db, dv, peaks, totals, deltas, marks, tops, masses, slots,
    sab, sah, san, sad, sbb, sbh, sbn, sbd, svb, svh, svn, svd, sgb, sgh, sgn, sgd, sdb, sdh, sdn,
    step_tile, seb, seh, sen, heads, tokens, chunks,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, FEATURES: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Take the gradients of keys, and of those of values the part of a tile of features. The grid is the same."""
    item, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = tl.program_id(1) * F
    head, chunk = item // chunks, (item % chunks).to(tl.int32)
    start, stop = span(chunk, chunks, tokens, BLOCK)
    a += head // heads * sab + head % heads * sah
    b += head // heads * sbb + head % heads * sbh
    v += head // heads * svb + head % heads * svh
    do += head // heads * sgb + head % heads * sgh
    db += head // heads * sdb + head % heads * sdh
    dv += tile * step_tile + head // heads * seb + head % heads * seh
    peaks += head * tokens
    totals += head * tokens
    deltas += head * tokens
    mine = tl.arange(0, BLOCK)
    place = head * (chunks - 1) + chunk
    top, mass, sums = _state(tops, masses, slots, place, chunk < chunks - 1, first, 0, FEATURES, E, F, E)
    mark = _mark(marks, head, tl.minimum(stop, tokens - 1), first, tokens, FEATURES, F)
    blocks = tl.cdiv(stop - start, BLOCK)
    for step in range(blocks):
        at = start + (blocks - 1 - step) * BLOCK
        count = tl.minimum(BLOCK, stop - at)
        z = _logs(b, at, stop, first, sbn, sbd, WIDTH, F)
        y = _tile(v, at, stop, 0, svn, svd, 0.0, VALUE_WIDTH, E)
        weights = tl.exp(z - mark[None, :] + top[None, :])
        dz = weights * (tl.dot(y, tl.trans(sums), input_precision=P) - mass[None, :])
        dy = tl.dot(weights, sums, input_precision=P)
        for i in tl.range(count, loop_unroll_factor=UNROLL):
            query = _log_row(a, at + i, first, san, sad, WIDTH, F)[None, :]
            g = _row(do, at + i, 0, sgn, sgd, 0.0, VALUE_WIDTH, E)[None, :] / tl.load(totals + at + i)
            peak = tl.where(mine <= i, tl.load(peaks + at + i), -NEVER)
            weights = tl.exp(z + query - peak[:, None])
            pull = tl.sum(y * g, 1) - tl.load(deltas + at + i)
            dz += weights * pull[:, None]
            dy += tl.sum(weights, 1)[:, None] * g
        _put(db, dz, at, stop, first, sdn, WIDTH, F)
        _put(dv, dy, at, stop, 0, sen, VALUE_WIDTH, E)
        x = _logs(a, at, stop, first, san, sad, WIDTH, F)
        before = _mark(marks, head, at, first, tokens, FEATURES, F)
        top -= mark - before
        mark = before
        x = x + mark[None, :] - _number(peaks, at, stop, 0.0)[:, None]
        g = _tile(do, at, stop, 0, sgn, sgd, 0.0, VALUE_WIDTH, E)
        g /= _number(totals, at, stop, 1.0)[:, None]
        top, mass, sums = _taken(top, mass, sums, x, _number(deltas, at, stop, 0.0), g, P)
