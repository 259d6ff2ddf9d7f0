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

from visionattn.ops.fused.tiles import (
    arrive,
    load_columns,
    load_mask,
    load_matrix,
    load_rows,
    share,
    store_rows,
    wait_for,
)

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
def _warped_keys(k, warp, warp_low, WARPED: tl.constexpr, P: tl.constexpr):
    """Return keys (D, BLOCK) as random features take them, in float32: multiplied by the warp if there is one."""
    if WARPED:
        x = tl.dot(warp, k, input_precision=P)
        x = tl.dot(warp_low, k, x, input_precision=P)
    else:
        x = k.to(tl.float32)
    return x


@triton.jit
def _warped_rows(x, warp, warp_low, WARPED: tl.constexpr, P: tl.constexpr):
    """Return queries or keys (BLOCK, D) as random features take them: in float32 if there is a warp."""
    if WARPED:
        y = tl.dot(x, tl.trans(warp), input_precision=P)
        x = tl.dot(x, tl.trans(warp_low), y, input_precision=P)
    return x


@triton.jit
def _key_logs(k, draws, bank, spread, warp, warp_low, gain, square, MAP: tl.constexpr, WARPED: tl.constexpr,
              P: tl.constexpr):  # fmt: skip
    """Return z of keys (D, BLOCK), as (F, BLOCK)."""
    if MAP == RANDOM:
        wide = _warped_keys(k, warp, warp_low, WARPED, P)
        if WARPED or k.dtype != draws.dtype:
            high = wide.to(draws.dtype)
            z = tl.dot(draws, high, input_precision=P)
            z = tl.dot(draws, (wide - high.to(tl.float32)).to(draws.dtype), z, input_precision=P)
        else:
            z = tl.dot(draws, k, input_precision=P)
        z = z * gain[:, None] - tl.sum(wide * wide, 0)[None, :] * square
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
def _row_logs(x, draws, bank, spread, gain, MAP: tl.constexpr, P: tl.constexpr):
    """Return z of queries or keys (BLOCK, D), warped, as (BLOCK, F), less what all features of one have in common."""
    if MAP == RANDOM:
        z = _finely(x, tl.trans(draws), P) * gain[None, :]
    elif MAP == SPHERE:
        wide = x.to(tl.float32)
        size = tl.rsqrt(tl.sum(wide * wide, 1) + EPSILON)
        t = tl.dot(x, tl.trans(bank), input_precision=P) * size[:, None]
        t = tl.log2(t * t + FLOOR)
        high = t.to(x.dtype)
        z = tl.dot(x, tl.trans(draws), input_precision=P) * (gain[None, :] * size[:, None])
        z = tl.dot(high, tl.trans(spread), z, input_precision=P)
        z = tl.dot((t - high.to(tl.float32)).to(x.dtype), tl.trans(spread), z, input_precision=P)
    else:
        z = _logs(x, MAP)
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
    k, v, keep, at, stop, skn, skd, svn, svd, smn, top, mass, slots, draws, bank, spread, warp, warp_low, gain, square,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, WARPED: tl.constexpr, MASKED: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Take a block of keys and values into the slots."""
    x = load_columns(k, at, stop, skn, skd, WIDTH, BLOCK, D, EDGE)
    y = load_rows(v, at, stop, svn, svd, VALUE_WIDTH, BLOCK, E, EDGE)
    z = _key_logs(x, draws, bank, spread, warp, warp_low, gain, square, MAP, WARPED, P)
    if MASKED:
        kept = load_mask(keep, at, stop, smn, BLOCK)
        y = tl.where(kept[:, None], y, 0.0)
        z = tl.where(kept[None, :], z, NEVER)
    elif EDGE:
        z = tl.where((at + tl.arange(0, BLOCK) < stop)[None, :], z, NEVER)
    above = tl.maximum(top, tl.max(z, 1))
    weights = tl.exp2(z - above[:, None])
    if MASKED:  # where no key is kept yet, all logarithms are equal
        weights = tl.where(kept[None, :], weights, 0.0)
    fade = tl.exp2(top - above)
    mass = mass * fade + tl.sum(weights, 1)
    slots = tl.dot(weights.to(y.dtype), y, slots * fade[:, None], input_precision=P)
    return above, mass, slots


@triton.jit
def _gather(
    k, v, keep, start, stop, skn, skd, svn, svd, smn, draws, bank, spread, warp, warp_low, gain, square,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, WARPED: tl.constexpr, MASKED: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Fill the slots with some tokens: the maximum of z and the mass above it, (F,), and the sums (F, E)."""
    top = tl.full([F], NEVER, tl.float32)
    mass = tl.zeros([F], tl.float32)
    slots = tl.zeros([F, E], tl.float32)
    edge = start + (stop - start) // BLOCK * BLOCK
    for at in tl.range(start, edge, BLOCK, num_stages=STAGES):
        top, mass, slots = _gather_block(
            k, v, keep, at, stop, skn, skd, svn, svd, smn, top, mass, slots, draws, bank, spread, warp, warp_low, gain,
            square, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, WARPED, MASKED, P, False)  # fmt: skip
    if edge < stop:
        top, mass, slots = _gather_block(
            k, v, keep, edge, stop, skn, skd, svn, svd, smn, top, mass, slots, draws, bank, spread, warp, warp_low,
            gain, square, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, WARPED, MASKED, P, True)  # fmt: skip
    return top, mass, slots


