"""Triton kernels for attention by positive features, forward and backward; the feature map is their parameter.

The mathematics is that of :mod:`visionattn.ops.positive`, with logarithms to base 2: z is ``log2 phi(x)``. Keys are
read in blocks with an online maximum a feature (:func:`_gather`), then queries read the slots (:func:`_answer`).
Features exist in registers only. D is the padded width of a head, F the padded number of features.

Either direction is one launch of one kernel. For few tokens a program has a head to itself. For many, heads are split
into chunks: the programs of lower numbers fill slots, the last of a head to finish joins what all of them left, in
fixed order, and raises the head's flag, which the programs of higher numbers wait for. Programs start in the order of
their numbers, so those that are waited for run already. Nothing is summed by atomics: results are the same, bit by bit,
from run to run.
"""

import triton
import triton.language as tl

from visionattn.ops.fused.tiles import arrive, load_columns, load_matrix, load_rows, share, store_rows, wait_for

EXP: tl.constexpr = tl.constexpr(0)
ELU: tl.constexpr = tl.constexpr(1)
RELU: tl.constexpr = tl.constexpr(2)
RANDOM: tl.constexpr = tl.constexpr(3)
SPHERE: tl.constexpr = tl.constexpr(4)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
NEVER: tl.constexpr = tl.constexpr(-1e30)
EPSILON: tl.constexpr = tl.constexpr(1e-6)
FLOOR: tl.constexpr = tl.constexpr(1e-20)


@triton.jit
def _picked(base, rows, keep, width, D: tl.constexpr):
    """Load the given rows, (F,), of a contiguous (rows, width) as (F, D), zeros where they are not kept."""
    d = tl.arange(0, D)
    return tl.load(base + rows[:, None] * width + d[None, :], mask=keep[:, None] & (d[None, :] < width), other=0.0)


@triton.jit
def _of_node(values, node):
    """Return the value of each feature's node of quadrature, (F,), from those of all nodes."""
    chosen = tl.zeros(node.shape, tl.float32)
    for index in tl.static_range(len(values)):
        chosen = tl.where(node == index, values[index], chosen)
    return chosen


@triton.jit
def _logs(x, MAP: tl.constexpr):
    """Return z of features that are taken entry by entry."""
    x = x.to(tl.float32)
    if MAP == EXP:
        z = x * LOG2E
    elif MAP == ELU:
        z = tl.where(x > 0, tl.log2(1 + tl.maximum(x, 0.0)), x * LOG2E)
    else:
        z = tl.log2(tl.maximum(x, 0.0) + EPSILON)
    return z


@triton.jit
def _slope(x, MAP: tl.constexpr):
    """Return the derivative of the natural logarithm of features that are taken entry by entry."""
    x = x.to(tl.float32)
    if MAP == ELU:
        slope = tl.where(x > 0, 1 / (1 + x), 1.0)
    else:
        slope = tl.where(x >= 0, 1 / (x + EPSILON), 0.0)
    return slope


@triton.jit
def _finely(x, matrix, P: tl.constexpr):
    """Return ``x matrix``; for x of float32 and a matrix of half precision, as if in float32."""
    high = x.to(matrix.dtype)
    y = tl.dot(high, matrix, input_precision=P)
    if x.dtype != matrix.dtype:
        y = tl.dot((x - high.to(tl.float32)).to(matrix.dtype), matrix, y, input_precision=P)
    return y


@triton.jit
def _key_logs(
    k, draws, low, bank, spread, warp, warp_low, gain, square, MAP: tl.constexpr, SPLIT: tl.constexpr, P: tl.constexpr
):
    """Return z of keys (D, BLOCK), as (F, BLOCK)."""
    if MAP == RANDOM:
        high = k.to(draws.dtype)
        z = tl.dot(draws, high, input_precision=P)
        if k.dtype != draws.dtype:
            z = tl.dot(draws, (k - high.to(tl.float32)).to(draws.dtype), z, input_precision=P)
        if SPLIT:
            z = tl.dot(low, k, z, input_precision=P)
            warped = tl.dot(warp, k, input_precision=P)
            warped = tl.dot(warp_low, k, warped, input_precision=P)
        else:
            warped = k.to(tl.float32)
        z = z * gain[:, None] - tl.sum(warped * warped, 0)[None, :] * square
    elif MAP == SPHERE:
        wide = k.to(tl.float32)
        size = tl.rsqrt(tl.sum(wide * wide, 0) + EPSILON)
        t = tl.dot(bank, k, input_precision=P) * size[None, :]
        t = tl.log2(t * t + FLOOR)
        high = t.to(k.dtype)
        z = tl.dot(draws, k, input_precision=P) * (gain[:, None] * size[None, :])
        z = tl.dot(spread, high, z, input_precision=P)
        z = tl.dot(spread, (t - high.to(tl.float32)).to(k.dtype), z, input_precision=P)
    else:
        z = _logs(k, MAP)
    return z


