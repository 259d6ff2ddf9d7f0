"""Triton kernels for the gradients of causal attention by positive features.

Names and blocks are those of :mod:`visionattn.ops.fused.causal`. With ``g`` the gradient of a query's output y,
``pull_ij = g_i.(v_j - y_i)`` for keys j up to the query i, keys K as the forward pass has them, its queries Q divided
by the totals of their weights, and p the products of K and Q, the gradients of logarithms and values are

    dx_i = Q_i sum_j pull_ij K_j,   dz_j = K_j sum_i pull_ij Q_i,   dv_j = sum_i p_ij g_i.

Sums over the block are products of matrices. Those over the keys before it read states of keys, as the forward pass
does. Those over the queries after it read states of queries: the sums ``slots`` of ``Q g`` and ``mass`` of
``Q g.(y - c)``. A mark is the ``top`` of all keys up to a block. States of queries hold ``exp(x + mark - peak)``, with
the mark of the blocks before, and keys read them by ``exp(z - mark)``: neither is more than 1, since marks never fall
along the tokens.

The centre c is zero where values are multiplied exactly. For values in float32, which are taken less the head's origin
here, too, it is the mean of what the queries of a range mix, and for the state of a chunk what its first query mixes:
where one key outweighs all others, both terms of a pull are then small.

Blocks fall into the same ranges as in the forward pass, which leaves for each token the first of its range and the end,
counted within the block: roundings of ``x + above`` are then the same, and cancel.
"""

import triton
import triton.language as tl

from visionattn.ops.fused.causal import (
    causal,
    highest,
    inside_range,
    load_block,
    load_logs,
    load_mark,
    load_numbers,
    load_state,
    load_values,
    logs_of,
    origin_of,
    product,
    rounded,
    store_block,
    store_state,
    weights_of,
)
from visionattn.ops.fused.positive import EXP, _slope
from visionattn.ops.fused.tiles import span


@triton.jit
def _chained(x, gradient, MAP: tl.constexpr):
    """Return the gradient of queries or keys from that of the logarithms of their features."""
    if MAP != EXP:
        gradient = gradient * _slope(x, MAP)
    return gradient


@triton.jit
def _shares_of(logs, totals, at, stop, inside, C: tl.constexpr, P: tl.constexpr):
    """Return ``exp(logs)`` of the queries inside over the totals of their weights, zeros of others."""
    return rounded(weights_of(logs, inside) * (1 / load_numbers(totals, at, stop, 1.0, C))[:, None], P)


@triton.jit
def _centre_of(mixes, start, stop, VALUE_WIDTH: tl.constexpr, C: tl.constexpr, E: tl.constexpr, P: tl.constexpr):
    """Return the mean of what some queries of a block mix, (1, E), or zeros where values are multiplied exactly."""
    centre = tl.zeros([E], tl.float32)
    if P == "ieee":
        mixed = load_block(mixes, start, stop, 0, VALUE_WIDTH, 1, 0.0, VALUE_WIDTH, C, E)
        centre = tl.sum(mixed, 0) / (stop - start)
    return centre[None, :]


@triton.jit
def _moved(mass, sums, centre, new, P: tl.constexpr):
    """Return the mass of a state of queries by a new centre."""
    if P == "ieee":
        mass += tl.sum(sums * (centre - new), 1)
    return mass