@triton.jit
def _join(parts, tips, fillers, head, chunks, F: tl.constexpr, E: tl.constexpr):
    """Join what the chunks of a head left, in their order."""
    f = tl.arange(0, F)
    top = tl.full([F], NEVER, tl.float32)
    for first in range(0, chunks, 16):
        c = first + tl.arange(0, 16)
        several = tl.load(tips + (head * chunks + c[:, None]) * F + f[None, :], mask=(c < chunks)[:, None], other=NEVER)
        top = tl.maximum(top, tl.max(several, 0))
    mass = tl.zeros([F], tl.float32)
    slots = tl.zeros([F, E], tl.float32)
    for first in range(0, chunks, 4):
        for one in tl.static_range(4):
            known = first + one < chunks
            at = head * chunks + first + one
            share = tl.load(tips + (fillers + at) * F + f, mask=known, other=0.0)
            share *= tl.exp2(tl.load(tips + at * F + f, mask=known, other=NEVER) - top)
            mass += share
            slots += share[:, None] * load_matrix(parts, tl.where(known, at, head * chunks), F, E, F, E)
    return top, mass, slots


@triton.jit
def _answer_block(
    q, o, at, stop, sqn, sqd, son, slots, level, draws, bank, spread, warp, warp_low, gain,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, WARPED: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Read the slots by a block of queries."""
    x = load_rows(q, at, stop, sqn, sqd, WIDTH, BLOCK, D, EDGE)
    x = _warped_rows(x, warp, warp_low, WARPED, P)
    z = _row_logs(x, draws, bank, spread, gain, MAP, P) + level[None, :]
    weights = tl.exp2(z - tl.max(z, 1)[:, None])
    mixed = tl.dot(weights.to(slots.dtype), slots, input_precision=P) * (1 / tl.sum(weights, 1))[:, None]
    store_rows(o, mixed, at, stop, son, VALUE_WIDTH, BLOCK, E, EDGE)


@triton.jit
def _answer(
    q, o, start, stop, sqn, sqd, son, slots, level, draws, bank, spread, warp, warp_low, gain,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, MAP: tl.constexpr, WARPED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Read the slots, (F, E), whose logarithmic mass is ``level``, by some queries."""
    edge = start + (stop - start) // BLOCK * BLOCK
    for at in tl.range(start, edge, BLOCK, num_stages=STAGES):
        _answer_block(q, o, at, stop, sqn, sqd, son, slots, level, draws, bank, spread, warp, warp_low, gain,
                      WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, WARPED, P, False)  # fmt: skip
    if edge < stop:
        _answer_block(q, o, edge, stop, sqn, sqd, son, slots, level, draws, bank, spread, warp, warp_low, gain,
                      WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, WARPED, P, True)  # fmt: skip


@triton.jit
def _stored(stats, heads, head, F: tl.constexpr):
    """Load what was kept of a head: the maximum of z, the mass above it, and the logarithm of the mass."""
    f = tl.arange(0, F)
    top = tl.load(stats + head * F + f)
    mass = tl.load(stats + (heads + head) * F + f)
    return top, mass, tl.load(stats + (2 * heads + head) * F + f)


@triton.jit
def _keep(slots_out, stats, heads, head, top, mass, slots, prior, dtype: tl.constexpr, FEATURES: tl.constexpr,
          F: tl.constexpr, E: tl.constexpr, SAVE: tl.constexpr):  # fmt: skip
    """Store a head's state; return the slots in a type, and the logarithm of their mass, the prior included.

    A head whose keys are all masked has no mass: its slots are zeros.
    """
    f, e = tl.arange(0, F), tl.arange(0, E)
    head = head.to(tl.int64)
    mass = tl.where(mass > 0, mass, 1.0)
    slots = slots / mass[:, None]
    level = tl.where(f < FEATURES, top + tl.log2(mass) + prior, NEVER)
    if SAVE:
        tl.store(slots_out + (head * F + f[:, None]) * E + e[None, :], slots.to(slots_out.dtype.element_ty))
        tl.store(stats + head * F + f, top)
        tl.store(stats + (heads + head) * F + f, mass)
        tl.store(stats + (2 * heads + head) * F + f, level)
    return slots.to(dtype), level


@triton.jit
def _map_parts(
    draws_in, bank_in, shift_in, gains, h, heads, draws_each, banks, dtype: tl.constexpr,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr, BANKS: tl.constexpr,
    MAP: tl.constexpr, WARPED: tl.constexpr,
):  # fmt: skip
    """Load what a head's map needs: draws, bank, spread, the warp in two parts, gain, and the nodes of features."""
    f = tl.arange(0, F)
    draws, bank, spread, warp, warp_low, gain, node = 0, 0, 0, 0, 0, 0, 0
    if MAP == RANDOM or MAP == SPHERE:
        node, known = f // (draws_each * banks), f < FEATURES
        rows = (node * heads + h) * draws_each + f % draws_each
        draws = _picked(draws_in, rows, known, WIDTH, D).to(dtype)
        gain = _of_node(gains, node)
        if WARPED:
            d = tl.arange(0, D)
            wide = load_matrix(shift_in, h, WIDTH, WIDTH, D, D).to(tl.float32)
            wide += (d[:, None] == d[None, :]).to(tl.float32)
            warp = wide.to(dtype)
            warp_low = (wide - warp.to(tl.float32)).to(dtype)
        if MAP == SPHERE:
            each = tl.arange(0, BANKS)
            bank = _picked(bank_in, each, each < banks, WIDTH, D).to(dtype)
            spread = (f // draws_each % banks)[:, None] == each[None, :]
            spread = (spread & known[:, None]).to(dtype)
    return draws, bank, spread, warp, warp_low, gain, node


@triton.jit(do_not_specialize=["tokens", "fillers", "chunks", "readers"])
def forward(
    q, k, v, keep, draws_in, bank_in, shift_in, o, slots_out, stats, parts, tips, flags,
    gains, priors, square, draws_each, banks,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, smb, smh, smn, sob, soh, son,
    heads, tokens, fillers, chunks, readers,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BANKS: tl.constexpr,
    BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, WARPED: tl.constexpr,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, SAVE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Attend. Grid: (heads,) of all images if WHOLE, else (heads (chunks + readers),): all keys, then all queries."""
    item = tl.program_id(0)
    count = fillers // chunks
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

    dtype: tl.constexpr = v.dtype.element_ty
    draws, bank, spread, warp, warp_low, gain, node = _map_parts(
        draws_in, bank_in, shift_in, gains, h, heads, draws_each, banks, dtype,
        FEATURES, WIDTH, F, D, BANKS, MAP, WARPED)  # fmt: skip
    prior = 0
    if MAP == RANDOM or MAP == SPHERE:
        prior = _of_node(priors, node)

    if WHOLE:
        top, mass, slots = _gather(
            k, v, keep, start, stop, skn, skd, svn, svd, smn, draws, bank, spread, warp, warp_low, gain, square,
            WIDTH, VALUE_WIDTH, F, D, E, BLOCK, STAGES, MAP, WARPED, MASKED, P)  # fmt: skip
        kept, level = _keep(slots_out, stats, count, head, top, mass, slots, prior, dtype, FEATURES, F, E, SAVE)
        _answer(q, o, start, stop, sqn, sqd, son, kept, level, draws, bank, spread, warp, warp_low, gain,
                WIDTH, VALUE_WIDTH, D, E, QUERY_BLOCK, STAGES, MAP, WARPED, P)  # fmt: skip
    elif answers:
        wait_for(flags, head, count, chunks, readers)
        kept = load_matrix(slots_out, head, F, E, F, E).to(dtype)
        _, _, level = _stored(stats, count, head, F)
        _answer(q, o, start, stop, sqn, sqd, son, kept, level, draws, bank, spread, warp, warp_low, gain,
                WIDTH, VALUE_WIDTH, D, E, QUERY_BLOCK, STAGES, MAP, WARPED, P)  # fmt: skip
    else:
        top, mass, slots = _gather(
            k, v, keep, start, stop, skn, skd, svn, svd, smn, draws, bank, spread, warp, warp_low, gain, square,
            WIDTH, VALUE_WIDTH, F, D, E, BLOCK, STAGES, MAP, WARPED, MASKED, P)  # fmt: skip
        f, e = tl.arange(0, F), tl.arange(0, E)
        tl.store(tips + item * F + f, top)
        tl.store(tips + (fillers + item) * F + f, mass)
        if MASKED:
            mass = tl.where(mass > 0, mass, 1.0)
        mean = (slots / mass[:, None]).to(parts.dtype.element_ty)
        tl.store(parts + (item * F + f[:, None]) * E + e[None, :], mean)
        if arrive(flags + head) == chunks - 1:
            top, mass, slots = _join(parts, tips, fillers, head, chunks, F, E)
            _keep(slots_out, stats, count, head, top, mass, slots, prior, dtype, FEATURES, F, E, True)
            arrive(flags + head)


@triton.jit
def _unwarped(x, dx, warp, warp_low, dwarp, WARPED: tl.constexpr, P: tl.constexpr):
    """Return the gradient of x (BLOCK, D) from that of what the warp made of it, and add to the warp's own."""
    if WARPED:
        high = dx.to(x.dtype)
        rest = (dx - high.to(tl.float32)).to(x.dtype)
        dwarp = tl.dot(tl.trans(high), x, dwarp, input_precision=P)
        dwarp = tl.dot(tl.trans(rest), x, dwarp, input_precision=P)
        dx = tl.dot(high, warp, input_precision=P)
        dx = tl.dot(high, warp_low, dx, input_precision=P)
        dx = tl.dot(rest, warp, dx, input_precision=P)
    return dx, dwarp


@triton.jit
def _query_gradient_block(
    q, do, dq, at, stop, sqn, sqd, sgn, sgd, sdn, dslots, lift, dwarp, slots, level, draws, bank, spread, warp,
    warp_low, gain,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, WARPED: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Take the gradients of a block of queries."""
    x = load_rows(q, at, stop, sqn, sqd, WIDTH, BLOCK, D, EDGE)
    g = load_rows(do, at, stop, sgn, sgd, VALUE_WIDTH, BLOCK, E, EDGE)
    y = _warped_rows(x, warp, warp_low, WARPED, P)
    z = _row_logs(y, draws, bank, spread, gain, MAP, P) + level[None, :]
    weights = tl.exp2(z - tl.max(z, 1)[:, None])
    weights = weights * (1 / tl.sum(weights, 1))[:, None]
    dweights = tl.dot(g, tl.trans(slots), input_precision=P)
    dz = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
    dx = _input_gradient(y, dz, draws, bank, spread, gain, MAP, P)
    dx, dwarp = _unwarped(x, dx, warp, warp_low, dwarp, WARPED, P)
    store_rows(dq, dx, at, stop, sdn, WIDTH, BLOCK, D, EDGE)
    dslots = tl.dot(tl.trans(g), weights.to(g.dtype), dslots, input_precision=P)
    return dslots, lift + tl.sum(dz, 0), dwarp


@triton.jit
def _query_gradients(
    q, do, dq, start, stop, sqn, sqd, sgn, sgd, sdn, dwarp, slots, level, draws, bank, spread, warp, warp_low, gain,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, WARPED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Store the gradient of some queries; return those of the slots, (E, F), and of their level, ``lift``, (F,).

    With weights p of a query and the gradient g of its output y, the gradient of z is ``p (slots g - y.g)``.
    """
    dslots = tl.zeros([E, F], tl.float32)
    lift = tl.zeros([F], tl.float32)
    edge = start + (stop - start) // BLOCK * BLOCK
    for at in tl.range(start, edge, BLOCK, num_stages=STAGES):
        dslots, lift, dwarp = _query_gradient_block(
            q, do, dq, at, stop, sqn, sqd, sgn, sgd, sdn, dslots, lift, dwarp, slots, level, draws, bank, spread, warp,
            warp_low, gain, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, WARPED, P, False)  # fmt: skip
    if edge < stop:
        dslots, lift, dwarp = _query_gradient_block(
            q, do, dq, edge, stop, sqn, sqd, sgn, sgd, sdn, dslots, lift, dwarp, slots, level, draws, bank, spread,
            warp, warp_low, gain, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, WARPED, P, True)  # fmt: skip
    return dslots, lift, dwarp


@triton.jit
def _key_gradient_block(
    k, v, keep, dk, dv, at, stop, skn, skd, svn, svd, smn, sdn, sen, dslots, pull, scale, top, dwarp,
    draws, bank, spread, warp, warp_low, gain, square,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, WARPED: tl.constexpr, MASKED: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a block of keys and values."""
    x = load_rows(k, at, stop, skn, skd, WIDTH, BLOCK, D, EDGE)
    y = load_rows(v, at, stop, svn, svd, VALUE_WIDTH, BLOCK, E, EDGE)
    if MASKED:
        kept = load_mask(keep, at, stop, smn, BLOCK)[:, None]
        x, y = tl.where(kept, x, 0.0), tl.where(kept, y, 0.0)
    w = _warped_rows(x, warp, warp_low, WARPED, P)
    z = _row_logs(w, draws, bank, spread, gain, MAP, P)
    if MAP == RANDOM:
        wide = w.to(tl.float32)
        z -= tl.sum(wide * wide, 1)[:, None] * square
    weights = tl.exp2(z - top[None, :])
    if MASKED:
        weights = tl.where(kept, weights, 0.0)
    dy = tl.dot(weights.to(dslots.dtype), dslots, input_precision=P) * scale
    store_rows(dv, dy, at, stop, sen, VALUE_WIDTH, BLOCK, E, EDGE)
    dweights = tl.dot(y, tl.trans(dslots), input_precision=P) * scale
    dz = weights * (dweights - pull[None, :])
    dx = _input_gradient(w, dz, draws, bank, spread, gain, MAP, P)
    if MAP == RANDOM:
        dx -= wide * (tl.sum(dz, 1)[:, None] * (2 * square / LOG2E))
    dx, dwarp = _unwarped(x, dx, warp, warp_low, dwarp, WARPED, P)
    store_rows(dk, dx, at, stop, sdn, WIDTH, BLOCK, D, EDGE)
    return dwarp


@triton.jit
def _key_gradients(
    k, v, keep, dk, dv, start, stop, skn, skd, svn, svd, smn, sdn, sen, dwarp, dslots, pull, scale, top,
    draws, bank, spread, warp, warp_low, gain, square,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, MAP: tl.constexpr, WARPED: tl.constexpr, MASKED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Store the gradients of some keys and values, from those of the slots, (F, E), and ``pull``, over the mass."""
    edge = start + (stop - start) // BLOCK * BLOCK
    for at in tl.range(start, edge, BLOCK, num_stages=STAGES):
        dwarp = _key_gradient_block(
            k, v, keep, dk, dv, at, stop, skn, skd, svn, svd, smn, sdn, sen, dslots, pull, scale, top, dwarp, draws,
            bank, spread, warp, warp_low, gain, square, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, WARPED, MASKED, P,
            False)  # fmt: skip
    if edge < stop:
        dwarp = _key_gradient_block(
            k, v, keep, dk, dv, edge, stop, skn, skd, svn, svd, smn, sdn, sen, dslots, pull, scale, top, dwarp, draws,
            bank, spread, warp, warp_low, gain, square, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, WARPED, MASKED, P,
            True)  # fmt: skip
    return dwarp


@triton.jit
def _scaled(dslots, lift, mass, slots, dtype: tl.constexpr):
    """Divide by the mass, and the slots' gradient by its size too, so that half precision holds it.

    A key's gradient is ``dslots (v - slots) + lift``. What is common to all keys, ``pull = dslots slots - lift``, is
    taken of the rounded gradient and of slots in float32, so that nothing is left where v is the slot.
    """
    dslots = dslots / mass[:, None]
    scale = tl.maximum(tl.max(tl.max(tl.abs(dslots), 1), 0), 1e-30)
    rounded = (dslots / scale).to(dtype)
    pull = tl.sum(rounded.to(tl.float32) * slots.to(tl.float32), 1) * scale - lift / mass
    return rounded, pull, scale


@triton.jit
def _store_square(base, place, value, WIDTH: tl.constexpr, D: tl.constexpr):
    """Store (D, D) as a matrix of a contiguous (places, WIDTH, WIDTH)."""
    d = tl.arange(0, D)
    inside = (d[:, None] < WIDTH) & (d[None, :] < WIDTH)
    tl.store(base + (place.to(tl.int64) * WIDTH + d[:, None]) * WIDTH + d[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["tokens", "fillers", "chunks", "readers"])
def backward(
    q, k, v, keep, draws_in, bank_in, shift_in, do, dq, dk, dv, dwarp_out, slots_in, stats,
    parts, lifts, dslots_out, flags,
    gains, square, draws_each, banks,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, smb, smh, smn,
    sgb, sgh, sgn, sgd, sdb, sdh, sdn, seb, seh, sen,
    heads, tokens, fillers, chunks, readers,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BANKS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, MAP: tl.constexpr, WARPED: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Take gradients. The grid is that of :func:`forward`, with the roles of queries and keys exchanged."""
    item = tl.program_id(0)
    place = item
    count = fillers // chunks
    if WHOLE:
        head, start, stop, answers = item, 0, tokens, False
    else:
        pull_out = lifts + fillers * F
        scale_out = pull_out + count * F
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

    f, e = tl.arange(0, F), tl.arange(0, E)
    dtype: tl.constexpr = v.dtype.element_ty
    draws, bank, spread, warp, warp_low, gain, _ = _map_parts(
        draws_in, bank_in, shift_in, gains, h, heads, draws_each, banks, dtype,
        FEATURES, WIDTH, F, D, BANKS, MAP, WARPED)  # fmt: skip
    if WARPED:
        dwarp = tl.zeros([D, D], tl.float32)
    else:
        dwarp = tl.full((), 0.0, tl.float32)
    top, mass, level = _stored(stats, count, head, F)

    if WHOLE:
        slots = load_matrix(slots_in, head, F, E, F, E).to(dtype)
        turned, lift, dwarp = _query_gradients(
            q, do, dq, start, stop, sqn, sqd, sgn, sgd, sdn, dwarp, slots, level, draws, bank, spread, warp, warp_low,
            gain, WIDTH, VALUE_WIDTH, F, D, E, BLOCK, STAGES, MAP, WARPED, P)  # fmt: skip
        wide = load_matrix(slots_in, head, F, E, F, E)
        dslots, pull, scale = _scaled(tl.trans(turned), lift, mass, wide, dtype)
        dwarp = _key_gradients(
            k, v, keep, dk, dv, start, stop, skn, skd, svn, svd, smn, sdn, sen, dwarp, dslots, pull, scale, top, draws,
            bank, spread, warp, warp_low, gain, square, WIDTH, VALUE_WIDTH, D, E, BLOCK, STAGES, MAP, WARPED, MASKED,
            P)  # fmt: skip
    elif answers:
        wait_for(flags, head, count, chunks, readers)
        dslots = load_matrix(dslots_out, head, F, E, F, E)
        pull = tl.load(pull_out + head * F + f)
        scale = tl.load(scale_out + head)
        dwarp = _key_gradients(
            k, v, keep, dk, dv, start, stop, skn, skd, svn, svd, smn, sdn, sen, dwarp, dslots, pull, scale, top, draws,
            bank, spread, warp, warp_low, gain, square, WIDTH, VALUE_WIDTH, D, E, BLOCK, STAGES, MAP, WARPED, MASKED,
            P)  # fmt: skip
    else:
        slots = load_matrix(slots_in, head, F, E, F, E).to(dtype)
        turned, lift, dwarp = _query_gradients(
            q, do, dq, start, stop, sqn, sqd, sgn, sgd, sdn, dwarp, slots, level, draws, bank, spread, warp, warp_low,
            gain, WIDTH, VALUE_WIDTH, F, D, E, BLOCK, STAGES, MAP, WARPED, P)  # fmt: skip
        tl.store(lifts + item * F + f, lift)
        tl.store(parts + (item * E + e[:, None]) * F + f[None, :], turned)
        if arrive(flags + head) == chunks - 1:
            turned = tl.zeros([E, F], tl.float32)
            lift = tl.zeros([F], tl.float32)
            for index in range(chunks):
                turned += load_matrix(parts, head * chunks + index, E, F, E, F)
                lift += tl.load(lifts + (head * chunks + index) * F + f)
            wide = load_matrix(slots_in, head, F, E, F, E)
            dslots, pull, scale = _scaled(tl.trans(turned), lift, mass, wide, dtype)
            tl.store(dslots_out + (head * F + f[:, None]) * E + e[None, :], dslots)
            tl.store(pull_out + head * F + f, pull)
            tl.store(scale_out + head, scale)
            arrive(flags + head)
    if WARPED:
        _store_square(dwarp_out, place, dwarp, WIDTH, D)