@triton.jit
def _query_logs(q, draws, low, bank, spread, gain, MAP: tl.constexpr, SPLIT: tl.constexpr, P: tl.constexpr):
    """Return z of queries (BLOCK, D), as (BLOCK, F), less what a query's features have in common."""
    if MAP == RANDOM:
        z = _finely(q, tl.trans(draws), P)
        if SPLIT:
            z = tl.dot(q, tl.trans(low), z, input_precision=P)
        z = z * gain[None, :]
    elif MAP == SPHERE:
        wide = q.to(tl.float32)
        size = tl.rsqrt(tl.sum(wide * wide, 1) + EPSILON)
        t = tl.dot(q, tl.trans(bank), input_precision=P) * size[:, None]
        t = tl.log2(t * t + FLOOR)
        high = t.to(q.dtype)
        z = tl.dot(q, tl.trans(draws), input_precision=P) * (gain[None, :] * size[:, None])
        z = tl.dot(high, tl.trans(spread), z, input_precision=P)
        z = tl.dot((t - high.to(tl.float32)).to(q.dtype), tl.trans(spread), z, input_precision=P)
    else:
        z = _logs(q, MAP)
    return z


@triton.jit
def _input_gradient(x, dz, draws, bank, spread, gain, MAP: tl.constexpr, P: tl.constexpr):
    """Return the gradient of x (BLOCK, D) from that of the natural logarithms of its features, (BLOCK, F)."""
    if MAP == EXP:
        dx = dz
    elif MAP == RANDOM:
        dx = _finely(dz * (gain / LOG2E)[None, :], draws, P)
    elif MAP == SPHERE:
        wide = x.to(tl.float32)
        size = tl.rsqrt(tl.sum(wide * wide, 1) + EPSILON)[:, None]
        t = tl.dot(x, tl.trans(bank), input_precision=P) * size
        dt = _finely(dz, spread, P) * (2 * t / (t * t + FLOOR))
        du = _finely(dz * (gain / LOG2E)[None, :], draws, P) + _finely(dt, bank, P)
        dx = size * (du - wide * (size * size * tl.sum(wide * du, 1)[:, None]))
    else:
        dx = dz * _slope(x, MAP)
    return dx


