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
    LOG2E,
    NEVER,
    arrive,
    fill_slots,
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

EPSILON: tl.constexpr = tl.constexpr(1e-6)


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
    if MAP == EXP:
        slope = 1.0
    elif MAP == ELU:
        slope = tl.where(x > 0, 1 / (1 + x), 1.0)
    else:
        slope = tl.where(x >= 0, 1 / (x + EPSILON), 0.0)
    return slope


@triton.jit
def _gather_block(
    k, v, keep, at, stop, skn, skd, svn, svd, smn, top, mass, slots,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, MASKED: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Take a block of keys and values into the slots."""
    x = load_columns(k, at, stop, skn, skd, WIDTH, BLOCK, D, EDGE)
    y = load_rows(v, at, stop, svn, svd, VALUE_WIDTH, BLOCK, E, EDGE)
    z = _logs(x, MAP)
    return fill_slots(z, y, keep, at, stop, smn, top, mass, slots, BLOCK, MASKED, P, EDGE)


@triton.jit
def _gather(
    k, v, keep, start, stop, skn, skd, svn, svd, smn,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, MASKED: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Fill the slots with some tokens: the maximum of z and the mass above it, (F,), and the sums (F, E)."""
    top = tl.full([F], NEVER, tl.float32)
    mass = tl.zeros([F], tl.float32)
    slots = tl.zeros([F, E], tl.float32)
    edge = start + (stop - start) // BLOCK * BLOCK
    for at in tl.range(start, edge, BLOCK, num_stages=STAGES):
        top, mass, slots = _gather_block(
            k, v, keep, at, stop, skn, skd, svn, svd, smn, top, mass, slots, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP,
            MASKED, P, False)  # fmt: skip
    if edge < stop:
        top, mass, slots = _gather_block(
            k, v, keep, edge, stop, skn, skd, svn, svd, smn, top, mass, slots, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP,
            MASKED, P, True)  # fmt: skip
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
    q, o, at, stop, sqn, sqd, son, slots, level,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Read the slots by a block of queries."""
    x = load_rows(q, at, stop, sqn, sqd, WIDTH, BLOCK, D, EDGE)
    z = _logs(x, MAP) + level[None, :]
    weights = tl.exp2(z - tl.max(z, 1)[:, None])
    mixed = tl.dot(weights.to(slots.dtype), slots, input_precision=P) * (1 / tl.sum(weights, 1))[:, None]
    store_rows(o, mixed, at, stop, son, VALUE_WIDTH, BLOCK, E, EDGE)


@triton.jit
def _answer(
    q, o, start, stop, sqn, sqd, son, slots, level,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, MAP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Read the slots, (F, E), whose logarithmic mass is ``level``, by some queries."""
    edge = start + (stop - start) // BLOCK * BLOCK
    for at in tl.range(start, edge, BLOCK, num_stages=STAGES):
        _answer_block(q, o, at, stop, sqn, sqd, son, slots, level,
                      WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, P, False)  # fmt: skip
    if edge < stop:
        _answer_block(q, o, edge, stop, sqn, sqd, son, slots, level,
                      WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, P, True)  # fmt: skip


@triton.jit
def _stored(stats, heads, head, F: tl.constexpr):
    """Load what was kept of a head: the maximum of z, the mass above it, and the logarithm of the mass."""
    f = tl.arange(0, F)
    top = tl.load(stats + head * F + f)
    mass = tl.load(stats + (heads + head) * F + f)
    return top, mass, tl.load(stats + (2 * heads + head) * F + f)


@triton.jit
def _keep(slots_out, stats, heads, head, top, mass, slots, dtype: tl.constexpr, FEATURES: tl.constexpr,
          F: tl.constexpr, E: tl.constexpr, SAVE: tl.constexpr):  # fmt: skip
    """Store a head's state; return the slots in a type, and the logarithm of their mass.

    A head whose keys are all masked has no mass: its slots are zeros.
    """
    f, e = tl.arange(0, F), tl.arange(0, E)
    head = head.to(tl.int64)
    mass = tl.where(mass > 0, mass, 1.0)
    slots = slots / mass[:, None]
    level = tl.where(f < FEATURES, top + tl.log2(mass), NEVER)
    if SAVE:
        tl.store(slots_out + (head * F + f[:, None]) * E + e[None, :], slots.to(slots_out.dtype.element_ty))
        tl.store(stats + head * F + f, top)
        tl.store(stats + (heads + head) * F + f, mass)
        tl.store(stats + (2 * heads + head) * F + f, level)
    return slots.to(dtype), level


@triton.jit(do_not_specialize=["tokens", "fillers", "chunks", "readers"])
def forward(
    q, k, v, keep, o, slots_out, stats, parts, tips, flags,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, smb, smh, smn, sob, soh, son,
    heads, tokens, fillers, chunks, readers,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr,
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

    if WHOLE:
        top, mass, slots = _gather(
            k, v, keep, start, stop, skn, skd, svn, svd, smn,
            WIDTH, VALUE_WIDTH, F, D, E, BLOCK, STAGES, MAP, MASKED, P)  # fmt: skip
        kept, level = _keep(slots_out, stats, count, head, top, mass, slots, dtype, FEATURES, F, E, SAVE)
        _answer(q, o, start, stop, sqn, sqd, son, kept, level,
                WIDTH, VALUE_WIDTH, D, E, QUERY_BLOCK, STAGES, MAP, P)  # fmt: skip
    elif answers:
        wait_for(flags, head, count, chunks, readers)
        kept = load_matrix(slots_out, head, F, E, F, E).to(dtype)
        _, _, level = _stored(stats, count, head, F)
        _answer(q, o, start, stop, sqn, sqd, son, kept, level,
                WIDTH, VALUE_WIDTH, D, E, QUERY_BLOCK, STAGES, MAP, P)  # fmt: skip
    else:
        top, mass, slots = _gather(
            k, v, keep, start, stop, skn, skd, svn, svd, smn,
            WIDTH, VALUE_WIDTH, F, D, E, BLOCK, STAGES, MAP, MASKED, P)  # fmt: skip
        f, e = tl.arange(0, F), tl.arange(0, E)
        tl.store(tips + item * F + f, top)
        tl.store(tips + (fillers + item) * F + f, mass)
        if MASKED:
            mass = tl.where(mass > 0, mass, 1.0)
        mean = (slots / mass[:, None]).to(parts.dtype.element_ty)
        tl.store(parts + (item * F + f[:, None]) * E + e[None, :], mean)
        if arrive(flags + head) == chunks - 1:
            top, mass, slots = _join(parts, tips, fillers, head, chunks, F, E)
            _keep(slots_out, stats, count, head, top, mass, slots, dtype, FEATURES, F, E, True)
            arrive(flags + head)


@triton.jit
def _query_gradient_block(
    q, do, dq, at, stop, sqn, sqd, sgn, sgd, sdn, dslots, lift, slots, level,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Take the gradients of a block of queries."""
    x = load_rows(q, at, stop, sqn, sqd, WIDTH, BLOCK, D, EDGE)
    g = load_rows(do, at, stop, sgn, sgd, VALUE_WIDTH, BLOCK, E, EDGE)
    z = _logs(x, MAP) + level[None, :]
    weights = tl.exp2(z - tl.max(z, 1)[:, None])
    weights = weights * (1 / tl.sum(weights, 1))[:, None]
    dweights = tl.dot(g, tl.trans(slots), input_precision=P)
    dz = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
    store_rows(dq, dz * _slope(x, MAP), at, stop, sdn, WIDTH, BLOCK, D, EDGE)
    dslots = tl.dot(tl.trans(g), weights.to(g.dtype), dslots, input_precision=P)
    return dslots, lift + tl.sum(dz, 0)


@triton.jit
def _query_gradients(
    q, do, dq, start, stop, sqn, sqd, sgn, sgd, sdn, slots, level,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, MAP: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Store the gradient of some queries; return those of the slots, (E, F), and of their level, ``lift``, (F,).

    With weights p of a query and the gradient g of its output y, the gradient of z is ``p (slots g - y.g)``.
    """
    dslots = tl.zeros([E, F], tl.float32)
    lift = tl.zeros([F], tl.float32)
    edge = start + (stop - start) // BLOCK * BLOCK
    for at in tl.range(start, edge, BLOCK, num_stages=STAGES):
        dslots, lift = _query_gradient_block(
            q, do, dq, at, stop, sqn, sqd, sgn, sgd, sdn, dslots, lift, slots, level, WIDTH, VALUE_WIDTH, D, E,
            BLOCK, MAP, P, False)  # fmt: skip
    if edge < stop:
        dslots, lift = _query_gradient_block(
            q, do, dq, edge, stop, sqn, sqd, sgn, sgd, sdn, dslots, lift, slots, level, WIDTH, VALUE_WIDTH, D, E,
            BLOCK, MAP, P, True)  # fmt: skip
    return dslots, lift


@triton.jit
def _key_gradient_block(
    k, v, keep, dk, dv, at, stop, skn, skd, svn, svd, smn, sdn, sen, dslots, pull, scale, top,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, MASKED: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a block of keys and values."""
    x = load_rows(k, at, stop, skn, skd, WIDTH, BLOCK, D, EDGE)
    y = load_rows(v, at, stop, svn, svd, VALUE_WIDTH, BLOCK, E, EDGE)
    if MASKED:
        kept = load_mask(keep, at, stop, smn, BLOCK)[:, None]
        x, y = tl.where(kept, x, 0.0), tl.where(kept, y, 0.0)
    z = _logs(x, MAP)
    weights = tl.exp2(z - top[None, :])
    if MASKED:
        weights = tl.where(kept, weights, 0.0)
    dy = tl.dot(weights.to(dslots.dtype), dslots, input_precision=P) * scale
    store_rows(dv, dy, at, stop, sen, VALUE_WIDTH, BLOCK, E, EDGE)
    dweights = tl.dot(y, tl.trans(dslots), input_precision=P) * scale
    dz = weights * (dweights - pull[None, :])
    store_rows(dk, dz * _slope(x, MAP), at, stop, sdn, WIDTH, BLOCK, D, EDGE)


@triton.jit
def _key_gradients(
    k, v, keep, dk, dv, start, stop, skn, skd, svn, svd, smn, sdn, sen, dslots, pull, scale, top,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, MAP: tl.constexpr, MASKED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Store the gradients of some keys and values, from those of the slots, (F, E), and ``pull``, over the mass."""
    edge = start + (stop - start) // BLOCK * BLOCK
    for at in tl.range(start, edge, BLOCK, num_stages=STAGES):
        _key_gradient_block(
            k, v, keep, dk, dv, at, stop, skn, skd, svn, svd, smn, sdn, sen, dslots, pull, scale, top, WIDTH,
            VALUE_WIDTH, D, E, BLOCK, MAP, MASKED, P, False)  # fmt: skip
    if edge < stop:
        _key_gradient_block(
            k, v, keep, dk, dv, edge, stop, skn, skd, svn, svd, smn, sdn, sen, dslots, pull, scale, top, WIDTH,
            VALUE_WIDTH, D, E, BLOCK, MAP, MASKED, P, True)  # fmt: skip


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


@triton.jit(do_not_specialize=["tokens", "fillers", "chunks", "readers"])
def backward(
    q, k, v, keep, do, dq, dk, dv, slots_in, stats,
    parts, lifts, dslots_out, flags,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, smb, smh, smn,
    sgb, sgh, sgn, sgd, sdb, sdh, sdn, seb, seh, sen,
    heads, tokens, fillers, chunks, readers,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, MAP: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Take gradients. The grid is that of :func:`forward`, with the roles of queries and keys exchanged."""
    item = tl.program_id(0)
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
    top, mass, level = _stored(stats, count, head, F)

    if WHOLE:
        slots = load_matrix(slots_in, head, F, E, F, E).to(dtype)
        turned, lift = _query_gradients(
            q, do, dq, start, stop, sqn, sqd, sgn, sgd, sdn, slots, level, WIDTH, VALUE_WIDTH, F, D, E, BLOCK,
            STAGES, MAP, P)  # fmt: skip
        wide = load_matrix(slots_in, head, F, E, F, E)
        dslots, pull, scale = _scaled(tl.trans(turned), lift, mass, wide, dtype)
        _key_gradients(
            k, v, keep, dk, dv, start, stop, skn, skd, svn, svd, smn, sdn, sen, dslots, pull, scale, top, WIDTH,
            VALUE_WIDTH, D, E, BLOCK, STAGES, MAP, MASKED, P)  # fmt: skip
    elif answers:
        wait_for(flags, head, count, chunks, readers)
        dslots = load_matrix(dslots_out, head, F, E, F, E)
        pull = tl.load(pull_out + head * F + f)
        scale = tl.load(scale_out + head)
        _key_gradients(
            k, v, keep, dk, dv, start, stop, skn, skd, svn, svd, smn, sdn, sen, dslots, pull, scale, top, WIDTH,
            VALUE_WIDTH, D, E, BLOCK, STAGES, MAP, MASKED, P)  # fmt: skip
    else:
        slots = load_matrix(slots_in, head, F, E, F, E).to(dtype)
        turned, lift = _query_gradients(
            q, do, dq, start, stop, sqn, sqd, sgn, sgd, sdn, slots, level, WIDTH, VALUE_WIDTH, F, D, E, BLOCK,
            STAGES, MAP, P)  # fmt: skip
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