@triton.jit
def _range_before(k, ranges, marks, head, at, end, first, stride_n, stride_d, tokens, MAP: tl.constexpr,
                  WIDTH: tl.constexpr, FEATURES: tl.constexpr, C: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """Return the mark before the range of a block that ends before ``end``, and where in the block the range begins."""
    mark = load_mark(marks, head, at // C - 1, first, tokens, FEATURES, C, F)
    low = tl.load(ranges + end - 1).to(tl.int32) // (2 * C)
    if low > 0:
        mark = highest(mark, load_logs(k, at, end, first, stride_n, stride_d, MAP, WIDTH, C, F), low, C)
    return mark, low


@triton.jit(do_not_specialize=["step_stat", "tokens", "chunks"])
def query_gradients(
    q, k, v, do, dq, mixes, stats, deltas, states,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, sgb, sgh, sgn, sgd, sdb, sdh, sdn, step_stat,
    heads, tokens, chunks,
    MAP: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, FEATURES: tl.constexpr, F: tl.constexpr,
    E: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Take the gradients of queries; leave ``g.y``. Grid: (batch x heads x chunks, tiles of features)."""
    item, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * F
    head, chunk = item // chunks, (item % chunks).to(tl.int32)
    start, stop = span(chunk, chunks, tokens, C)
    q += head // heads * sqb + head % heads * sqh
    k += head // heads * skb + head % heads * skh
    v += head // heads * svb + head % heads * svh
    do += head // heads * sgb + head % heads * sgh
    dq += head // heads * sdb + head % heads * sdh
    mixes += head * tokens * VALUE_WIDTH
    stats += head * tokens
    deltas += head * tokens
    mine = tl.arange(0, C)
    origin = origin_of(v, tokens, 0, svn, svd, VALUE_WIDTH, C, E, P)
    top, mass, sums = load_state(states, head * (chunks - 1) + chunk - 1, chunk > 0, first, 0, FEATURES, E, F, E)
    at = start
    while at < stop:
        end = tl.minimum((at // C + 1) * C, stop)
        z = load_logs(k, at, end, first, skn, skd, MAP, WIDTH, C, F)
        raw = load_block(q, at, end, first, sqn, sqd, float("-inf"), WIDTH, C, F)
        y = load_values(v, at, end, 0, svn, svd, origin, VALUE_WIDTH, C, E, P)
        g = load_block(do, at, end, 0, sgn, sgd, 0.0, VALUE_WIDTH, C, E)
        mixed = load_block(mixes, at, end, 0, VALUE_WIDTH, 1, 0.0, VALUE_WIDTH, C, E)
        peak = load_numbers(stats, at, end, 0.0, C)
        next = at // C * C + tl.load(stats + 2 * step_stat + at).to(tl.int32) % (2 * C)
        above = highest(top, z, next - at, C)
        inside = mine < next - at
        keys = rounded(weights_of(z - above[None, :], inside), P)
        fade = tl.exp(top - above)
        top, mass, sums = above, mass * fade, sums * fade[:, None]
        near, slots = y, sums
        if P == "ieee":
            centre = _centre_of(mixes, at, next, VALUE_WIDTH, C, E, P)
            near, slots, mixed = y - centre, sums - mass[:, None] * centre, mixed - centre
        delta = tl.sum(g * mixed, 1)
        dx = product(g, slots, tl.zeros([C, F], tl.float32), False, True, True, P) - delta[:, None] * mass[None, :]
        pulls = product(g, near, tl.zeros([C, C], tl.float32), False, True, True, P) - delta[:, None]
        pulls = causal(pulls, at, False, C)
        dx = product(pulls, keys, dx, False, False, False, P)
        x = logs_of(raw, at, end, first, MAP, WIDTH, C, F)
        shares = _shares_of(x + above[None, :] - peak[:, None], stats + step_stat, at, end, inside, C, P)
        dx *= shares
        if P == "ieee" and F == FEATURES:  # a query's gradients sum up to nothing
            excess = tl.sum(dx, 1)
            delta += excess
            dx -= excess[:, None] * shares * (mass[None, :] + tl.cumsum(keys, 0))
        if first == 0:
            tl.store(deltas + at + mine, delta, mask=inside)
        store_block(dq, _chained(raw, dx, MAP), inside, at, first, sdn, WIDTH, C, F)
        mass += tl.sum(keys, 0)
        sums = product(keys, y, sums, True, False, True, P)
        at = next


@triton.jit(do_not_specialize=["step_stat", "tokens", "parts"])
def gather_queries(
    q, k, do, mixes, stats, deltas, marks, states,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, sgb, sgh, sgn, sgd, step_stat, heads, tokens, parts,
    MAP: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, FEATURES: tl.constexpr, F: tl.constexpr,
    E: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Make the states of all chunks of queries but the first, by the marks before them.

    Grid: (batch x heads x parts, tiles of features). The state's top is the mark.
    """
    item, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * F
    head = item // parts
    start, end = span((item % parts).to(tl.int32) + 1, parts + 1, tokens, C)
    q += head // heads * sqb + head % heads * sqh
    k += head // heads * skb + head % heads * skh
    do += head // heads * sgb + head % heads * sgh
    mixes += head * tokens * VALUE_WIDTH
    stats += head * tokens
    deltas += head * tokens
    mass = tl.zeros([F], tl.float32)
    sums = tl.zeros([F, E], tl.float32)
    centre = tl.zeros([1, E], tl.float32)
    mark = load_mark(marks, head, tl.cdiv(end, C) - 1, first, tokens, FEATURES, C, F)
    while end > start:
        at = (end - 1) // C * C
        x = load_logs(q, at, end, first, sqn, sqd, MAP, WIDTH, C, F)
        g = load_block(do, at, end, 0, sgn, sgd, 0.0, VALUE_WIDTH, C, E)
        delta = load_numbers(deltas, at, end, 0.0, C)
        peak = load_numbers(stats, at, end, 0.0, C)
        bottom, low = _range_before(k, stats + 2 * step_stat, marks, head, at, end, first, skn, skd, tokens, MAP, WIDTH,
                                    FEATURES, C, F)  # fmt: skip
        inside = inside_range(low, end - at, C)
        queries = _shares_of(x + mark[None, :] - peak[:, None], stats + step_stat, at, end, inside, C, P)
        new = _centre_of(mixes, at + low, end, VALUE_WIDTH, C, E, P)
        mass, centre = _moved(mass, sums, centre, new, P), new
        fade = tl.exp(bottom - mark)
        mass = (mass + tl.sum(queries * delta[:, None], 0)) * fade
        sums = product(queries, g, sums, True, False, True, P) * fade[:, None]
        mark, end = bottom, at + low
    mass = _moved(mass, sums, centre, _centre_of(mixes, start, start + 1, VALUE_WIDTH, C, E, P), P)
    store_state(states, item, first, mark, mass, sums, FEATURES, F, E)


@triton.jit(do_not_specialize=["parts", "tokens"])
def join_queries(
    states, joined, mixes, parts, tokens,
    FEATURES: tl.constexpr, F: tl.constexpr, VALUE_WIDTH: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Make the states of all queries from each part on. Grid: (batch x heads, tiles of features)."""
    head, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * F
    mixes += head * tokens * VALUE_WIDTH
    centre = tl.zeros([1, E], tl.float32)
    top = tl.zeros([F], tl.float32)
    mass = tl.zeros([F], tl.float32)
    sums = tl.zeros([F, E], tl.float32)
    for step in tl.range(parts, num_stages=4):
        place = head * parts + parts - 1 - step
        mark, new_mass, new_sums = load_state(states, place, True, first, 0, FEATURES, E, F, E)
        fade = tl.exp(tl.where(step > 0, mark - top, 0.0))
        start, _ = span(parts - step, parts + 1, tokens, C)
        new = _centre_of(mixes, start, start + 1, VALUE_WIDTH, C, E, P)
        mass, centre = _moved(mass, sums, centre, new, P), new
        top, mass = mark, mass * fade + new_mass
        sums = sums * fade[:, None] + new_sums
        store_state(joined, place, first, top, mass, sums, FEATURES, F, E)


@triton.jit(do_not_specialize=["step_stat", "tokens", "chunks"])
def key_gradients(
    q, k, v, do, dk, dv, mixes, stats, deltas, marks, states,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, sgb, sgh, sgn, sgd, sdb, sdh, sdn,
    step_tile, seb, seh, sen, step_stat, heads, tokens, chunks,
    MAP: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, FEATURES: tl.constexpr, F: tl.constexpr,
    E: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Take the gradients of keys, and of those of values the part of a tile of features.

    Grid: (batch x heads x chunks, tiles of features).
    """
    item, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = tl.program_id(1) * F
    head, chunk = item // chunks, (item % chunks).to(tl.int32)
    start, stop = span(chunk, chunks, tokens, C)
    q += head // heads * sqb + head % heads * sqh
    k += head // heads * skb + head % heads * skh
    v += head // heads * svb + head % heads * svh
    do += head // heads * sgb + head % heads * sgh
    dk += head // heads * sdb + head % heads * sdh
    dv += tile * step_tile + head // heads * seb + head % heads * seh
    mixes += head * tokens * VALUE_WIDTH
    stats += head * tokens
    deltas += head * tokens
    origin = origin_of(v, tokens, 0, svn, svd, VALUE_WIDTH, C, E, P)
    place = head * (chunks - 1) + chunk
    _, mass, sums = load_state(states, place, chunk < chunks - 1, first, 0, FEATURES, E, F, E)
    later = tl.minimum(stop, tokens - 1)
    centre = _centre_of(mixes, later, later + 1, VALUE_WIDTH, C, E, P)
    end = stop
    mark = load_mark(marks, head, tl.cdiv(stop, C) - 1, first, tokens, FEATURES, C, F)
    while end > start:
        at = (end - 1) // C * C
        raw = load_block(k, at, end, first, skn, skd, float("-inf"), WIDTH, C, F)
        z = logs_of(raw, at, end, first, MAP, WIDTH, C, F)
        x = load_logs(q, at, end, first, sqn, sqd, MAP, WIDTH, C, F)
        peak = load_numbers(stats, at, end, 0.0, C)
        g = load_block(do, at, end, 0, sgn, sgd, 0.0, VALUE_WIDTH, C, E)
        y = load_values(v, at, end, 0, svn, svd, origin, VALUE_WIDTH, C, E, P)
        delta = load_numbers(deltas, at, end, 0.0, C)
        bottom, low = _range_before(k, stats + 2 * step_stat, marks, head, at, end, first, skn, skd, tokens, MAP, WIDTH,
                                    FEATURES, C, F)  # fmt: skip
        inside = inside_range(low, end - at, C)
        keys = weights_of(z - mark[None, :], inside)
        queries = _shares_of(x + mark[None, :] - peak[:, None], stats + step_stat, at, end, inside, C, P)
        if P == "ieee":
            new = _centre_of(mixes, at + low, end, VALUE_WIDTH, C, E, P)
            mass, y, centre = _moved(mass, sums, centre, new, P), y - new, new
        pulls = product(y, g, tl.zeros([C, C], tl.float32), False, True, True, P) - delta[None, :]
        pulls = causal(pulls, at, True, C)
        dz = product(y, sums, tl.zeros([C, F], tl.float32), False, True, True, P) - mass[None, :]
        dz = product(pulls, queries, dz, False, False, False, P) * keys
        store_block(dk, _chained(raw, dz, MAP), inside, at, first, sdn, WIDTH, C, F)
        pairs = causal(product(keys, queries, tl.zeros([C, C], tl.float32), False, True, False, P), at, True, C)
        dy = product(keys, sums, tl.zeros([C, E], tl.float32), False, False, False, P)
        dy = product(pairs, g, dy, False, False, False, P)
        store_block(dv, dy, inside, at, 0, sen, VALUE_WIDTH, C, E)
        fade = tl.exp(bottom - mark)
        mass = (mass + tl.sum(queries * delta[:, None], 0)) * fade
        sums = product(queries, g, sums, True, False, True, P) * fade[:, None]
        mark, end = bottom, at + low
