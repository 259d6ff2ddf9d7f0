"""The gradient of a packed projection: put together right, and not copied where it lies together."""

import torch

from visionattn.ops import packing


def mixed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q.sin() * k * v).sum()


def test_gradients_of_any_order() -> None:
    x = torch.randn(2, 5, 36, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(mixed(*packing.views(x, 3)), x)
    (found,) = torch.autograd.grad(mixed(*packing._Unpack.apply(x, 3)), x)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradgradcheck(lambda x: mixed(*packing._Unpack.apply(x, 3)), x)


def test_what_lies_together_is_not_copied() -> None:
    parts = packing.packed_like(torch.randn(2, 3, 5, 4))
    for part in parts:
        part.copy_(torch.randn_like(part))
    whole = packing._whole(parts)
    assert whole is not None
    assert whole.data_ptr() == parts[0].data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(packing.views(whole, 3), parts, strict=True))


def test_what_lies_apart_or_in_another_order_is_no_projection() -> None:
    q, k, v = packing.packed_like(torch.randn(2, 3, 5, 4))
    assert packing._whole((q, v, k)) is None
    assert packing._whole((q, k, v.clone())) is None
    assert packing._whole((q, k.double(), v)) is None
