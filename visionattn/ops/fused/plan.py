"""How a kernel is launched: a function of shapes and types alone, so that sums have one order on every machine.

The sizes were found by measurement on an H100; results/ops has what they reach.
"""

from typing import NamedTuple

SLOTS = 264
"""Programs that a large GPU runs at once: where heads are fewer than half of that, they are split."""


class Plan(NamedTuple):
    """Sizes of one launch.

    Attributes:
        chunks: parts of a head whose partial sums are joined; 1: a program has a whole head to itself.
        readers: parts of a head in the second half of the work.
        block: tokens of a step.
        query_block: queries of a step of the forward pass.
        warps: of a program.
        stages: of the software pipeline.
        unit: features of a projected map that a program gathers.
        tile: features of a projected map of a step, where tokens are answered.
        hold: whether all tiles of a projected map are held in shared memory; else each block of tokens loads them.
    """

    chunks: int
    readers: int
    block: int
    query_block: int
    warps: int
    stages: int
    unit: int = 64
    tile: int = 64
    hold: bool = False

    @property
    def whole(self) -> bool:
        """Whether a program has a whole head to itself."""
        return self.chunks == 1

    def grid(self, heads: int) -> tuple[int]:
        """Return how many programs do the heads of all images."""
        return (heads if self.whole else heads * (self.chunks + self.readers),)


def smaller(plan: Plan) -> list[Plan]:
    """Return a plan and what to try where a GPU has too little shared memory for it.

    That is fewer stages, then tiles that are not held, and with them and beyond them smaller blocks.
    """
    plans = [plan]
    while plan.stages > 1 or plan.hold or max(plan.block, plan.query_block) > 16:
        if plan.stages > 1:
            plan = plan._replace(stages=plan.stages - 1)
        elif plan.hold:
            plan = plan._replace(hold=False, block=min(32, plan.block), query_block=min(32, plan.query_block))
        else:
            plan = plan._replace(block=max(16, plan.block // 2), query_block=max(16, plan.query_block // 2))
        plans.append(plan)
    return plans


def plan_forward(tokens: int, heads: int, width: int, half: bool) -> Plan:
    """Choose for N tokens, B H heads, the larger of the padded widths, and half or full precision."""
    chunks = _chunks(tokens, heads, 2048)
    if not half:
        return Plan(chunks, chunks, 32, 32, 8, 2) if width <= 64 else Plan(chunks, chunks, 16, 16, 8, 1)
    if width > 64:
        return Plan(chunks, chunks, 64, 64, 8, 2)
    if chunks > 1 or tokens > 1280:
        return Plan(chunks, chunks, 128, 128, 4, 3)
    return Plan(1, 1, 64, 64, 2, 3) if tokens > 512 else Plan(1, 1, 32, 32, 1, 3)


def plan_backward(tokens: int, heads: int, width: int, half: bool) -> Plan:
    """Choose for the backward pass, from the same numbers."""
    chunks = _chunks(tokens, heads, 512)
    if not half:
        return Plan(chunks, chunks, 32, 32, 8, 1) if width <= 64 else Plan(chunks, chunks, 16, 16, 8, 1)
    return Plan(chunks, 2 * chunks, 64, 64, 4 if width <= 64 else 8, 3 if width <= 64 else 2)


def plan_projected(tokens: int, heads: int, features: int, width: int, plain: bool) -> Plan:
    """Choose for the kernels of projected maps, forward: ``block`` is that of keys, a program of which has one unit.

    Args:
        tokens: N.
        heads: B H.
        features: padded number of them.
        width: the larger of the padded widths.
        plain: whether the map is a projection and nothing else, which takes the fewest registers.
    """
    unit, tile = min(features, 128), min(features, 128 if plain and width <= 64 else 64)
    chunks, readers = _parts(tokens, heads, features // unit, 4)
    return Plan(chunks, readers, 64, 64, 4 if width <= 64 else 8, 2 if plain else 1, unit, tile, True)


def plan_projected_backward(tokens: int, heads: int, features: int, width: int, plain: bool) -> Plan:
    """Choose for the backward pass: ``query_block`` is that of programs with a unit, ``block`` that of all others."""
    unit, tile = min(features, 128), min(features, 64)
    chunks, readers = _parts(tokens, heads, features // unit, 2)
    return Plan(chunks, readers, 64, 64, 4 if width <= 64 else 8, 2 if plain else 1, unit, tile, True)


def plan_moments(tokens: int, heads: int, width: int, half: bool) -> Plan:
    """Choose for the kernels of moments, forward."""
    chunks = _chunks(tokens, heads, 2048)
    if half and width <= 64:
        return Plan(chunks, chunks, 64, 64, 4, 2)
    return Plan(chunks, chunks, 32, 32, 8, 2) if half or width <= 64 else Plan(chunks, chunks, 16, 16, 8, 2)


def plan_moments_backward(tokens: int, heads: int, width: int) -> Plan:
    """Choose for the backward pass of moments."""
    chunks = _chunks(tokens, heads, 512)
    return Plan(chunks, chunks, 32, 32, 8, 1) if width <= 64 else Plan(chunks, chunks, 16, 16, 8, 1)


def _chunks(tokens: int, heads: int, whole: int) -> int:
    """Return 1 for up to 512 tokens, or up to ``whole`` of them where heads are many, else parts of 256 or so."""
    if tokens <= 512 or (tokens <= whole and 2 * heads >= SLOTS):
        return 1
    return max(-(-tokens // 1024), min(-(-SLOTS // heads), -(-tokens // 256)))


def _parts(tokens: int, heads: int, units: int, least: int) -> tuple[int, int]:
    """Return chunks of up to 4,096 tokens and readers of up to 512, more of them where heads are few."""
    blocks = -(-tokens // 64)
    chunks = max(-(-tokens // 4096), min(-(-SLOTS // (heads * units)), -(-blocks // least)))
    return chunks, max(-(-tokens // 512), min(-(-2 * SLOTS // heads), -(-blocks // 2)))
