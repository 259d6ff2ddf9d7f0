"""Triton kernels for causal attention by positive features: states of keys, and the forward pass.

The mathematics is that of :mod:`visionattn.ops.positive`. The natural logarithms of features, x of queries and z of
keys, are made on chip from what is in memory: of maps that are taken entry by entry, from queries and keys themselves,
by the map EXP, which is none, from logarithms that PyTorch made. In the names of shapes, F is the padded number of
features and E the padded width of values, or what one program has of either; C is the number of tokens in a block.

A state holds some keys: for each feature the maximum ``top`` of z, the sum ``mass`` of ``exp(z - top)`` and the sums
``slots`` of ``exp(z - top)`` times the values. Heads are split into chunks. :func:`gather` makes the states of chunks,
:func:`join` makes of them those of all keys before each chunk, and each program of :func:`forward` goes on from there.

A block is attended to as a whole. With ``above``, the maximum of ``top`` and of all z of the block, keys are
``exp(z - above)`` and queries ``exp(x + above - peak)``, where the peak is a query's maximum: neither is more than 1,
and weights are products of matrices. Tokens of the block that come after a query have part in ``above``. That is
accurate as long as they raise it by LIMIT at most above what the block's first query sees, for its weights sum up to
``exp(-LIMIT)`` at least. Where they raise it more, a range of the block is taken at a time, by the same lines: half of
it, or half of that, down to one token.

Little is lost in sums where values have much in common, or one key outweighs all others. Values in half precision are
multiplied exactly, by weights that are rounded once for all sums, and states are read with all bits of float32. Values
in float32 are taken less an origin of the head.

All sums are taken in fixed order, and no program reads what the same launch writes: results are the same, bit by bit,
from run to run.
"""

import triton
import triton.language as tl

from visionattn.ops.fused.positive import ELU, EPSILON, RELU
from visionattn.ops.fused.tiles import NEVER, span


@triton.jit
def load_block(base, at, stop, first, stride_n, stride_d, other, WIDTH: tl.constexpr, C: tl.constexpr,
               D: tl.constexpr):  # fmt: skip
    """Load rows from ``at`` and columns from ``first`` on of (tokens, WIDTH) as (C, D)."""
    n, d = tl.arange(0, C), first + tl.arange(0, D)
    base += tl.full((), at, tl.int64) * stride_n
    inside = (n < stop - at)[:, None] & (d < WIDTH)[None, :]
    return tl.load(base + n[:, None] * stride_n + d[None, :] * stride_d, mask=inside, other=other)


