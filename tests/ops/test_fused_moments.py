"""ELA's fused kernels of distance and direction: by Triton's interpreter where there is no GPU."""

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from visionattn.attention import ATTENTION, LinearAttention
from visionattn.ops.fused import moments_library
from visionattn.ops.fused.moments_library import KINDS
from visionattn.ops.fused.plan import Plan
from visionattn.ops.packing import Projection
from visionattn.ops.positive import explicit
from visionattn.ops.switch import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Attend = Callable[[Tensor, Tensor, Tensor, str], Tensor]


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["whole", "split"])
def split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut heads into chunks or leave them whole, however few tokens they have."""
    use(Plan(1, 1, 64, 64, 4, 1) if request.param == "whole" else Plan(3, 2, 32, 32, 4, 1), monkeypatch)


def use(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plan_moments", "plan_moments_backward"):
        monkeypatch.setattr(moments_library, name, lambda *_: plan)
    moments_library._prepared_forward.cache_clear()
    moments_library._prepared_backward.cache_clear()


def attend_moments(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
    return moments_library.attend_moments(Projection(q, q.shape[1], k, v), kind)


def explicitly(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
    """Attend by the matrix of all pairs."""
    attention = cast(LinearAttention, ATTENTION[f"ela_{kind}"](q.shape[-1], 1))
    allowed = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device)
    return explicit(attention.log_kernel(q, k), v, allowed).mixed


def eagerly(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
    with kernels("eager"):
        return ATTENTION[f"ela_{kind}"](q.shape[-1], 1).attend(q, k, v, None, False)


def gradients(attend: Attend, inputs: list[Tensor], do: Tensor, kind: str) -> list[Tensor]:
    """Return the output and the gradients of all inputs."""
    x = [y.detach().requires_grad_() for y in inputs]
    o = attend(*x, kind)
    return [o.detach(), *torch.autograd.grad(o, x, do)]


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm().clamp(min=1e-3))


def assert_accurate(inputs: list[Tensor], do: Tensor, kind: str) -> None:
    """Assert that errors are those of the eager formula, or what the interpreter's sums, not of trees, lose more."""
    truths = gradients(explicitly, [x.double() for x in inputs], do.double(), kind)
    eager = gradients(eagerly, inputs, do, kind)
    fused = gradients(attend_moments, inputs, do, kind)
    for name, truth, reference, got in zip("oqkv", truths, eager, fused, strict=True):
        assert got.dtype == inputs[0].dtype
        assert error(got, truth) <= 1.5 * error(reference, truth) + 2e-7, name


