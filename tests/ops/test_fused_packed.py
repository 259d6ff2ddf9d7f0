"""The packed projection handed to kernels as it is: the bits are those of its parts; masks, refusals and gradients."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton")

from visionattn.attention import ATTENTION, Attention
from visionattn.ops import switch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["ela_hadamard", "elu", "performer", "dark", "calibrated", "slay", "ela_sum", "ela_direction"]


def made(name: str, width: int, **options: object) -> Attention:
    torch.manual_seed(0)
    if name == "calibrated":
        name, options = "performer", {"calibrated": True, **options}
    layer: Attention = ATTENTION[name](2 * width, 2, projections=False, **options).to(DEVICE)
    if "calibrated" in options:
        layer.log_weights.normal_()
    if name == "dark":
        torch.nn.init.normal_(layer.shift, std=0.1)
    return layer


def apart(layer: Attention, x: Tensor, mask: Tensor | None) -> Tensor:
    """Attend by queries, keys and values."""
    q, k, v = layer.split(x)
    return layer.finish(layer.attend(q, k, v, mask, False))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_the_bits_are_those_of_the_parts(name: str, masked: bool) -> None:
    layer = made(name, 16).half()
    x = torch.randn(3, 6 * 16, 37, device=DEVICE).half().transpose(1, 2).requires_grad_()  # as convolutions leave it
    mask = (torch.rand(3, 1, 1, 37, device=DEVICE) > 0.4) if masked else None
    results = []
    with switch.kernels("fused"):
        for attend in (layer, lambda x, mask: apart(layer, x, mask)):
            out = attend(x, mask)
            wanted = [x, *layer.parameters()]
            results.append([out, *torch.autograd.grad(out.float().square().sum(), wanted)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_masked_keys_do_not_matter(name: str) -> None:
    layer = made(name, 16).half()
    x = torch.randn(2, 41, 96, device=DEVICE).half().requires_grad_()
    mask = torch.rand(2, 1, 1, 41, device=DEVICE) > 0.4
    mask[1] = False  # an image without any key
    with switch.kernels("fused"):
        out = layer(x, mask)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
    with switch.kernels("eager"):
        expected = layer(x, mask)
        (usual,) = torch.autograd.grad(expected.float().square().sum(), x)
    torch.testing.assert_close(out, expected, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(gradient, usual, rtol=2e-2, atol=2e-2)
    assert not out[1].any()
    hidden = ~mask[0, 0, 0]
    assert not gradient[0, hidden, 32:].any()  # of keys and values that no query sees


@pytest.mark.parametrize("name", ["performer", "dark"])
def test_wide_values_are_taken_in_pieces(name: str) -> None:
    layer = made(name, 96).half()
    x = torch.randn(1, 20, 6 * 96, device=DEVICE).half().requires_grad_()
    with torch.no_grad(), switch.kernels("eager"):
        expected = layer(x)
    with switch.kernels("fused"):
        torch.testing.assert_close(layer(x), expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", ["ela_hadamard", "ela_sum"])
def test_a_gradient_of_the_gradient(name: str) -> None:
    layer = made(name, 16)
    x = torch.randn(1, 12, 96, device=DEVICE).requires_grad_()

    def penalty() -> Tensor:
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    with switch.kernels("fused"):
        found = penalty()
    with switch.kernels("eager"):
        torch.testing.assert_close(found, penalty(), rtol=1e-3, atol=1e-4)


def test_a_model_laid_out_channels_last() -> None:
    layer = made("slay", 16).half()
    x = torch.randn(1, 20, 96, device=DEVICE).half()
    with torch.no_grad(), switch.kernels("fused"):
        expected = layer(x)
        layer = layer.to(memory_format=torch.channels_last)
        assert torch.equal(layer(x), expected)
