"""The packed projection, whole and taken apart."""

import torch

from visionattn.ops.packing import Projection, views


def test_parts_and_shapes_are_those_of_timms_layout() -> None:
    x = torch.randn(2, 5, 36)
    expected = x.reshape(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    packed = Projection(x, 3)
    assert all(torch.equal(a, b) for a, b in zip(packed.parts(), expected, strict=True))
    apart = Projection(expected[0], 3, expected[1], expected[2])
    assert packed.shapes() == apart.shapes() == ((2, 3, 5, 4),) * 3
    assert all(a is b for a, b in zip(apart.parts(), (apart.x, apart.k, apart.v), strict=True))


def test_parts_are_views() -> None:
    x = torch.zeros(2, 5, 36)
    for part, value in zip(views(x, 3, 4), (1.0, 2.0, 3.0), strict=True):
        part.fill_(value)
    assert torch.equal(x[0, 0], torch.tensor([1.0] * 12 + [2.0] * 12 + [3.0] * 12))
