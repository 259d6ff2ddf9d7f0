"""Triton kernels for attention by positive features of projections, forward and backward: random features and SLAY's.

The mathematics is that of :mod:`visionattn.ops.fused.positive`. There are more features here than channels, and all
features of a block of tokens would not fit into registers. So keys fill slots a unit of UNIT features at a time, each
by a program of its own, and queries read slots in tiles of TILE features, with an online maximum over the tiles. The
forward pass keeps the logarithm of the sum of each query's features, ``lse``, from which the backward one has any tile
of a query's weights at once.

Either direction is one launch. Its programs do what follows, those of lower numbers first; since programs start in the
order of their numbers, whoever is waited for runs already. Nothing is summed by atomics.

- forward: units of features over chunks of keys, the last of a unit to finish joins its chunks; then chunks of queries.
- backward: chunks of queries, which leave dq and ``delta``, the product of each output with its gradient; then units of
  features over chunks of queries, joined likewise, which leave the slots' gradient; then chunks of keys: dk and dv.
"""

import triton
import triton.language as tl

from visionattn.ops.fused.tiles import (
    LOG2E,
    NEVER,
    arrive,
    fill_slots,
    load_mask,
    load_matrix,
    load_rows,
    place,
    span,
    store_rows,
    wait_until,
)

RANDOM: tl.constexpr = tl.constexpr(0)
SPHERE: tl.constexpr = tl.constexpr(1)

EPSILON: tl.constexpr = tl.constexpr(1e-6)
FLOOR: tl.constexpr = tl.constexpr(1e-20)


@triton.jit
def _of_node(values, node):
    """Return the value of each feature's node of quadrature, (T,), from those of all nodes."""
    chosen = tl.zeros(node.shape, tl.float32)
    for index in tl.static_range(len(values)):
        chosen = tl.where(node == index, values[index], chosen)
    return chosen