@triton.jit
def store_block(base, value, keep, at, first, stride_n, WIDTH: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Store those rows of (C, D) that are to be kept, from row ``at`` and column ``first`` on of (tokens, WIDTH)."""
    n, d = tl.arange(0, C), first + tl.arange(0, D)
    base += tl.full((), at, tl.int64) * stride_n
    inside = keep[:, None] & (d < WIDTH)[None, :]
    tl.store(base + n[:, None] * stride_n + d[None, :], value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_numbers(base, at, stop, other, C: tl.constexpr):
    """Load one number a token, (C,)."""
    n = at + tl.arange(0, C)
    return tl.load(base + n, mask=n < stop, other=other)


@triton.jit
def logs_of(x, at, stop, first, MAP: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, F: tl.constexpr):
    """Return the logarithms of the features of a block that was loaded with minus infinity outside, NEVER there.

    They are finite: minus infinity stands for the logarithm of zero, NaN stays.
    """
    z = x.to(tl.float32)
    if MAP == ELU:
        z = tl.where(z > 0, tl.log(1 + tl.maximum(z, 0.0)), z)
    elif MAP == RELU:
        n, f = tl.arange(0, C), first + tl.arange(0, F)
        inside = (n < stop - at)[:, None] & (f < WIDTH)[None, :]
        z = tl.log(tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) + EPSILON)
        z = tl.where(inside, z, NEVER)
    return tl.maximum(z, NEVER, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_logs(base, at, stop, first, stride_n, stride_d, MAP: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr,
              F: tl.constexpr):  # fmt: skip
    """Load queries or keys, and return the logarithms of their features, (C, F)."""
    x = load_block(base, at, stop, first, stride_n, stride_d, float("-inf"), WIDTH, C, F)
    return logs_of(x, at, stop, first, MAP, WIDTH, C, F)


@triton.jit
def load_state(states, place, known, first, left, FEATURES: tl.constexpr, VALUES: tl.constexpr, F: tl.constexpr,
               E: tl.constexpr):  # fmt: skip
    """Load the features from ``first`` and values from ``left`` on of a state; that of no tokens if not ``known``."""
    f, e = first + tl.arange(0, F), left + tl.arange(0, E)
    states += place * (FEATURES * (VALUES + 2))
    known = (f < FEATURES) & known
    slots = tl.load(states + f[:, None] * VALUES + e[None, :], mask=known[:, None], other=0.0)
    top = tl.load(states + FEATURES * VALUES + f, mask=known, other=NEVER)
    mass = tl.load(states + FEATURES * (VALUES + 1) + f, mask=known, other=0.0)
    return top, mass, slots


@triton.jit
def store_state(states, place, first, top, mass, slots, FEATURES: tl.constexpr, F: tl.constexpr, E: tl.constexpr):
    """Store the features from ``first`` on of a state, with all values."""
    f, e = first + tl.arange(0, F), tl.arange(0, E)
    states += place * (FEATURES * (E + 2))
    tl.store(states + f[:, None] * E + e[None, :], slots)
    tl.store(states + FEATURES * E + f, top)
    tl.store(states + FEATURES * (E + 1) + f, mass)


@triton.jit
def load_mark(marks, head, block, first, tokens, FEATURES: tl.constexpr, C: tl.constexpr, F: tl.constexpr):
    """Load the top after a block of a head, (F,); NEVER before the first."""
    f = first + tl.arange(0, F)
    place = (head * tl.cdiv(tokens, C) + block) * FEATURES
    return tl.load(marks + place + f, mask=(f < FEATURES) & (block >= 0), other=NEVER)


@triton.jit
def product(a, b, total, LEFT: tl.constexpr, RIGHT: tl.constexpr, EXACT: tl.constexpr, P: tl.constexpr):
    """Return the total and ``a b``, all of float32; a is transposed if LEFT, b if RIGHT.

    Numbers are multiplied to Triton's precision P, or ``split`` in parts of bfloat16 which have 8 bits each: one of
    what is bfloat16, two of float16 or float32. That leaves errors far below a rounding of outputs in half precision.
    If EXACT, there are none but those of float32 where ``a`` was :func:`rounded` or has half precision. Parts are
    ``emulated`` for Triton's interpreter, which cannot multiply matrices of bfloat16.
    """
    if P == "ieee" or (a.dtype == b.dtype and a.dtype != tl.float32):
        total = tl.dot(tl.trans(a) if LEFT else a, tl.trans(b) if RIGHT else b, total, input_precision="ieee")
    else:
        a_high, a_middle, _ = _split(a, LEFT, P)
        b_high, b_middle, b_low = _split(b, RIGHT, P)
        total = tl.dot(a_high, b_high, total)
        if a.dtype != tl.bfloat16:
            total = tl.dot(a_middle, b_high, total)
        if b.dtype != tl.bfloat16:
            total = tl.dot(a_high, b_middle, total)
            if EXACT and a.dtype != tl.bfloat16:
                total = tl.dot(a_middle, b_middle, total)
            if EXACT and b.dtype == tl.float32:
                total = tl.dot(a_high, b_low, total)
    return total


@triton.jit
def _split(x, TURNED: tl.constexpr, P: tl.constexpr):
    """Return three of bfloat16 whose sum is x, nearly."""
    rest = x.to(tl.float32)
    high = rest.to(tl.bfloat16)
    rest -= high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    if P == "emulated":
        high, middle, low = high.to(tl.float32), middle.to(tl.float32), low.to(tl.float32)
    if TURNED:
        high, middle, low = tl.trans(high), tl.trans(middle), tl.trans(low)
    return high, middle, low


@triton.jit
def rounded(weights, P: tl.constexpr):
    """Return weights of 16 bits if they shall be split, which two of bfloat16 have.

    All sums must take the same weights: errors of weights are then in proportion to the spread of the values.
    """
    if P != "ieee":
        weights = (weights.to(tl.int32, bitcast=True) & -256).to(tl.float32, bitcast=True)
    return weights


@triton.jit
def highest(top, z, stop, C: tl.constexpr):
    """Return the maximum of top and the rows up to ``stop`` of z, (F,)."""
    return tl.maximum(top, tl.max(tl.where((tl.arange(0, C) < stop)[:, None], z, NEVER), 0))


@triton.jit
def causal(pairs, at, TURNED: tl.constexpr, C: tl.constexpr):
    """Return what queries, in rows, have with keys, in columns, up to them, zeros elsewhere; TURNED: keys are in rows.

    Places are counted from ``at``, which changes nothing but that the compiler keeps no mask in registers all along.
    """
    row, column = (at + tl.arange(0, C))[:, None], (at + tl.arange(0, C))[None, :]
    return tl.where(row <= column if TURNED else row >= column, pairs, 0.0)


@triton.jit
def origin_of(v, tokens, first, stride_n, stride_d, VALUE_WIDTH: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
              P: tl.constexpr):  # fmt: skip
    """Return the origin of a head's values, (1, E): the mean of the first block, so that no outlier makes it.

    It is zero for values in half precision, whose products are exact.
    """
    origin = tl.zeros([E], tl.float32)
    if P == "ieee":
        y = load_block(v, 0, tokens, first, stride_n, stride_d, 0.0, VALUE_WIDTH, C, E)
        origin = tl.sum(y, 0) / tl.minimum(tokens, C)
    return origin[None, :]


@triton.jit
def load_values(base, at, stop, first, stride_n, stride_d, origin, WIDTH: tl.constexpr, C: tl.constexpr,
                E: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """Load values and return what they have beyond the origin, (C, E), of their type; any numbers outside."""
    y = load_block(base, at, stop, first, stride_n, stride_d, 0.0, WIDTH, C, E)
    if P == "ieee":
        y -= origin
    return y


@triton.jit
def inside_range(low, high, C: tl.constexpr):
    """Return which tokens of a block are in a range, (C,)."""
    n = tl.arange(0, C)
    return (n >= low) & (n < high)


@triton.jit
def weights_of(logs, inside):
    """Return ``exp(logs)`` of the tokens inside, zeros of others."""
    return tl.exp(tl.where(inside[:, None], logs, float("-inf")))


@triton.jit(do_not_specialize=["tokens", "parts"])
def gather(
    k, v, states, skb, skh, skn, skd, svb, svh, svn, svd, heads, tokens, parts,
    MAP: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, FEATURES: tl.constexpr, F: tl.constexpr,
    E: tl.constexpr, C: tl.constexpr, P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Make the states of all chunks of keys but the last. Grid: (batch x heads x parts, tiles of features)."""
    item, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * F
    head = item // parts
    start, stop = span((item % parts).to(tl.int32), parts + 1, tokens, C)
    k += head // heads * skb + head % heads * skh
    v += head // heads * svb + head % heads * svh
    origin = origin_of(v, tokens, 0, svn, svd, VALUE_WIDTH, C, E, P)
    top = tl.full([F], NEVER, tl.float32)
    mass = tl.zeros([F], tl.float32)
    sums = tl.zeros([F, E], tl.float32)
    for at in tl.range(start, stop, C, num_stages=STAGES):  # whole blocks: the last chunk has the rest
        z = load_logs(k, at, stop, first, skn, skd, MAP, WIDTH, C, F)
        y = load_values(v, at, stop, 0, svn, svd, origin, VALUE_WIDTH, C, E, P)
        above = tl.maximum(top, tl.max(z, 0))
        keys = rounded(tl.exp(z - above[None, :]), P)
        fade = tl.exp(top - above)
        mass = mass * fade + tl.sum(keys, 0)
        sums = product(keys, y, sums * fade[:, None], True, False, True, P)
        top = above
    store_state(states, item, first, top, mass, sums, FEATURES, F, E)


@triton.jit(do_not_specialize=["parts"])
def join(states, joined, parts, FEATURES: tl.constexpr, F: tl.constexpr, E: tl.constexpr):
    """Make the states of all keys up to the end of each part. Grid: (batch x heads, tiles of features)."""
    head, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * F
    top = tl.full([F], NEVER, tl.float32)
    mass = tl.zeros([F], tl.float32)
    sums = tl.zeros([F, E], tl.float32)
    for part in tl.range(parts, num_stages=4):  # loads of later parts are under way meanwhile
        place = head * parts + part
        new_top, new_mass, new_sums = load_state(states, place, True, first, 0, FEATURES, E, F, E)
        above = tl.maximum(top, new_top)
        fade, share = tl.exp(top - above), tl.exp(new_top - above)
        top, mass = above, mass * fade + new_mass * share
        sums = sums * fade[:, None] + new_sums * share[:, None]
        store_state(joined, place, first, top, mass, sums, FEATURES, F, E)


@triton.jit(do_not_specialize=["step_stat", "tokens", "chunks"])
def forward(
    q, k, v, o, mixes, stats, marks, states,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, sob, soh, son, step_stat, heads, tokens, chunks,
    MAP: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, F: tl.constexpr, VALUES: tl.constexpr,
    E: tl.constexpr, C: tl.constexpr, SAVE: tl.constexpr, P: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Attend. Grid: (batch x heads x chunks, tiles of values)."""
    item, left = tl.program_id(0).to(tl.int64), tl.program_id(1) * E
    head, chunk = item // chunks, (item % chunks).to(tl.int32)
    start, stop = span(chunk, chunks, tokens, C)
    q += head // heads * sqb + head % heads * sqh
    k += head // heads * skb + head % heads * skh
    v += head // heads * svb + head % heads * svh
    there = head // heads * sob + head % heads * soh
    mine = tl.arange(0, C)
    origin = origin_of(v, tokens, left, svn, svd, VALUE_WIDTH, C, E, P)
    top, mass, sums = load_state(states, head * (chunks - 1) + chunk - 1, chunk > 0, 0, left, F, VALUES, F, E)
    at = start
    while at < stop:
        end = tl.minimum((at // C + 1) * C, stop)
        z = load_logs(k, at, end, 0, skn, skd, MAP, WIDTH, C, F)
        x = load_logs(q, at, end, 0, sqn, sqd, MAP, WIDTH, C, F)
        y = load_values(v, at, end, left, svn, svd, origin, VALUE_WIDTH, C, E, P)
        base = tl.maximum(top, tl.max(load_logs(k, at, end, 0, skn, skd, MAP, WIDTH, 1, F), 0))
        above, next = tl.maximum(top, tl.max(z, 0)), end
        while tl.max(above - base, 0) > LIMIT:
            next = at + (next - at) // 2
            above = highest(top, z, next - at, C)
        inside = mine < next - at
        fade = tl.exp(top - above)
        top, mass, sums = above, mass * fade, sums * fade[:, None]
        peak = tl.max(x + above[None, :], 1)
        queries = rounded(tl.exp(x + above[None, :] - peak[:, None]), P)
        total = tl.sum(queries * mass[None, :], 1)
        mixed = product(queries, sums, tl.zeros([C, E], tl.float32), False, False, True, P)
        keys = rounded(weights_of(z - above[None, :], inside), P)
        mass += tl.sum(keys, 0)
        sums = product(keys, y, sums, True, False, True, P)
        pairs = product(queries, keys, tl.zeros([C, C], tl.float32), False, True, False, P)
        pairs = rounded(causal(pairs, at, False, C), P)
        total += tl.sum(pairs, 1)
        mixed = product(pairs, y, mixed, False, False, True, P) * (1 / total)[:, None]
        store_block(o + there, mixed + origin, inside, at, left, son, VALUE_WIDTH, C, E)
        if SAVE:
            store_block(mixes + head * tokens * VALUE_WIDTH, mixed, inside, at, left, VALUE_WIDTH, VALUE_WIDTH, C, E)
            if left == 0:
                stat = stats + head * tokens + at + mine
                tl.store(stat, peak, mask=inside)
                tl.store(stat + step_stat, total, mask=inside)
                span_of = at % C * (2 * C) + at % C + next - at
                tl.store(stat + 2 * step_stat, tl.zeros([C], tl.float32) + span_of, mask=inside)
                tl.store(marks + (head * tl.cdiv(tokens, C) + at // C) * F + tl.arange(0, F), top)
        at = next
