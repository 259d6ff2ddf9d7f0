"""What all kernels share: tiles of tokens in and out, parts of the work, and flags between programs."""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
NEVER: tl.constexpr = tl.constexpr(-1e30)
"""Stands for the logarithm of zero: finite, so that the difference of two of them is defined."""


@triton.jit
def inside_tile(at, stop, WIDTH: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, EDGE: tl.constexpr):
    """Return which of (BLOCK, D) exist: in the last block of some tokens, EDGE, rows end too."""
    n, d = at + tl.arange(0, BLOCK), tl.arange(0, D)
    if not EDGE:
        inside = (d < WIDTH)[None, :]
    elif WIDTH == D:
        inside = (n < stop)[:, None]
    else:
        inside = (d < WIDTH)[None, :] & (n < stop)[:, None]
    return inside


@triton.jit
def load_rows(base, at, stop, stride_n, stride_d, WIDTH: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
          EDGE: tl.constexpr):  # fmt: skip
    """Load rows of (tokens, WIDTH) as (BLOCK, D), zeros outside."""
    base += tl.full((), at, tl.int64) * stride_n
    n, d = tl.arange(0, BLOCK), tl.arange(0, D)
    places = base + n[:, None] * stride_n + d[None, :] * stride_d
    if EDGE or WIDTH < D:
        tile = tl.load(places, mask=inside_tile(at, stop, WIDTH, BLOCK, D, EDGE), other=0.0)
    else:
        tile = tl.load(places)
    return tile


@triton.jit
def load_columns(base, at, stop, stride_n, stride_d, WIDTH: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
             EDGE: tl.constexpr):  # fmt: skip
    """Load rows of (tokens, WIDTH) as columns, (D, BLOCK), zeros outside."""
    base += tl.full((), at, tl.int64) * stride_n
    n, d = tl.arange(0, BLOCK), tl.arange(0, D)
    places = base + n[None, :] * stride_n + d[:, None] * stride_d
    if EDGE or WIDTH < D:
        tile = tl.load(places, mask=tl.trans(inside_tile(at, stop, WIDTH, BLOCK, D, EDGE)), other=0.0)
    else:
        tile = tl.load(places)
    return tile


@triton.jit
def load_mask(base, at, stop, stride_n, BLOCK: tl.constexpr):
    """Return which of BLOCK tokens are kept, (BLOCK,); those that do not exist are not."""
    n = at + tl.arange(0, BLOCK)
    return tl.load(base + n.to(tl.int64) * stride_n, mask=n < stop, other=0) != 0


@triton.jit
def fill_slots(
    z, y, keep, at, stop, stride_n, top, mass, slots,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, P: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Take a block of keys, z of (F, BLOCK), and their values, (BLOCK, E), into slots (F, E), by an online maximum.

    ``top`` is the maximum of z so far, and ``mass`` the sum of ``exp2(z - top)``, (F,).
    """
    if MASKED:
        kept = load_mask(keep, at, stop, stride_n, BLOCK)
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
def store_rows(base, value, at, stop, stride_n, WIDTH: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
           EDGE: tl.constexpr):  # fmt: skip
    """Store (BLOCK, D) as rows of (tokens, WIDTH)."""
    base += tl.full((), at, tl.int64) * stride_n
    n, d = tl.arange(0, BLOCK), tl.arange(0, D)
    places = base + n[:, None] * stride_n + d[None, :]
    value = value.to(base.dtype.element_ty)
    if EDGE or WIDTH < D:
        tl.store(places, value, mask=inside_tile(at, stop, WIDTH, BLOCK, D, EDGE))
    else:
        tl.store(places, value)


@triton.jit
def load_matrix(base, head, rows, width, R: tl.constexpr, D: tl.constexpr):
    """Load the head's matrix of a contiguous (heads, rows, width) as (R, D), zeros outside."""
    r, d = tl.arange(0, R), tl.arange(0, D)
    inside = (r[:, None] < rows) & (d[None, :] < width)
    return tl.load(base + (head.to(tl.int64) * rows + r[:, None]) * width + d[None, :], mask=inside, other=0.0)


@triton.jit
def place(item, heads, parts):
    """Return head, of all images, and part of an item: heads of an image go together, whose tokens share memory."""
    h, rest = item % heads, item // heads
    return rest // parts * heads + h, rest % parts


@triton.jit
def span(part, parts, tokens, BLOCK: tl.constexpr):
    """Return the tokens, from and to, of one of equal parts of whole blocks."""
    blocks = tl.cdiv(tokens, BLOCK)
    return part * blocks // parts * BLOCK, tl.minimum((part + 1) * blocks // parts * BLOCK, tokens)


@triton.jit
def share(item, fillers, chunks, readers, heads, tokens, BLOCK: tl.constexpr, READER_BLOCK: tl.constexpr):
    """Return a program's share where heads are split: the number of its part, head, tokens, and whether it reads."""
    reads = item >= fillers
    if reads:
        head, part = place(item - fillers, heads, readers)
        start, stop = span(part, readers, tokens, READER_BLOCK)
    else:
        head, part = place(item, heads, chunks)
        start, stop = span(part, chunks, tokens, BLOCK)
        item = head * chunks + part
    return item, head, start, stop, reads


@triton.jit
def arrive(flag):
    """Count this program in, after all that it wrote; return how many were in before, whose writing is seen then."""
    tl.debug_barrier()
    before = tl.atomic_add(flag, 1, sem="acq_rel")
    tl.debug_barrier()
    return before


@triton.jit
def wait_until(flag, count):
    """Wait until as many programs have arrived at a flag; all that they wrote before is seen then."""
    while tl.atomic_add(flag, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


@triton.jit
def wait_for(flags, head, heads, chunks, readers):
    """Wait until a head's chunks are joined; the last of its readers lowers the head's two flags for the next launch.

    The first flag counts the chunks, and then their joining; the second counts the readers that saw it.
    """
    wait_until(flags + head, chunks + 1)
    if tl.atomic_add(flags + heads + head, 1, sem="acq_rel") == readers - 1:
        tl.store(flags + head, 0)
        tl.store(flags + heads + head, 0)