@triton.jit
def _gain(gains, first, draws_each, banks, T: tl.constexpr, MAP: tl.constexpr):
    """Return the gain of the features from ``first`` on: (T,), or a number where all have the same."""
    if MAP == SPHERE:
        gain = _of_node(gains, (first + tl.arange(0, T)) // (draws_each * banks))
    else:
        gain = gains[0]
    return gain


@triton.jit
def _load_draws(
    draws_in, h, heads, draws_each, banks, first, dtype: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
    T: tl.constexpr, D: tl.constexpr, BANKS: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """Load the draws of the features from ``first`` on, (T, D), and which anchor each has, as zeros and ones."""
    f, d, each = first + tl.arange(0, T), tl.arange(0, D), tl.arange(0, BANKS)
    known = (f < FEATURES)[:, None]
    rows = (f // (draws_each * banks) * heads + h) * draws_each + f % draws_each
    inside = known & (d < WIDTH)[None, :]
    draws = tl.load(draws_in + rows[:, None] * WIDTH + d[None, :], mask=inside, other=0.0).to(dtype)
    spread = 0
    if MAP == SPHERE:
        spread = (known & ((f // draws_each % banks)[:, None] == each[None, :])).to(dtype)
    return draws, spread


@triton.jit
def _load_slots(slots_in, head, first, F: tl.constexpr, E: tl.constexpr, T: tl.constexpr):
    """Load the slots, or their gradients, of the features from ``first`` on, (T, E)."""
    f, e = first + tl.arange(0, T), tl.arange(0, E)
    return tl.load(slots_in + (head.to(tl.int64) * F + f[:, None]) * E + e[None, :])


@triton.jit
def _load_tile(
    draws_in, slots_in, scales, scale, h, head, heads, draws_each, banks, tile, dtype: tl.constexpr,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BANKS: tl.constexpr, TILE: tl.constexpr, MAP: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Load a tile of draws, (TILE, D), of anchors, (TILE, BANKS), and of slots, (TILE, E).

    SCALED: slots of a unit are over its scale, of ``scales``, and are brought to ``scale``, the largest of a head. All
    scales are powers of two.
    """
    draws, spread = _load_draws(draws_in, h, heads, draws_each, banks, tile * TILE, dtype, FEATURES, WIDTH, TILE, D,
                                BANKS, MAP)  # fmt: skip
    slots = _load_slots(slots_in, head, tile * TILE, F, E, TILE)
    if SCALED:
        slots = slots.to(tl.float32) * (tl.load(scales + tile * TILE) / scale)
    return draws, spread, slots.to(dtype)


@triton.jit
def _held(
    draws_in, slots_in, scales, scale, h, head, heads, draws_each, banks, dtype: tl.constexpr, FEATURES: tl.constexpr,
    WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BANKS: tl.constexpr, TILE: tl.constexpr,
    MAP: tl.constexpr, SCALED: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Load all tiles, to be held in shared memory for all tokens; none unless HOLD."""
    tiles = ()
    if HOLD:
        for tile in tl.static_range(F // TILE):
            one = _load_tile(draws_in, slots_in, scales, scale, h, head, heads, draws_each, banks, tile, dtype,
                             FEATURES, WIDTH, F, D, E, BANKS, TILE, MAP, SCALED)  # fmt: skip
            tiles = tiles + (one,)
    return tiles


@triton.jit
def _tile_of(
    tiles, draws_in, slots_in, scales, scale, h, head, heads, draws_each, banks, tile: tl.constexpr,
    dtype: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, BANKS: tl.constexpr, TILE: tl.constexpr, MAP: tl.constexpr, SCALED: tl.constexpr,
    HOLD: tl.constexpr,
):  # fmt: skip
    """Return a tile of those held, or load it."""
    if HOLD:
        draws, spread, slots = tiles[tile]
    else:
        draws, spread, slots = _load_tile(draws_in, slots_in, scales, scale, h, head, heads, draws_each, banks, tile,
                                          dtype, FEATURES, WIDTH, F, D, E, BANKS, TILE, MAP, SCALED)  # fmt: skip
    return draws, spread, slots


@triton.jit
def _common(bank_in, shift_in, h, banks, dtype: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
            BANKS: tl.constexpr, MAP: tl.constexpr, WARPED: tl.constexpr):  # fmt: skip
    """Load what all features of a head have in common: anchors, (BANKS, D), and the warp, (D, D), in two parts."""
    bank, warp, warp_low = 0, 0, 0
    d = tl.arange(0, D)
    if WARPED:
        wide = load_matrix(shift_in, h, WIDTH, WIDTH, D, D).to(tl.float32)
        wide += (d[:, None] == d[None, :]).to(tl.float32)
        warp = wide.to(dtype)
        warp_low = (wide - warp.to(tl.float32)).to(dtype)
    if MAP == SPHERE:
        each = tl.arange(0, BANKS)
        inside = (each < banks)[:, None] & (d < WIDTH)[None, :]
        bank = tl.load(bank_in + each[:, None] * WIDTH + d[None, :], mask=inside, other=0.0).to(dtype)
    return bank, warp, warp_low


@triton.jit
def _finely(x, matrix, P: tl.constexpr):
    """Return ``x matrix``; for x of float32 and a matrix of half precision, as if in float32."""
    high = x.to(matrix.dtype)
    y = tl.dot(high, matrix, input_precision=P)
    if x.dtype != matrix.dtype:
        y = tl.dot((x - high.to(tl.float32)).to(matrix.dtype), matrix, y, input_precision=P)
    return y


@triton.jit
def _seen_columns(x, bank, warp, warp_low, square, dtype: tl.constexpr, MAP: tl.constexpr, WARPED: tl.constexpr,
                  P: tl.constexpr):  # fmt: skip
    """Return what features are made of for tokens (BLOCK, D), as columns: see :func:`_seen_rows`."""
    columns = tl.trans(x)
    if WARPED:
        columns = tl.dot(warp_low, columns, tl.dot(warp, columns, input_precision=P), input_precision=P)
        size = tl.sum(columns * columns, 0)
    else:
        wide = x.to(tl.float32)
        size = tl.sum(wide * wide, 1)
    high = columns.to(dtype)
    low = (columns.to(tl.float32) - high.to(tl.float32)).to(dtype)
    t_high, t_low = 0, 0
    if MAP == SPHERE:
        size = tl.rsqrt(size + EPSILON)
        t = tl.dot(bank, high, input_precision=P) * size[None, :]
        t = tl.log2(t * t + FLOOR)
        t_high = t.to(dtype)
        t_low = (t - t_high.to(tl.float32)).to(dtype)
    else:
        size = size * square
    return high, low, size, t_high, t_low


@triton.jit
def _column_logs(high, low, size, t_high, t_low, draws, spread, gain, MAP: tl.constexpr, FINE: tl.constexpr,
                 P: tl.constexpr):  # fmt: skip
    """Return z of tokens (D, BLOCK) as (T, BLOCK): see :func:`_row_logs`."""
    z = tl.dot(draws, high, input_precision=P)
    if FINE:
        z = tl.dot(draws, low, z, input_precision=P)
    if MAP == SPHERE:
        z = z * (gain[:, None] * size[None, :])
        z = tl.dot(spread, t_high, z, input_precision=P)
        z = tl.dot(spread, t_low, z, input_precision=P)
    else:
        z = z * gain
    return z


@triton.jit
def _seen_rows(x, bank, warp, warp_low, square, dtype: tl.constexpr, MAP: tl.constexpr, WARPED: tl.constexpr,
               P: tl.constexpr):  # fmt: skip
    """Return what features are made of for tokens (BLOCK, D): x warped, in two parts of half precision, and a size.

    The size is what is taken from all logarithms of a token, or SLAY's factor to unit length. SLAY's have the tokens'
    products with the anchors, (BLOCK, BANKS), and their logarithms in two parts besides.
    """
    if WARPED:
        x = tl.dot(x, tl.trans(warp_low), tl.dot(x, tl.trans(warp), input_precision=P), input_precision=P)
    wide = x.to(tl.float32)
    high = x.to(dtype)
    low = (wide - high.to(tl.float32)).to(dtype)
    size = tl.sum(wide * wide, 1)
    t, t_high, t_low = 0, 0, 0
    if MAP == SPHERE:
        size = tl.rsqrt(size + EPSILON)
        t = tl.dot(high, tl.trans(bank), input_precision=P) * size[:, None]
        logs = tl.log2(t * t + FLOOR)
        t_high = logs.to(dtype)
        t_low = (logs - t_high.to(tl.float32)).to(dtype)
    else:
        size = size * square
    return wide, high, low, size, t, t_high, t_low


@triton.jit
def _row_logs(high, low, size, t_high, t_low, draws, spread, gain, MAP: tl.constexpr, FINE: tl.constexpr,
              P: tl.constexpr):  # fmt: skip
    """Return z of tokens (BLOCK, D) as (BLOCK, T), less what all features of one have in common."""
    z = tl.dot(high, tl.trans(draws), input_precision=P)
    if FINE:
        z = tl.dot(low, tl.trans(draws), z, input_precision=P)
    if MAP == SPHERE:
        z = z * (gain[None, :] * size[:, None])
        z = tl.dot(t_high, tl.trans(spread), z, input_precision=P)
        z = tl.dot(t_low, tl.trans(spread), z, input_precision=P)
    else:
        z = z * gain
    return z


@triton.jit
def _add_gradient(dz, dx, dt, draws, spread, gain, MAP: tl.constexpr, TWICE: tl.constexpr, P: tl.constexpr):
    """Add what the gradient of a tile's natural logarithms, (BLOCK, T), gives to those of tokens and of anchors.

    TWICE: what rounding to half precision leaves out is multiplied, too. Gradients of keys need it, which are sums of
    terms that nearly cancel.
    """
    if MAP == SPHERE:
        dt = tl.dot(dz.to(spread.dtype), spread, dt, input_precision=P)
        dz = dz * gain[None, :]
    high = dz.to(draws.dtype)
    dx = tl.dot(high, draws, dx, input_precision=P)
    if TWICE:
        dx = tl.dot((dz - high.to(tl.float32)).to(draws.dtype), draws, dx, input_precision=P)
    return dx, dt


@triton.jit
def _input_gradient(x, wide, size, t, dx, dt, bank, warp, warp_low, gain, dwarp, MAP: tl.constexpr,
                    WARPED: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """Return the gradient of tokens (BLOCK, D) from what all tiles gave, and add to the warp's own."""
    if MAP == SPHERE:
        size = size[:, None]
        du = dx / LOG2E + _finely(dt * (2 * t / (t * t + FLOOR)), bank, P)
        dx = size * (du - wide * (size * size * tl.sum(wide * du, 1)[:, None]))
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
def _gather_block(
    k, v, keep, at, stop, skn, skd, svn, svd, smn, top, mass, slots, draws, bank, spread, warp, warp_low, gain, square,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, WARPED: tl.constexpr, MASKED: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Take a block of keys and values into a unit's slots."""
    x = load_rows(k, at, stop, skn, skd, WIDTH, BLOCK, D, EDGE)
    y = load_rows(v, at, stop, svn, svd, VALUE_WIDTH, BLOCK, E, EDGE)
    FINE: tl.constexpr = WARPED or x.dtype != y.dtype
    high, low, size, t_high, t_low = _seen_columns(x, bank, warp, warp_low, square, y.dtype, MAP, WARPED, P)
    z = _column_logs(high, low, size, t_high, t_low, draws, spread, gain, MAP, FINE, P)
    if MAP == RANDOM:
        z -= size[None, :]
    return fill_slots(z, y, keep, at, stop, smn, top, mass, slots, BLOCK, MASKED, P, EDGE)


@triton.jit
def _join(parts, tips, head, first, fillers, chunks, F: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr):
    """Join what the chunks of a unit left, in their order: the maximum of z and the mass above it, and the sums."""
    f = first + tl.arange(0, UNIT)
    top = tl.full([UNIT], NEVER, tl.float32)
    for part in range(chunks):
        top = tl.maximum(top, tl.load(tips + (head * chunks + part) * F + f))
    mass = tl.zeros([UNIT], tl.float32)
    slots = tl.zeros([UNIT, E], tl.float32)
    for part in range(chunks):
        at = head * chunks + part
        share = tl.load(tips + (fillers + at) * F + f) * tl.exp2(tl.load(tips + at * F + f) - top)
        mass += share
        slots += share[:, None] * _load_slots(parts, at, first, F, E, UNIT)
    return top, mass, slots


@triton.jit
def _keep(slots_out, stats, weights_in, count, h, head, first, top, mass, slots, prior, FEATURES: tl.constexpr,
          F: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """Store a unit's state: the slots, the maximum of z, the mass above it, and the level, its logarithm for queries.

    Prior and weight of a feature are in the level alone: they are the same for all keys. A head whose keys are all
    masked has no mass: its slots are zeros.
    """
    f, e = first + tl.arange(0, UNIT), tl.arange(0, E)
    mass = tl.where(mass > 0, mass, 1.0)
    slots = (slots / mass[:, None]).to(slots_out.dtype.element_ty)
    tl.store(slots_out + (head.to(tl.int64) * F + f[:, None]) * E + e[None, :], slots)
    tl.store(stats + head * F + f, top)
    tl.store(stats + (count + head) * F + f, mass)
    level = top + tl.log2(mass) + prior
    if weights_in is not None:
        level += LOG2E * tl.load(weights_in + h * FEATURES + f, mask=f < FEATURES, other=0.0).to(tl.float32)
    tl.store(stats + (2 * count + head) * F + f, tl.where(f < FEATURES, level, NEVER))


@triton.jit
def _last_of_chunks(flag, chunks):
    """Count a chunk of a unit in; return whether it is the last, which lowers the unit's flag for the next launch."""
    last = arrive(flag) == chunks - 1
    if last:
        tl.store(flag, 0)
    return last


@triton.jit
def _wait_for_units(flags, head, count, units, readers):
    """Wait until all units of a head are joined; the last of its readers lowers the head's flags for the next launch.

    The first flag of a head counts the units, the second the readers that saw them, the third is :func:`backward`'s.
    """
    wait_until(flags + head, units)
    if tl.atomic_add(flags + count + head, 1, sem="acq_rel") == readers - 1:
        tl.store(flags + head, 0)
        tl.store(flags + count + head, 0)
        tl.store(flags + 2 * count + head, 0)


@triton.jit
def _answer_block(
    q, o, lse_out, at, stop, sqn, sqd, son, level_in, tiles, draws_in, slots_in, bank, warp, warp_low, gains, square,
    h, head, heads, draws_each, banks, dtype: tl.constexpr,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, BANKS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, MAP: tl.constexpr,
    WARPED: tl.constexpr, SAVE: tl.constexpr, HOLD: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Read the slots by a block of queries."""
    x = load_rows(q, at, stop, sqn, sqd, WIDTH, BLOCK, D, True)
    FINE: tl.constexpr = WARPED or x.dtype != dtype
    _, high, low, size, _, t_high, t_low = _seen_rows(x, bank, warp, warp_low, square, dtype, MAP, WARPED, P)
    top = tl.full([BLOCK], NEVER, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, E], tl.float32)
    for tile in tl.static_range(F // TILE):
        draws, spread, slots = _tile_of(
            tiles, draws_in, slots_in, 0, 0, h, head, heads, draws_each, banks, tile, dtype, FEATURES, WIDTH, F, D, E,
            BANKS, TILE, MAP, False, HOLD)  # fmt: skip
        gain = _gain(gains, tile * TILE, draws_each, banks, TILE, MAP)
        z = _row_logs(high, low, size, t_high, t_low, draws, spread, gain, MAP, FINE, P)
        z += tl.load(level_in + tile * TILE + tl.arange(0, TILE))[None, :]
        above = tl.maximum(top, tl.max(z, 1))
        weights = tl.exp2(z - above[:, None])
        fade = tl.exp2(top - above)
        mass = mass * fade + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(dtype), slots, mixed * fade[:, None], input_precision=P)
        top = above
    store_rows(o, mixed * (1 / mass)[:, None], at, stop, son, VALUE_WIDTH, BLOCK, E, True)
    if SAVE:
        n = at + tl.arange(0, BLOCK)
        tl.store(lse_out + n, top + tl.log2(mass), mask=n < stop)


@triton.jit
def _share(item, heads, chunks, tokens, units, BLOCK: tl.constexpr):
    """Return a program's head, of all images, its image, head of the image, part of the head, and the tokens of it.

    There are as many parts as chunks times units, those of a chunk side by side.
    """
    head, part = place(item, heads, units * chunks)
    start, stop = span(part // units, chunks, tokens, BLOCK)
    return head, (head // heads).to(tl.int64), head % heads, part, start, stop


@triton.jit
def _gather(
    item, k, v, keep, draws_in, bank_in, shift_in, weights_in, slots_out, stats, parts, tips, flags,
    gains, priors, square, draws_each, banks, skb, skh, skn, skd, svb, svh, svn, svd, smb, smh, smn,
    heads, tokens, count, chunks,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, BANKS: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
    MAP: tl.constexpr, WARPED: tl.constexpr, MASKED: tl.constexpr, ALONE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Fill a unit's slots with a chunk of keys and values; the last chunk of a unit joins all."""
    dtype: tl.constexpr = v.dtype.element_ty
    units = F // UNIT
    head, b, h, part, start, stop = _share(item, heads, chunks, tokens, units, BLOCK)
    first, part = part % units * UNIT, part // units
    k += b * skb + h * skh
    v += b * svb + h * svh
    if MASKED:
        keep += b * smb + h * smh
    bank, warp, warp_low = _common(bank_in, shift_in, h, banks, dtype, WIDTH, D, BANKS, MAP, WARPED)
    draws, spread = _load_draws(draws_in, h, heads, draws_each, banks, first, dtype, FEATURES, WIDTH, UNIT, D, BANKS,
                                MAP)  # fmt: skip
    gain = _gain(gains, first, draws_each, banks, UNIT, MAP)
    prior = _gain(priors, first, draws_each, banks, UNIT, MAP)
    top = tl.full([UNIT], NEVER, tl.float32)
    mass = tl.zeros([UNIT], tl.float32)
    slots = tl.zeros([UNIT, E], tl.float32)
    edge = start + (stop - start) // BLOCK * BLOCK
    for at in tl.range(start, edge, BLOCK, num_stages=STAGES):
        top, mass, slots = _gather_block(
            k, v, keep, at, stop, skn, skd, svn, svd, smn, top, mass, slots, draws, bank, spread, warp, warp_low,
            gain, square, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, WARPED, MASKED, P, False)  # fmt: skip
    if edge < stop:
        top, mass, slots = _gather_block(
            k, v, keep, edge, stop, skn, skd, svn, svd, smn, top, mass, slots, draws, bank, spread, warp, warp_low,
            gain, square, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, WARPED, MASKED, P, True)  # fmt: skip
    if ALONE:
        _keep(slots_out, stats, weights_in, count, h, head, first, top, mass, slots, prior, FEATURES, F, E, UNIT)
        arrive(flags + head)
    else:
        f, e = first + tl.arange(0, UNIT), tl.arange(0, E)
        at = head * chunks + part
        tl.store(tips + at * F + f, top)
        tl.store(tips + (count * chunks + at) * F + f, mass)
        mean = (slots / tl.where(mass > 0, mass, 1.0)[:, None]).to(parts.dtype.element_ty)
        tl.store(parts + (at.to(tl.int64) * F + f[:, None]) * E + e[None, :], mean)
        if _last_of_chunks(flags + 3 * count + head * units + first // UNIT, chunks):
            top, mass, slots = _join(parts, tips, head, first, count * chunks, chunks, F, E, UNIT)
            _keep(slots_out, stats, weights_in, count, h, head, first, top, mass, slots, prior, FEATURES, F, E, UNIT)
            arrive(flags + head)


@triton.jit
def _answer(
    item, q, draws_in, bank_in, shift_in, o, slots_in, stats, flags,
    gains, square, draws_each, banks, sqb, sqh, sqn, sqd, sob, soh, son, heads, tokens, count, readers,
    dtype: tl.constexpr,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, BANKS: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, MAP: tl.constexpr, WARPED: tl.constexpr, SAVE: tl.constexpr, HOLD: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Read the slots by a chunk of queries."""
    head, b, h, _, start, stop = _share(item, heads, readers, tokens, 1, BLOCK)
    q += b * sqb + h * sqh
    o += b * sob + h * soh
    level = stats + (2 * count + head) * F
    lse = stats + 3 * count * F + head.to(tl.int64) * tokens
    bank, warp, warp_low = _common(bank_in, shift_in, h, banks, dtype, WIDTH, D, BANKS, MAP, WARPED)
    _wait_for_units(flags, head, count, F // UNIT, readers)
    tiles = _held(draws_in, slots_in, 0, 0, h, head, heads, draws_each, banks, dtype, FEATURES, WIDTH, F, D, E, BANKS,
                  TILE, MAP, False, HOLD)  # fmt: skip
    for at in tl.range(start, stop, BLOCK, num_stages=STAGES):
        _answer_block(
            q, o, lse, at, stop, sqn, sqd, son, level, tiles, draws_in, slots_in, bank, warp, warp_low, gains, square,
            h, head, heads, draws_each, banks, dtype, FEATURES, WIDTH, VALUE_WIDTH, F, D, E, BANKS, BLOCK, TILE, MAP,
            WARPED, SAVE, HOLD, P)  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "count", "chunks", "readers"])
def forward(
    q, k, v, keep, draws_in, bank_in, shift_in, weights_in, o, slots_out, stats, parts, tips, flags,
    gains, priors, square, draws_each, banks,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, smb, smh, smn, sob, soh, son,
    heads, tokens, count, chunks, readers,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BANKS: tl.constexpr,
    BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    MAP: tl.constexpr, WARPED: tl.constexpr, MASKED: tl.constexpr, ALONE: tl.constexpr, SAVE: tl.constexpr,
    HOLD: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Attend. Grid: (count (units chunks + readers),) for the heads of all images; ALONE: there is one chunk."""
    item = tl.program_id(0)
    fillers = count * (F // UNIT) * chunks
    if item < fillers:
        _gather(
            item, k, v, keep, draws_in, bank_in, shift_in, weights_in, slots_out, stats, parts, tips, flags,
            gains, priors, square, draws_each, banks, skb, skh, skn, skd, svb, svh, svn, svd, smb, smh, smn,
            heads, tokens, count, chunks, FEATURES, WIDTH, VALUE_WIDTH, F, D, E, BANKS, BLOCK, UNIT, STAGES,
            MAP, WARPED, MASKED, ALONE, P)  # fmt: skip
    else:
        _answer(
            item - fillers, q, draws_in, bank_in, shift_in, o, slots_out, stats, flags,
            gains, square, draws_each, banks, sqb, sqh, sqn, sqd, sob, soh, son, heads, tokens, count, readers,
            v.dtype.element_ty, FEATURES, WIDTH, VALUE_WIDTH, F, D, E, BANKS, QUERY_BLOCK, UNIT, TILE, STAGES,
            MAP, WARPED, SAVE, HOLD, P)  # fmt: skip


@triton.jit
def _query_block(
    q, o, do, dq, lse_in, delta_out, at, stop, sqn, sqd, son, sgn, sgd, sdn, level_in, dwarp, tiles, draws_in,
    slots_in, bank, warp, warp_low, gains, square, h, head, heads, draws_each, banks, dtype: tl.constexpr,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, BANKS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, MAP: tl.constexpr,
    WARPED: tl.constexpr, HOLD: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a block of queries, and the products of their outputs with the outputs' gradients.

    With weights p of a query and the gradient g of its output y, the gradient of z is ``p (slots g - y.g)``. Outputs
    are rounded: what is left of the sum of that gradient, which is zero, says by how much y.g is wrong.
    """
    x = load_rows(q, at, stop, sqn, sqd, WIDTH, BLOCK, D, True)
    g = load_rows(do, at, stop, sgn, sgd, VALUE_WIDTH, BLOCK, E, True)
    y = load_rows(o, at, stop, son, 1, VALUE_WIDTH, BLOCK, E, True)
    n = at + tl.arange(0, BLOCK)
    delta = tl.sum(g.to(tl.float32) * y.to(tl.float32), 1)
    lse = tl.load(lse_in + n, mask=n < stop, other=-NEVER)
    FINE: tl.constexpr = WARPED or x.dtype != dtype
    wide, high, low, size, t, t_high, t_low = _seen_rows(x, bank, warp, warp_low, square, dtype, MAP, WARPED, P)
    dx = tl.zeros([BLOCK, D], tl.float32)
    dt = tl.zeros([BLOCK, BANKS], tl.float32)
    mean_x = tl.zeros([BLOCK, D], tl.float32)
    mean_t = tl.zeros([BLOCK, BANKS], tl.float32)
    left = tl.zeros([BLOCK], tl.float32)
    for tile in tl.static_range(F // TILE):
        draws, spread, slots = _tile_of(
            tiles, draws_in, slots_in, 0, 0, h, head, heads, draws_each, banks, tile, dtype, FEATURES, WIDTH, F, D, E,
            BANKS, TILE, MAP, False, HOLD)  # fmt: skip
        gain = _gain(gains, tile * TILE, draws_each, banks, TILE, MAP)
        z = _row_logs(high, low, size, t_high, t_low, draws, spread, gain, MAP, FINE, P)
        level = tl.load(level_in + tile * TILE + tl.arange(0, TILE))
        weights = tl.exp2(z + level[None, :] - lse[:, None])
        dweights = tl.dot(g, tl.trans(slots), input_precision=P)
        dz = weights * (dweights - delta[:, None])
        dx, dt = _add_gradient(dz, dx, dt, draws, spread, gain, MAP, False, P)
        mean_x, mean_t = _add_gradient(weights, mean_x, mean_t, draws, spread, gain, MAP, False, P)
        left += tl.sum(dz, 1)
    dx -= left[:, None] * mean_x
    dt -= left[:, None] * mean_t
    tl.store(delta_out + n, delta + left, mask=n < stop)
    if MAP == RANDOM:
        dx = dx * (gains[0] / LOG2E)
    dx, dwarp = _input_gradient(x, wide, size, t, dx, dt, bank, warp, warp_low, gains, dwarp, MAP, WARPED, P)
    store_rows(dq, dx, at, stop, sdn, WIDTH, BLOCK, D, True)
    return dwarp


@triton.jit
def _slot_block(
    q, do, lse_in, delta_in, at, stop, sqn, sqd, sgn, sgd, level, dslots, drop, draws, bank, spread, warp, warp_low,
    gain, square,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
    MAP: tl.constexpr, WARPED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Add what a block of queries gives to the gradients of a unit's slots, and to ``drop``, its weights of delta."""
    x = load_rows(q, at, stop, sqn, sqd, WIDTH, BLOCK, D, True)
    g = load_rows(do, at, stop, sgn, sgd, VALUE_WIDTH, BLOCK, E, True)
    n = at + tl.arange(0, BLOCK)
    lse = tl.load(lse_in + n, mask=n < stop, other=-NEVER)
    delta = tl.load(delta_in + n, mask=n < stop, other=0.0)
    FINE: tl.constexpr = WARPED or x.dtype != g.dtype
    high, low, size, t_high, t_low = _seen_columns(x, bank, warp, warp_low, square, g.dtype, MAP, WARPED, P)
    z = _column_logs(high, low, size, t_high, t_low, draws, spread, gain, MAP, FINE, P)
    weights = tl.exp2(z + level[:, None] - lse[None, :]).to(g.dtype)
    dslots = tl.dot(weights, g, dslots, input_precision=P)
    return dslots, drop + tl.sum(weights.to(tl.float32) * delta[None, :], 1)


@triton.jit
def _keep_gradient(
    dslots_out, pull_out, scale_out, slots_in, stats, count, head, first, dslots, drop,
    F: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a unit's slots over the mass, and over its size too, so that half precision holds it.

    A key's gradient is ``dslots (v - slots) + lift``; ``lift``, that of the level, is ``dslots slots - drop``, with the
    slots that queries read. What is common to all keys, ``pull = dslots slots - lift``, is taken of the rounded
    gradient and of slots in float32, so that nothing is left where v is the slot. The size is a power of two.
    """
    f, e = first + tl.arange(0, UNIT), tl.arange(0, E)
    mass = tl.load(stats + (count + head) * F + f)
    slots = _load_slots(slots_in, head, first, F, E, UNIT)
    lift = tl.sum(dslots * slots.to(dslots_out.dtype.element_ty).to(tl.float32), 1) - drop
    dslots = dslots / mass[:, None]
    scale = tl.maximum(tl.max(tl.max(tl.abs(dslots), 1), 0), 1e-30)
    scale = (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    rounded = (dslots / scale).to(dslots_out.dtype.element_ty)
    pull = tl.sum(rounded.to(tl.float32) * slots, 1) * scale - lift / mass
    tl.store(dslots_out + (head.to(tl.int64) * F + f[:, None]) * E + e[None, :], rounded)
    tl.store(pull_out + head * F + f, pull)
    tl.store(scale_out + head * F + f, tl.full([UNIT], 0.0, tl.float32) + scale)


@triton.jit
def _scale_of(scales, F: tl.constexpr, TILE: tl.constexpr):
    """Return the largest scale of a head's units."""
    largest = tl.load(scales)
    for tile in tl.static_range(1, F // TILE):
        largest = tl.maximum(largest, tl.load(scales + tile * TILE))
    return largest


@triton.jit
def _key_block(
    k, v, keep, dk, dv, at, stop, skn, skd, svn, svd, smn, sdn, sen, top_in, pull_in, scales, scale, dwarp, tiles,
    draws_in, dslots_in, bank, warp, warp_low, gains, square, h, head, heads, draws_each, banks, dtype: tl.constexpr,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, BANKS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, MAP: tl.constexpr,
    WARPED: tl.constexpr, MASKED: tl.constexpr, HOLD: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a block of keys and values."""
    x = load_rows(k, at, stop, skn, skd, WIDTH, BLOCK, D, True)
    y = load_rows(v, at, stop, svn, svd, VALUE_WIDTH, BLOCK, E, True)
    if MASKED:
        kept = load_mask(keep, at, stop, smn, BLOCK)[:, None]
        x, y = tl.where(kept, x, 0.0), tl.where(kept, y, 0.0)
    FINE: tl.constexpr = WARPED or x.dtype != y.dtype
    wide, high, low, size, t, t_high, t_low = _seen_rows(x, bank, warp, warp_low, square, y.dtype, MAP, WARPED, P)
    if MAP == RANDOM:  # keys that do not exist, of length zero, could outweigh all others
        size = tl.where(at + tl.arange(0, BLOCK) < stop, size, -NEVER)
    dx = tl.zeros([BLOCK, D], tl.float32)
    dy = tl.zeros([BLOCK, E], tl.float32)
    dt = tl.zeros([BLOCK, BANKS], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for tile in tl.static_range(F // TILE):
        draws, spread, dslots = _tile_of(
            tiles, draws_in, dslots_in, scales, scale, h, head, heads, draws_each, banks, tile, dtype, FEATURES, WIDTH,
            F, D, E, BANKS, TILE, MAP, True, HOLD)  # fmt: skip
        gain = _gain(gains, tile * TILE, draws_each, banks, TILE, MAP)
        z = _row_logs(high, low, size, t_high, t_low, draws, spread, gain, MAP, FINE, P)
        if MAP == RANDOM:
            z -= size[:, None]
        top = tl.load(top_in + tile * TILE + tl.arange(0, TILE))
        pull = tl.load(pull_in + tile * TILE + tl.arange(0, TILE)) * (1 / scale)
        weights = tl.exp2(z - top[None, :])
        if MASKED:
            weights = tl.where(kept, weights, 0.0)
        dy = tl.dot(weights.to(y.dtype), dslots, dy, input_precision=P)
        dweights = tl.dot(y, tl.trans(dslots), input_precision=P)
        dz = weights * (dweights - pull[None, :])
        dx, dt = _add_gradient(dz, dx, dt, draws, spread, gain, MAP, True, P)
        if MAP == RANDOM:
            total += tl.sum(dz, 1)
    store_rows(dv, dy * scale, at, stop, sen, VALUE_WIDTH, BLOCK, E, True)
    if MAP == RANDOM:
        dx = dx * (gains[0] / LOG2E) - wide * (total[:, None] * (2 * square / LOG2E))
    dx, dwarp = _input_gradient(
        x, wide, size, t, dx * scale, dt * scale, bank, warp, warp_low, gains, dwarp, MAP, WARPED, P)  # fmt: skip
    store_rows(dk, dx, at, stop, sdn, WIDTH, BLOCK, D, True)
    return dwarp


@triton.jit
def _store_square(base, place, value, WIDTH: tl.constexpr, D: tl.constexpr):
    """Store (D, D) as a matrix of a contiguous (places, WIDTH, WIDTH)."""
    d = tl.arange(0, D)
    inside = (d[:, None] < WIDTH) & (d[None, :] < WIDTH)
    tl.store(base + (place.to(tl.int64) * WIDTH + d[:, None]) * WIDTH + d[None, :], value, mask=inside)


@triton.jit
def _no_warp(D: tl.constexpr, WARPED: tl.constexpr):
    """Return the gradient of a warp, (D, D), before anything is added to it, or a number if there is none."""
    if WARPED:
        dwarp = tl.zeros([D, D], tl.float32)
    else:
        dwarp = tl.full((), 0.0, tl.float32)
    return dwarp


@triton.jit
def _queries(
    item, q, draws_in, bank_in, shift_in, o, do, dq, dwarp_out, slots_in, stats, deltas, flags,
    gains, square, draws_each, banks, sqb, sqh, sqn, sqd, sob, soh, son, sgb, sgh, sgn, sgd, sdb, sdh, sdn,
    heads, tokens, count, readers, dtype: tl.constexpr,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, BANKS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    MAP: tl.constexpr, WARPED: tl.constexpr, HOLD: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a chunk of queries."""
    head, b, h, _, start, stop = _share(item, heads, readers, tokens, 1, BLOCK)
    q += b * sqb + h * sqh
    o += b * sob + h * soh
    do += b * sgb + h * sgh
    dq += b * sdb + h * sdh
    level = stats + (2 * count + head) * F
    lse = stats + 3 * count * F + head.to(tl.int64) * tokens
    deltas += head.to(tl.int64) * tokens
    bank, warp, warp_low = _common(bank_in, shift_in, h, banks, dtype, WIDTH, D, BANKS, MAP, WARPED)
    tiles = _held(draws_in, slots_in, 0, 0, h, head, heads, draws_each, banks, dtype, FEATURES, WIDTH, F, D, E, BANKS,
                  TILE, MAP, False, HOLD)  # fmt: skip
    dwarp = _no_warp(D, WARPED)
    for at in tl.range(start, stop, BLOCK, num_stages=STAGES):
        dwarp = _query_block(
            q, o, do, dq, lse, deltas, at, stop, sqn, sqd, son, sgn, sgd, sdn, level, dwarp, tiles, draws_in, slots_in,
            bank, warp, warp_low, gains, square, h, head, heads, draws_each, banks, dtype, FEATURES, WIDTH, VALUE_WIDTH,
            F, D, E, BANKS, BLOCK, TILE, MAP, WARPED, HOLD, P)  # fmt: skip
    if WARPED:
        _store_square(dwarp_out, item, dwarp, WIDTH, D)
    arrive(flags + 2 * count + head)


@triton.jit
def _units(
    item, q, draws_in, bank_in, shift_in, do, slots_in, stats, parts, lifts, dslots_out, flags,
    gains, square, draws_each, banks, sqb, sqh, sqn, sqd, sgb, sgh, sgn, sgd, heads, tokens, count, chunks, readers,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, BANKS: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
    MAP: tl.constexpr, WARPED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Take the gradient of a unit's slots from a chunk of queries; the last chunk of a unit joins all."""
    dtype: tl.constexpr = dslots_out.dtype.element_ty
    units = F // UNIT
    head, b, h, part, start, stop = _share(item, heads, chunks, tokens, units, BLOCK)
    first, part = part % units * UNIT, part // units
    q += b * sqb + h * sqh
    do += b * sgb + h * sgh
    pulls = lifts + count * chunks * F
    scales = pulls + count * F
    deltas = scales + count * F + head.to(tl.int64) * tokens
    lse = stats + 3 * count * F + head.to(tl.int64) * tokens
    bank, warp, warp_low = _common(bank_in, shift_in, h, banks, dtype, WIDTH, D, BANKS, MAP, WARPED)
    draws, spread = _load_draws(draws_in, h, heads, draws_each, banks, first, dtype, FEATURES, WIDTH, UNIT, D, BANKS,
                                MAP)  # fmt: skip
    gain = _gain(gains, first, draws_each, banks, UNIT, MAP)
    f, e = first + tl.arange(0, UNIT), tl.arange(0, E)
    level = tl.load(stats + (2 * count + head) * F + f)
    dslots = tl.zeros([UNIT, E], tl.float32)
    drop = tl.zeros([UNIT], tl.float32)
    wait_until(flags + 2 * count + head, readers)
    for at in tl.range(start, stop, BLOCK, num_stages=STAGES):
        dslots, drop = _slot_block(
            q, do, lse, deltas, at, stop, sqn, sqd, sgn, sgd, level, dslots, drop, draws, bank, spread, warp, warp_low,
            gain, square, WIDTH, VALUE_WIDTH, D, E, BLOCK, MAP, WARPED, P)  # fmt: skip
    at = head * chunks + part
    tl.store(lifts + at * F + f, drop)
    tl.store(parts + (at.to(tl.int64) * F + f[:, None]) * E + e[None, :], dslots)
    if _last_of_chunks(flags + 3 * count + head * units + first // UNIT, chunks):
        dslots = tl.zeros([UNIT, E], tl.float32)
        drop = tl.zeros([UNIT], tl.float32)
        for index in range(chunks):
            dslots += _load_slots(parts, head * chunks + index, first, F, E, UNIT)
            drop += tl.load(lifts + (head * chunks + index) * F + f)
        _keep_gradient(dslots_out, pulls, scales, slots_in, stats, count, head, first, dslots, drop, F, E, UNIT)
        arrive(flags + head)


@triton.jit
def _keys(
    item, k, v, keep, draws_in, bank_in, shift_in, dk, dv, dwarp_out, stats, pulls, dslots_in, flags,
    gains, square, draws_each, banks, skb, skh, skn, skd, svb, svh, svn, svd, smb, smh, smn,
    sdb, sdh, sdn, seb, seh, sen, heads, tokens, count, readers,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, BANKS: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, MAP: tl.constexpr, WARPED: tl.constexpr, MASKED: tl.constexpr, HOLD: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a chunk of keys and values."""
    dtype: tl.constexpr = v.dtype.element_ty
    head, b, h, _, start, stop = _share(item, heads, readers, tokens, 1, BLOCK)
    k += b * skb + h * skh
    v += b * svb + h * svh
    dk += b * sdb + h * sdh
    dv += b * seb + h * seh
    if MASKED:
        keep += b * smb + h * smh
    scales = pulls + count * F + head * F
    bank, warp, warp_low = _common(bank_in, shift_in, h, banks, dtype, WIDTH, D, BANKS, MAP, WARPED)
    _wait_for_units(flags, head, count, F // UNIT, readers)
    scale = _scale_of(scales, F, TILE)
    tiles = _held(draws_in, dslots_in, scales, scale, h, head, heads, draws_each, banks, dtype, FEATURES, WIDTH, F, D,
                  E, BANKS, TILE, MAP, True, HOLD)  # fmt: skip
    dwarp = _no_warp(D, WARPED)
    for at in tl.range(start, stop, BLOCK, num_stages=STAGES):
        dwarp = _key_block(
            k, v, keep, dk, dv, at, stop, skn, skd, svn, svd, smn, sdn, sen, stats + head * F, pulls + head * F, scales,
            scale, dwarp, tiles, draws_in, dslots_in, bank, warp, warp_low, gains, square, h, head, heads, draws_each,
            banks, dtype, FEATURES, WIDTH, VALUE_WIDTH, F, D, E, BANKS, BLOCK, TILE, MAP, WARPED, MASKED, HOLD,
            P)  # fmt: skip
    if WARPED:
        _store_square(dwarp_out, count * readers + item, dwarp, WIDTH, D)


@triton.jit(do_not_specialize=["tokens", "count", "chunks", "readers"])
def backward(
    q, k, v, keep, draws_in, bank_in, shift_in, o, do, dq, dk, dv, dwarp_out, slots_in, stats, parts, lifts,
    dslots_out, flags,
    gains, square, draws_each, banks,
    sqb, sqh, sqn, sqd, skb, skh, skn, skd, svb, svh, svn, svd, smb, smh, smn,
    sob, soh, son, sgb, sgh, sgn, sgd, sdb, sdh, sdn, seb, seh, sen,
    heads, tokens, count, chunks, readers,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BANKS: tl.constexpr, BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, MAP: tl.constexpr, WARPED: tl.constexpr, MASKED: tl.constexpr, HOLD: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Take gradients. Grid: (count (units chunks + 2 readers),): chunks of queries, units, chunks of keys."""
    item = tl.program_id(0)
    chunk_items, unit_items = count * readers, count * (F // UNIT) * chunks
    pulls = lifts + count * chunks * F
    if item < chunk_items:
        _queries(
            item, q, draws_in, bank_in, shift_in, o, do, dq, dwarp_out, slots_in, stats, pulls + 2 * count * F, flags,
            gains, square, draws_each, banks, sqb, sqh, sqn, sqd, sob, soh, son, sgb, sgh, sgn, sgd, sdb, sdh, sdn,
            heads, tokens, count, readers, v.dtype.element_ty, FEATURES, WIDTH, VALUE_WIDTH, F, D, E, BANKS, BLOCK,
            TILE, STAGES, MAP, WARPED, HOLD, P)  # fmt: skip
    elif item < chunk_items + unit_items:
        _units(
            item - chunk_items, q, draws_in, bank_in, shift_in, do, slots_in, stats, parts, lifts, dslots_out, flags,
            gains, square, draws_each, banks, sqb, sqh, sqn, sqd, sgb, sgh, sgn, sgd, heads, tokens, count, chunks,
            readers, FEATURES, WIDTH, VALUE_WIDTH, F, D, E, BANKS, QUERY_BLOCK, UNIT, STAGES, MAP, WARPED,
            P)  # fmt: skip
    else:
        _keys(
            item - chunk_items - unit_items, k, v, keep, draws_in, bank_in, shift_in, dk, dv, dwarp_out, stats, pulls,
            dslots_out, flags, gains, square, draws_each, banks, skb, skh, skn, skd, svb, svh, svn, svd, smb, smh, smn,
            sdb, sdh, sdn, seb, seh, sen, heads, tokens, count, readers, FEATURES, WIDTH, VALUE_WIDTH, F, D, E, BANKS,
            BLOCK, UNIT, TILE, STAGES, MAP, WARPED, MASKED, HOLD, P)  # fmt: skip