def drawn(tokens: int, width: int, value_width: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return q, k, v and a gradient of the output."""
    generator = torch.Generator().manual_seed(tokens)
    widths = width, width, value_width, value_width
    *inputs, do = (torch.randn(1, 2, tokens, size, generator=generator).to(DEVICE, dtype) for size in widths)
    return inputs, do


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "width", "value_width"), [(1, 16, 16), (70, 32, 24), (96, 24, 48), (40, 96, 96), (40, 128, 128)]
)
def test_errors_are_those_of_the_formula(
    kind: str, dtype: torch.dtype, tokens: int, width: int, value_width: int
) -> None:
    inputs, do = drawn(tokens, width, value_width, dtype)
    assert_accurate(inputs, do, kind)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("case", ["shifted", "opposed", "peaked"])
def test_means_do_not_cancel(kind: str, dtype: torch.dtype, case: str) -> None:
    (q, k, v), do = drawn(150, 16, 16, torch.float32)
    if case == "shifted":
        q, k, v = q + 3, k + 3, v + 3
    elif case == "opposed":
        q, k = q + 3, k - 3
    else:
        q, k = q * 0.05, k * 0.05
        k[:, :, ::7] *= 40
    assert_accurate([x.to(dtype) for x in (q, k, v)], do.to(dtype), kind)


def test_bfloat16(kind: str) -> None:
    inputs, do = drawn(50, 16, 16, torch.bfloat16)
    truths = gradients(explicitly, [x.double() for x in inputs], do.double(), kind)
    for got, truth in zip(gradients(attend_moments, inputs, do, kind), truths, strict=True):
        assert got.dtype == torch.bfloat16
        assert error(got, truth) < 5e-3  # the interpreter cuts off what does not fit


@pytest.mark.usefixtures("split")
def test_any_strides(kind: str) -> None:
    packed = torch.randn(2, 40, 3, 2, 24, device=DEVICE, requires_grad=True)
    copies = [x.detach().contiguous().requires_grad_() for x in packed.permute(2, 0, 3, 1, 4)]
    o = attend_moments(*packed.permute(2, 0, 3, 1, 4), kind)
    assert o.shape == (2, 2, 40, 24)
    assert o.transpose(1, 2).is_contiguous()
    (grad,) = torch.autograd.grad(o.sum(), packed)  # a gradient of strides 0
    assert torch.equal(o, attend_moments(*copies, kind))
    alone = torch.autograd.grad(attend_moments(*copies, kind), copies, torch.ones_like(o).contiguous())
    assert torch.equal(grad.permute(2, 0, 3, 1, 4), torch.stack(alone))


@pytest.mark.usefixtures("split")
def test_results_repeat_bit_by_bit(kind: str) -> None:
    inputs, do = drawn(90, 16, 16, torch.float16)
    first, second = (gradients(attend_moments, inputs, do, kind) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    with torch.no_grad():
        assert torch.equal(attend_moments(*inputs, kind), first[0])


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_constant_values_come_back(kind: str, dtype: torch.dtype) -> None:
    (q, k, v), _ = drawn(70, 16, 16, dtype)
    v = v[:, :, :1].expand_as(v)
    assert torch.equal(attend_moments(q, k, v, kind), v)


def test_large_numbers_stay_finite(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        use(Plan(2, 2, 4096, 4096, 4, 1), monkeypatch)  # few steps: those are what takes the interpreter's time
    x = [(torch.rand(1, 1, 16384, 16, device=DEVICE) * 2 - 1).mul(60).half() for _ in "qkv"]
    x[0], x[1] = x[0].sign() * 60, x[1].sign() * 60
    o, *grads = gradients(attend_moments, x, torch.ones_like(x[2]), kind)
    assert error(o, eagerly(*(y.double() for y in x), kind)) < 1e-3
    assert all(y.isfinite().all() for y in (o, *grads))


def test_keys_opposed_to_a_query(kind: str) -> None:
    (q, _, v), _ = drawn(40, 16, 16, torch.float32)
    q = q[:, :, :1].expand_as(q)
    o, *grads = gradients(attend_moments, [q, -q, v], torch.ones_like(v), kind)
    assert all(y.isfinite().all() for y in (o, *grads))
    assert o.abs().max() <= v.abs().max()


def test_gradients_have_gradients(kind: str) -> None:
    inputs, do = drawn(20, 16, 16, torch.float32)

    def twice(attend: Attend) -> tuple[Tensor, ...]:
        x = [y.clone().requires_grad_() for y in inputs]
        grads = torch.autograd.grad(attend(*x, kind), x, do, create_graph=True)
        return torch.autograd.grad(sum(y.square().sum() for y in grads), x)

    for got, truth in zip(twice(attend_moments), twice(eagerly), strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5)


def test_the_operator_is_registered_soundly(kind: str) -> None:
    inputs, _ = drawn(20, 16, 24, torch.float32)
    x = [y.requires_grad_() for y in inputs]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    packed = torch.randn(2, 20, 96, device=DEVICE).requires_grad_()
    for tensors in ((x[0], x[1], x[2], x[0].shape[1]), (packed, None, None, 2)):
        arguments = (*tensors, None, kind, True)
        torch.library.opcheck(moments_library._forward, arguments, test_utils=checks)
        with torch.no_grad():
            o, state = moments_library._forward(*arguments)
            backward = *arguments[:-1], torch.ones_like(o), state
            torch.library.opcheck(moments_library._backward, backward, test_utils=checks[:2])