@triton.jit
def _gather_block(
    k, v, at, stop, skn, skd, svn, svd, top, mass, slots, draws, low, bank, spread, warp, warp_low, gain, square,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, SPLIT: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Take a block of keys and values into the slots."""
    x = load_columns(k, at, stop, skn, skd, WIDTH, BLOCK, D, EDGE)
    y = load_rows(v, at, stop, svn, svd, VALUE_WIDTH, BLOCK, E, EDGE)
    z = _key_logs(x, draws, low, bank, spread, warp, warp_low, gain, square, MAP, SPLIT, P)
    if EDGE:
        z = tl.where((at + tl.arange(0, BLOCK) < stop)[None, :], z, NEVER)
    above = tl.maximum(top, tl.max(z, 1))
    weights = tl.exp2(z - above[:, None])
    fade = tl.exp2(top - above)
    mass = mass * fade + tl.sum(weights, 1)
    slots = tl.dot(weights.to(y.dtype), y, slots * fade[:, None], input_precision=P)
    return above, mass, slots


@triton.jit
def _gather(
    k, v, start, stop, skn, skd, svn, svd, draws, low, bank, spread, warp, warp_low, gain, square,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, SPLIT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Fill the slots with some tokens: the maximum of z and the mass above it, (F,), and the sums (F, E)."""
    top = tl.full([F], NEVER, tl.float32)
    mass = tl.zeros([F], tl.float32)
    slots = tl.zeros([F, E], tl.float32)
    edge = start + (stop - start) // BLOCK * BLOCK
    for at in tl.range(start, edge, BLOCK, num_stages=STAGES):
        top, mass, slots = _gather_block(
            k, v, at, stop, skn, skd, svn, svd, top, mass, slots, draws, low, bank, spread, warp, warp_low, gain,
            square, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, SPLIT, P, False)  # fmt: skip
    if edge < stop:
        top, mass, slots = _gather_block(
            k, v, edge, stop, skn, skd, svn, svd, top, mass, slots, draws, low, bank, spread, warp, warp_low, gain,
            square, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, SPLIT, P, True)  # fmt: skip
    return top, mass, slots


@triton.jit
def _join(parts, tops, masses, head, chunks, F: tl.constexpr, E: tl.constexpr):
    """Join what the chunks of a head left, in their order."""
    f = tl.arange(0, F)
    top = tl.full([F], NEVER, tl.float32)
    for first in range(0, chunks, 16):
        c = first + tl.arange(0, 16)
        several = tl.load(tops + (head * chunks + c[:, None]) * F + f[None, :], mask=(c < chunks)[:, None], other=NEVER)
        top = tl.maximum(top, tl.max(several, 0))
    mass = tl.zeros([F], tl.float32)
    slots = tl.zeros([F, E], tl.float32)
    for first in range(0, chunks, 4):
        for one in tl.static_range(4):
            known = first + one < chunks
            at = head * chunks + first + one
            share = tl.load(masses + at * F + f, mask=known, other=0.0)
            share *= tl.exp2(tl.load(tops + at * F + f, mask=known, other=NEVER) - top)
            mass += share
            slots += share[:, None] * load_matrix(parts, tl.where(known, at, head * chunks), F, E, F, E)
    return top, mass, slots


@triton.jit
def _answer_block(
    q, o, at, stop, sqn, sqd, son, slots, level, draws, low, bank, spread, gain,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, SPLIT: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Read the slots by a block of queries."""
    x = load_rows(q, at, stop, sqn, sqd, WIDTH, BLOCK, D, EDGE)
    z = _query_logs(x, draws, low, bank, spread, gain, MAP, SPLIT, P) + level[None, :]
    weights = tl.exp2(z - tl.max(z, 1)[:, None])
    mixed = tl.dot(weights.to(slots.dtype), slots, input_precision=P) * (1 / tl.sum(weights, 1))[:, None]
    store_rows(o, mixed, at, stop, son, VALUE_WIDTH, BLOCK, E, EDGE)


@triton.jit
def _answer(
    q, o, start, stop, sqn, sqd, son, slots, level, draws, low, bank, spread, gain,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, MAP: tl.constexpr, SPLIT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Read the slots, (F, E), whose logarithmic mass is ``level``, by some queries."""
    edge = start + (stop - start) // BLOCK * BLOCK
    for at in tl.range(start, edge, BLOCK, num_stages=STAGES):
        _answer_block(q, o, at, stop, sqn, sqd, son, slots, level, draws, low, bank, spread, gain, WIDTH, VALUE_WIDTH,
                      D, E, BLOCK, MAP, SPLIT, P, False)  # fmt: skip
    if edge < stop:
        _answer_block(q, o, edge, stop, sqn, sqd, son, slots, level, draws, low, bank, spread, gain, WIDTH, VALUE_WIDTH,
                      D, E, BLOCK, MAP, SPLIT, P, True)  # fmt: skip


@triton.jit
def _keep(slots_out, top_out, mass_out, level_out, head, top, mass, slots, prior, FEATURES: tl.constexpr,
          F: tl.constexpr, E: tl.constexpr, SAVE: tl.constexpr):  # fmt: skip
    """Store a head's state; return the slots as stored and the logarithm of their mass, the prior included."""
    f, e = tl.arange(0, F), tl.arange(0, E)
    head = head.to(tl.int64)
    slots = (slots / mass[:, None]).to(slots_out.dtype.element_ty)
    level = tl.where(f < FEATURES, top + tl.log2(mass) + prior, NEVER)
    if SAVE:
        tl.store(slots_out + (head * F + f[:, None]) * E + e[None, :], slots)
        tl.store(top_out + head * F + f, top)
        tl.store(mass_out + head * F + f, mass)
        tl.store(level_out + head * F + f, level)
    return slots, level


@triton.jit(do_not_specialize=["tokens", "fillers", "chunks", "readers"])
def forward(
    q, k, v, o, slots_out, top_out, mass_out, level_out,
    draws_in, low_in, bank_in, warp_in, warp_low_in, gains, priors, square, draws_each, banks,
    parts, tops, masses, flags,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, sob, soh, son,
    heads, tokens, fillers, chunks, readers,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BANKS: tl.constexpr,
    BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, SPLIT: tl.constexpr,
    WHOLE: tl.constexpr, SAVE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Attend. Grid: (heads,) of all images if WHOLE, else (heads (chunks + readers),): all keys, then all queries."""
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

    f = tl.arange(0, F)
    draws, low, bank, spread, warp, warp_low, gain, prior = 0, 0, 0, 0, 0, 0, 0, 0
    if MAP == RANDOM or MAP == SPHERE:
        node, known = f // (draws_each * banks), f < FEATURES
        rows = (node * heads + h) * draws_each + f % draws_each
        draws = _picked(draws_in, rows, known, WIDTH, D)
        gain, prior = _of_node(gains, node), _of_node(priors, node)
        if SPLIT:
            low = _picked(low_in, rows, known, WIDTH, D)
            warp = load_matrix(warp_in, h, WIDTH, WIDTH, D, D)
            warp_low = load_matrix(warp_low_in, h, WIDTH, WIDTH, D, D)
        if MAP == SPHERE:
            each = tl.arange(0, BANKS)
            bank = _picked(bank_in, each, each < banks, WIDTH, D)
            spread = (f // draws_each % banks)[:, None] == each[None, :]
            spread = (spread & known[:, None]).to(bank.dtype)

    if WHOLE:
        top, mass, slots = _gather(
            k, v, start, stop, skn, skd, svn, svd, draws, low, bank, spread, warp, warp_low, gain, square,
            WIDTH, VALUE_WIDTH, F, D, E, BLOCK, STAGES, MAP, SPLIT, P)  # fmt: skip
        kept, level = _keep(
            slots_out, top_out, mass_out, level_out, head, top, mass, slots, prior, FEATURES, F, E, SAVE
        )
        _answer(q, o, start, stop, sqn, sqd, son, kept, level, draws, low, bank, spread, gain,
                WIDTH, VALUE_WIDTH, D, E, QUERY_BLOCK, STAGES, MAP, SPLIT, P)  # fmt: skip
    elif answers:
        wait_for(flags + head, chunks + 1)
        kept = load_matrix(slots_out, head, F, E, F, E)
        level = tl.load(level_out + head * F + f)
        _answer(q, o, start, stop, sqn, sqd, son, kept, level, draws, low, bank, spread, gain,
                WIDTH, VALUE_WIDTH, D, E, QUERY_BLOCK, STAGES, MAP, SPLIT, P)  # fmt: skip
    else:
        top, mass, slots = _gather(
            k, v, start, stop, skn, skd, svn, svd, draws, low, bank, spread, warp, warp_low, gain, square,
            WIDTH, VALUE_WIDTH, F, D, E, BLOCK, STAGES, MAP, SPLIT, P)  # fmt: skip
        e = tl.arange(0, E)
        tl.store(tops + item * F + f, top)
        tl.store(masses + item * F + f, mass)
        mean = (slots / mass[:, None]).to(parts.dtype.element_ty)
        tl.store(parts + (item * F + f[:, None]) * E + e[None, :], mean)
        if arrive(flags + head) == chunks - 1:
            top, mass, slots = _join(parts, tops, masses, head, chunks, F, E)
            _keep(slots_out, top_out, mass_out, level_out, head, top, mass, slots, prior, FEATURES, F, E, True)
            arrive(flags + head)


@triton.jit
def _query_gradient_block(
    q, do, dq, at, stop, sqn, sqd, sgn, sgd, sdn, dslots, pull, slots, level, draws, low, back, bank, spread, gain,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, SPLIT: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Take the gradients of a block of queries."""
    x = load_rows(q, at, stop, sqn, sqd, WIDTH, BLOCK, D, EDGE)
    g = load_rows(do, at, stop, sgn, sgd, VALUE_WIDTH, BLOCK, E, EDGE)
    z = _query_logs(x, draws, low, bank, spread, gain, MAP, SPLIT, P) + level[None, :]
    weights = tl.exp2(z - tl.max(z, 1)[:, None])
    weights = weights * (1 / tl.sum(weights, 1))[:, None]
    dweights = tl.dot(g, tl.trans(slots), input_precision=P)
    mean = tl.sum(weights * dweights, 1)
    dz = weights * (dweights - mean[:, None])
    dx = _input_gradient(x, dz, back, bank, spread, gain, MAP, P)
    store_rows(dq, dx, at, stop, sdn, WIDTH, BLOCK, D, EDGE)
    dslots = tl.dot(tl.trans(g), weights.to(g.dtype), dslots, input_precision=P)
    return dslots, pull + tl.sum(weights * mean[:, None], 0)


@triton.jit
def _query_gradients(
    q, do, dq, start, stop, sqn, sqd, sgn, sgd, sdn, slots, level, draws, low, back, bank, spread, gain,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, SPLIT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Store the gradient of some queries; return that of the slots, (E, F), and, (F,), of their mass, less the slots'.

    With weights p of a query and the gradient g of its output y, the gradient of z is ``p (slots g - y.g)``.
    """
    dslots = tl.zeros([E, F], tl.float32)
    pull = tl.zeros([F], tl.float32)
    edge = start + (stop - start) // BLOCK * BLOCK
    for at in tl.range(start, edge, BLOCK, num_stages=STAGES):
        dslots, pull = _query_gradient_block(
            q, do, dq, at, stop, sqn, sqd, sgn, sgd, sdn, dslots, pull, slots, level, draws, low, back, bank, spread,
            gain, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, SPLIT, P, False)  # fmt: skip
    if edge < stop:
        dslots, pull = _query_gradient_block(
            q, do, dq, edge, stop, sqn, sqd, sgn, sgd, sdn, dslots, pull, slots, level, draws, low, back, bank, spread,
            gain, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, SPLIT, P, True)  # fmt: skip
    return dslots, pull


@triton.jit
def _key_gradient_block(
    k, v, dk, dv, at, stop, skn, skd, svn, svd, sdn, sen, dslots, pull, scale, top,
    draws, low, back, bank, spread, warp, warp_low, gain, square,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, SPLIT: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a block of keys and values."""
    x = load_rows(k, at, stop, skn, skd, WIDTH, BLOCK, D, EDGE)
    y = load_rows(v, at, stop, svn, svd, VALUE_WIDTH, BLOCK, E, EDGE)
    z = _query_logs(x, draws, low, bank, spread, gain, MAP, SPLIT, P)
    if MAP == RANDOM:
        if SPLIT:
            warped = tl.dot(x, tl.trans(warp), input_precision=P)
            warped = tl.dot(x, tl.trans(warp_low), warped, input_precision=P)
        else:
            warped = x.to(tl.float32)
        z -= tl.sum(warped * warped, 1)[:, None] * square
    weights = tl.exp2(z - top[None, :])
    dy = tl.dot(weights.to(dslots.dtype), dslots, input_precision=P) * scale
    store_rows(dv, dy, at, stop, sen, VALUE_WIDTH, BLOCK, E, EDGE)
    dweights = tl.dot(y, tl.trans(dslots), input_precision=P) * scale
    dz = weights * (dweights - pull[None, :])
    dx = _input_gradient(x, dz, back, bank, spread, gain, MAP, P)
    if MAP == RANDOM:
        dx -= warped * (tl.sum(dz, 1)[:, None] * (2 * square / LOG2E))
    store_rows(dk, dx, at, stop, sdn, WIDTH, BLOCK, D, EDGE)


@triton.jit
def _key_gradients(
    k, v, dk, dv, start, stop, skn, skd, svn, svd, sdn, sen, dslots, pull, scale, top,
    draws, low, back, bank, spread, warp, warp_low, gain, square,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, MAP: tl.constexpr, SPLIT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Store the gradients of some keys and values, from those of the slots, (F, E), and ``pull``, over the mass."""
    edge = start + (stop - start) // BLOCK * BLOCK
    for at in tl.range(start, edge, BLOCK, num_stages=STAGES):
        _key_gradient_block(
            k, v, dk, dv, at, stop, skn, skd, svn, svd, sdn, sen, dslots, pull, scale, top, draws, low, back, bank,
            spread, warp, warp_low, gain, square, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, SPLIT, P, False)  # fmt: skip
    if edge < stop:
        _key_gradient_block(
            k, v, dk, dv, edge, stop, skn, skd, svn, svd, sdn, sen, dslots, pull, scale, top, draws, low, back, bank,
            spread, warp, warp_low, gain, square, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, SPLIT, P, True)  # fmt: skip


@triton.jit
def _scaled(dslots, pull, mass, slots):
    """Divide by the mass, and the slots' gradient by its size too, so that half precision holds it.

    What is lost in rounding it is added to the pull, times the slots: it is the difference of the two that counts.
    """
    dslots = dslots / mass[:, None]
    scale = tl.maximum(tl.max(tl.max(tl.abs(dslots), 1), 0), 1e-30)
    rounded = (dslots / scale).to(slots.dtype)
    pull = pull / mass + tl.sum((rounded.to(tl.float32) * scale - dslots) * slots.to(tl.float32), 1)
    return rounded, pull, scale


@triton.jit(do_not_specialize=["tokens", "fillers", "chunks", "readers"])
def backward(
    q, k, v, do, dq, dk, dv, slots_in, top_in, mass_in, level_in,
    draws_in, low_in, back_in, bank_in, warp_in, warp_low_in, gains, square, draws_each, banks,
    parts, pulls, dslots_out, pull_out, scale_out, flags,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, sgb, sgh, sgn, sgd, sdb, sdh, sdn, seb, seh, sen,
    heads, tokens, fillers, chunks, readers,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BANKS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, MAP: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, P: tl.constexpr,
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

    f, e = tl.arange(0, F), tl.arange(0, E)
    draws, low, back, bank, spread, warp, warp_low, gain = 0, 0, 0, 0, 0, 0, 0, 0
    if MAP == RANDOM or MAP == SPHERE:
        node, known = f // (draws_each * banks), f < FEATURES
        rows = (node * heads + h) * draws_each + f % draws_each
        draws = _picked(draws_in, rows, known, WIDTH, D)
        back, gain = draws, _of_node(gains, node)
        if SPLIT:
            low = _picked(low_in, rows, known, WIDTH, D)
            back = _picked(back_in, rows, known, WIDTH, D)
            warp = load_matrix(warp_in, h, WIDTH, WIDTH, D, D)
            warp_low = load_matrix(warp_low_in, h, WIDTH, WIDTH, D, D)
        if MAP == SPHERE:
            each = tl.arange(0, BANKS)
            bank = _picked(bank_in, each, each < banks, WIDTH, D)
            spread = (f // draws_each % banks)[:, None] == each[None, :]
            spread = (spread & known[:, None]).to(bank.dtype)
    top = tl.load(top_in + head * F + f)
    mass = tl.load(mass_in + head * F + f)

    if WHOLE:
        slots = load_matrix(slots_in, head, F, E, F, E)
        level = tl.load(level_in + head * F + f)
        turned, pull = _query_gradients(
            q, do, dq, start, stop, sqn, sqd, sgn, sgd, sdn, slots, level, draws, low, back, bank, spread, gain,
            WIDTH, VALUE_WIDTH, F, D, E, BLOCK, STAGES, MAP, SPLIT, P)  # fmt: skip
        dslots, pull, scale = _scaled(tl.trans(turned), pull, mass, slots)
        _key_gradients(
            k, v, dk, dv, start, stop, skn, skd, svn, svd, sdn, sen, dslots, pull, scale, top, draws, low, back, bank,
            spread, warp, warp_low, gain, square, WIDTH, VALUE_WIDTH, D, E, BLOCK, STAGES, MAP, SPLIT, P)  # fmt: skip
    elif answers:
        wait_for(flags + head, chunks + 1)
        dslots = load_matrix(dslots_out, head, F, E, F, E)
        pull = tl.load(pull_out + head * F + f)
        scale = tl.load(scale_out + head)
        _key_gradients(
            k, v, dk, dv, start, stop, skn, skd, svn, svd, sdn, sen, dslots, pull, scale, top, draws, low, back, bank,
            spread, warp, warp_low, gain, square, WIDTH, VALUE_WIDTH, D, E, BLOCK, STAGES, MAP, SPLIT, P)  # fmt: skip
    else:
        slots = load_matrix(slots_in, head, F, E, F, E)
        level = tl.load(level_in + head * F + f)
        turned, pull = _query_gradients(
            q, do, dq, start, stop, sqn, sqd, sgn, sgd, sdn, slots, level, draws, low, back, bank, spread, gain,
            WIDTH, VALUE_WIDTH, F, D, E, BLOCK, STAGES, MAP, SPLIT, P)  # fmt: skip
        tl.store(pulls + item * F + f, pull)
        tl.store(parts + (item * E + e[:, None]) * F + f[None, :], turned)
        if arrive(flags + head) == chunks - 1:
            turned = tl.zeros([E, F], tl.float32)
            pull = tl.zeros([F], tl.float32)
            for index in range(chunks):
                turned += load_matrix(parts, head * chunks + index, E, F, E, F)
                pull += tl.load(pulls + (head * chunks + index) * F + f)
            dslots, pull, scale = _scaled(tl.trans(turned), pull, mass, slots)
            tl.store(dslots_out + (head * F + f[:, None]) * E + e[None, :], dslots)
            tl.store(pull_out + head * F + f, pull)
            tl.store(scale_out + head, scale)
            arrive(flags + head)
