"""What a call with positive features is remembered by: all that its launch depends on, but the numbers in memory."""

from typing import Any, NamedTuple

from torch import Tensor

from visionattn.ops.fused.buffers import Memory, mask_strides, parts_of
from visionattn.ops.fused.launch import aligned
from visionattn.ops.fused.maps import FeatureMap
from visionattn.ops.packing import Projection


class Sizes(NamedTuple):
    """What a launch needs to know of its inputs, and what it is remembered by.

    Attributes:
        queries: shape of the queries, (B, H, N, D).
        width: of the values, E.
        strides: of all inputs in order.
        types: theirs, and the device's number.
        bits: which tensors begin at a multiple of 16 bytes.
        kind: of the map.
        draws: shape of its draws, (R, H, M, D), or nothing.
        banks: number of its anchors.
        numbers: gains, priors and square.
        flags: whether there is a warp and a mask, and whether the state is saved.
    """

    queries: tuple[int, ...]
    width: int
    strides: tuple[tuple[int, ...], ...]
    types: tuple[Any, ...]
    bits: int
    kind: str
    draws: tuple[int, ...]
    banks: int
    numbers: tuple[Any, ...]
    flags: tuple[bool, ...]


def sizes_of(
    inputs: Projection, keep: Tensor | None, features: FeatureMap, save: bool, *others: Memory
) -> tuple[Sizes, tuple[Memory, Memory, Memory]]:
    """Return the sizes of a call, and queries, keys and values; ``others`` is further memory of any strides."""
    kind, *tensors, gains, priors, square = features
    draws, bank, shift, _ = tensors
    q, k, v = parts = parts_of(inputs)
    return Sizes(
        q.shape,
        v.shape[-1],
        (q.stride(), k.stride(), v.stride(), mask_strides(keep), *[x.stride() for x in others]),
        (q.dtype, v.dtype, inputs.x.device.index, *[None if x is None else x.dtype for x in tensors]),
        aligned(q, k, v, keep, *tensors, *others),
        kind,
        () if draws is None else draws.shape,
        1 if bank is None else len(bank),
        (gains, priors, square),
        (shift is not None, keep is not None, save),
    ), parts
