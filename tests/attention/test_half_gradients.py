"""Gradients of the eager formulas in half precision, beside those in float64."""

import copy

import pytest
import torch
from torch import Tensor

import visionattn
from visionattn.attention import ATTENTION, Attention, LinearAttention

SLACK = 2.0
"""Roundings of the type, of the size of the gradient, that it may be off by. Three products round their factors and
themselves, at random, by a third of one each; the gradient that is returned is rounded, too."""


def gradient(attention: Attention, x: Tensor, upstream: Tensor, causal: bool) -> Tensor:
    leaf = x.detach().requires_grad_()
    with visionattn.kernels("eager"):
        y = attention(leaf, is_causal=causal)
    (found,) = torch.autograd.grad(y, leaf, upstream.to(y.dtype))
    return found


def check(name: str, dtype: torch.dtype, tokens: int, width: int, limit: float, causal: bool = False) -> None:
    torch.manual_seed(0)
    attention = ATTENTION[name](width, 1, projections=False)
    streams = attention.streams
    x = (torch.rand(1, tokens, streams * width) * 2 - 1).mul(limit).to(dtype)
    upstream = torch.ones(1, tokens, width, dtype=dtype)
    truth = gradient(copy.deepcopy(attention).double(), x.double(), upstream, causal)
    found = gradient(attention.to(dtype), x, upstream, causal)
    assert found.dtype == dtype
    within = truth.abs() < 0.99 * torch.finfo(dtype).max
    assert found[within].isfinite().all()
    if name == "softmax":  # PyTorch's own kernels
        return
    error = torch.where(within, found.double() - truth, 0.0)
    # Where one token takes all, the gradient is the difference of two such numbers, in float32.
    least = torch.finfo(torch.float32).eps * width * limit * float(upstream.double().norm())
    for off, true in zip(error.chunk(streams, -1), truth.chunk(streams, -1), strict=True):
        assert off.norm() < SLACK * torch.finfo(dtype).eps * true.norm() + least


@pytest.mark.parametrize("limit", [1.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ATTENTION)
def test_half_gradients_are_those_of_float64(name: str, dtype: torch.dtype, limit: float) -> None:
    check(name, dtype, 2049, 64, limit)
    if ATTENTION[name].ordered:
        check(name, dtype, 257, 64, limit, causal=True)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "width"), [(9999, 80), (65537, 16)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in ATTENTION if issubclass(ATTENTION[name], LinearAttention)])
def test_half_gradients_of_many_tokens_are_those_of_float64(
    name: str, dtype: torch.dtype, tokens: int, width: int
) -> None:
    check(name, dtype, tokens, width, 60.0)


def test_half_gradients_have_gradients_and_transforms() -> None:
    """The gradient of a float16 product of float16 inputs, twice, and by torch.func."""
    torch.manual_seed(0)
    attention = ATTENTION["elu"](16, 2, projections=False)
    x = torch.randn(1, 9, 48).half()

    def penalty(x: Tensor) -> Tensor:
        y = attention(x).float().square().sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        return first.float().square().sum()

    (half,) = torch.autograd.grad(penalty(leaf := x.clone().requires_grad_()), leaf)
    (wide,) = torch.autograd.grad(penalty(leaf := x.double().requires_grad_()), leaf)
    assert (half.double() - wide).norm() < 8 * torch.finfo(torch.float16).eps * wide.norm()

    by_func = torch.func.grad(lambda x: attention(x).float().sum())(x)
    by_hand = gradient(attention, x, torch.ones(1, 9, 16), False)
    torch.testing.assert_close(by_func, by_hand, rtol=4e-3, atol=4e-3)
    _, tangent = torch.func.jvp(attention, (x,), (torch.ones_like(x),))
    _, wide_tangent = torch.func.jvp(attention, (x.double(),), (torch.ones_like(x).double(),))
    torch.testing.assert_close(tangent.double(), wide_tangent, rtol=1e-2, atol=1e-2)


def test_half_outputs_do_not_depend_on_whether_gradients_are_wanted() -> None:
    torch.manual_seed(0)
    attention, x = ATTENTION["ela_hadamard"](32, 2, projections=False), torch.randn(1, 300, 96).half()
    assert torch.equal(attention(x), attention(x.requires_grad_()))
