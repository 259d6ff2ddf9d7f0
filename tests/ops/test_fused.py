"""Fused kernels of positive features, in Triton's interpreter where there is no GPU.

bfloat16 is left to GPUs: the interpreter multiplies its bits.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton")

from visionattn.attention import ATTENTION, Attention, LinearAttention
from visionattn.errors import UnsupportedError
from visionattn.ops import positive, switch
from visionattn.ops.fused import FeatureMap, library, projected_library, softmax_features, yat_features
from visionattn.ops.fused.plan import Plan, plan_backward, plan_forward, plan_projected, plan_projected_backward
from visionattn.ops.fused.sizes import Sizes, sizes_of
from visionattn.ops.packing import Projection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D = 16
SPLIT = Plan(chunks=3, readers=2, block=16, query_block=32, warps=4, stages=2, unit=32, tile=16)
WHOLE = SPLIT._replace(chunks=1, readers=1, hold=True)


def random_map(warped: bool, weighed: bool, width: int) -> FeatureMap:
    draws = torch.randn(2, 40, width, device=DEVICE).bfloat16().float()
    shift = 0.4 * width**-0.5 * torch.randn(2, width, width, device=DEVICE)
    line = torch.linspace(-0.5, 0.5, 40, device=DEVICE)
    weights = torch.stack((line, -line)).unsqueeze(1)
    return softmax_features(draws, shift.requires_grad_() if warped else None, weights if weighed else None)


def sphere_map(width: int) -> FeatureMap:
    draws = torch.randn(2, 2, 8, width, device=DEVICE).bfloat16().float()
    bank = torch.nn.functional.normalize(torch.randn(4, width, device=DEVICE), dim=-1).bfloat16().float()
    return yat_features(draws, bank, [0.3, 1.2], [0.5, 0.2])


PROJECTED = ["performer", "dark", "calibrated", "slay"]
MAPS = ["exp", "elu", "relu", *PROJECTED]


def made(name: str, width: int = D) -> FeatureMap:
    if name == "slay":
        return sphere_map(width)
    return random_map(name == "dark", name == "calibrated", width) if name in PROJECTED else FeatureMap(name)


@pytest.fixture(params=[WHOLE, SPLIT], ids=["whole", "split"], autouse=True)
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for room in (library, projected_library):
        for name in ("plan_forward", "plan_backward", "plan_projected", "plan_projected_backward"):
            if hasattr(room, name):
                monkeypatch.setattr(room, name, lambda tokens, *_: request.param if tokens > 32 else WHOLE)
        room._prepared_forward.cache_clear()
        room._prepared_backward.cache_clear()


def inputs(tokens: int, dtype: torch.dtype, value_width: int = D, scale: float = 1.0, width: int = D) -> list[Tensor]:
    """Queries, keys, values and a gradient, all of them views, as attention has them."""
    widths = (width, width, value_width, value_width)
    return [
        torch.randn(2, tokens, 2, w, device=DEVICE).mul(scale).to(dtype).transpose(1, 2).requires_grad_()
        for w in widths
    ]


def everything(x: list[Tensor], features: FeatureMap, eager: bool) -> list[Tensor]:
    """Output and gradients."""
    q, k, v, g = x
    wanted = [q, k, v] + ([] if features.shift is None else [features.shift])
    inputs = Projection(q, q.shape[1], k, v)
    out = positive.linear(features.logs(q), features.key_logs(k), v) if eager else library.attend(inputs, features)
    return [out.detach(), *torch.autograd.grad(out, wanted, g.detach())]


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def in_double(x: list[Tensor], features: FeatureMap) -> tuple[list[Tensor], FeatureMap]:
    shift = None if features.shift is None else features.shift.detach().double().requires_grad_()
    return [y.detach().double().requires_grad_() for y in x], features._replace(shift=shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "width", "value_width"),
    [(1, 16, 16), (53, 16, 24), (40, 96, 96), pytest.param(40, 128, 128, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", MAPS)
def test_errors_are_those_of_the_formula(
    name: str, tokens: int, width: int, value_width: int, dtype: torch.dtype
) -> None:
    features, x = made(name, width), inputs(tokens, dtype, value_width, width=width)
    found, usual = everything(x, features, False), everything(x, features, True)
    truth = everything(*in_double(x, features), True)
    # Logarithms of features of long vectors are large, and kernels round them once forward and once backward.
    # Of one token, eager has the gradient of the value without an error; kernels round its weight, which is nearly 1.
    half = 5e-4 if tokens == 1 else 1e-4
    rounding = 3e-8 * width**0.8 if dtype == torch.float32 else half
    for fused, eager, exact in zip(found, usual, truth, strict=True):
        assert fused.dtype == eager.dtype
        if exact.norm() > 1e-3:  # one token's gradients are zero
            assert error(fused, exact) <= 1.5 * error(eager, exact) + rounding


@pytest.mark.parametrize("name", MAPS)
def test_the_same_bits_twice_and_with_or_without_gradients(name: str) -> None:
    features, x = made(name), inputs(40, torch.float16)
    first = everything(x, features, False)
    assert all(torch.equal(a, b) for a, b in zip(first, everything(x, features, False), strict=True))
    with torch.no_grad():
        assert torch.equal(library.attend(Projection(x[0], x[0].shape[1], *x[1:3]), features), first[0])


@pytest.mark.parametrize("name", PROJECTED)
def test_masked_keys_of_projected_maps(name: str) -> None:
    features, (q, k, v, g) = made(name), inputs(40, torch.float32)
    keep = torch.rand(2, 1, 40, 1, device=DEVICE) < 0.6
    keep[0] = False  # a head without any key gets zeros
    wanted = [q, k, v] + ([] if features.shift is None else [features.shift])
    out = library.attend(Projection(q, q.shape[1], k, v), features, keep)
    found = torch.autograd.grad(out, wanted, g.detach())
    double, map_in_double = in_double([q, k, v, g], features)
    wanted = [*double[:3]] + ([] if features.shift is None else [map_in_double.shift])
    truth = positive.linear(map_in_double.logs(double[0]), map_in_double.key_logs(double[1]), double[2], keep)
    assert not out[0].any()
    assert error(out.detach(), truth.detach()) < 1e-5
    for fused, exact in zip(found, torch.autograd.grad(truth, wanted, double[3]), strict=True):
        assert error(fused, exact) < 1e-4


@pytest.mark.parametrize("name", ["exp", "elu", "relu"])
def test_long_vectors_and_lonely_features(name: str) -> None:
    features, x = made(name), inputs(40, torch.float16, scale=60.0)
    with torch.no_grad():
        x[1][..., 0] = -60.0  # a feature that no key has
        x[0][:, :, 3] = -60.0  # a query without any
    truth = everything(*in_double(x, features), True)
    for fused, exact in zip(everything(x, features, False), truth, strict=True):
        assert fused.isfinite().all()
        assert error(fused, exact) < 5e-3


@pytest.mark.parametrize("name", ["exp", "dark", "calibrated", "slay"])
def test_constant_values_come_back(name: str) -> None:
    q, k, v, _ = inputs(40, torch.float32)
    constant = torch.full_like(v, 3.25)
    torch.testing.assert_close(library.attend(Projection(q, q.shape[1], k, constant), made(name)), constant)


@pytest.mark.parametrize("name", MAPS)
def test_second_derivative(name: str) -> None:
    features, x = made(name), inputs(36, torch.float32)

    def penalty(x: list[Tensor], features: FeatureMap, eager: bool) -> Tensor:
        q, k, v, _ = x
        if eager:
            out = positive.linear(features.logs(q), features.key_logs(k), v)
        else:
            out = library.attend(Projection(q, q.shape[1], k, v), features)
        (first,) = torch.autograd.grad(out.square().sum(), k, create_graph=True)
        return torch.autograd.grad(first.square().sum(), q)[0]

    assert error(penalty(x, features, False), penalty(*in_double(x, features), True)) < 1e-4


@pytest.mark.parametrize("name", ["exp", "dark", "calibrated", "slay"])
def test_operators_are_registered_soundly(name: str) -> None:
    q, k, v, _ = inputs(20, torch.float16)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    features = made(name)
    for tensors in ((q, k, v), (torch.randn(2, 20, 96, device=DEVICE).half().requires_grad_(), None, None)):
        arguments = (*tensors, 2, None, *features, True)
        torch.library.opcheck(library._forward, arguments, test_utils=checks)
        with torch.no_grad():
            o, state = library._forward(*arguments)
            output = None if features.draws is None else o
            torch.library.opcheck(
                library._backward, (*arguments[:-1], output, torch.ones_like(o), state), test_utils=checks[:2]
            )


WITHOUT_KERNELS = {"uniform", "focused", "polaformer", "agent", "mala", "inline", "rala"}


@pytest.mark.parametrize("name", [n for n, cls in ATTENTION.items() if issubclass(cls, LinearAttention)])
@pytest.mark.parametrize("width", [16, pytest.param(128, marks=pytest.mark.slow)])
def test_modules_take_their_kernels(name: str, width: int) -> None:
    layer: Attention = ATTENTION[name](2 * width, 2, projections=False).to(DEVICE).half()
    x = torch.randn(2, 40, 6 * width, device=DEVICE).half()
    with torch.no_grad():
        with switch.kernels("eager"):
            expected = layer(x)
        with switch.kernels("fused"):
            if name in WITHOUT_KERNELS or (name == "cosformer" and width > 64):
                with pytest.raises(UnsupportedError, match=r"choose kernels\('auto'\)"):
                    layer(x)
                return
            found = layer(x)
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("name", ["performer", "dark"])
def test_calibrated_modules_take_their_kernels(name: str, causal: bool) -> None:
    layer: Attention = ATTENTION[name](32, 2, projections=False, calibrated=True).to(DEVICE)
    layer.log_weights.normal_(std=2.0)
    layer, x = layer.half(), torch.randn(2, 40, 96, device=DEVICE).half()
    with torch.no_grad():
        with switch.kernels("eager"):
            expected = layer(x, is_causal=causal)
        with switch.kernels("fused"):
            torch.testing.assert_close(layer(x, is_causal=causal), expected, rtol=5e-3, atol=5e-3)


def test_weights_that_want_a_gradient_have_no_kernel() -> None:
    layer: Attention = ATTENTION["performer"](32, 2, projections=False, calibrated=True).to(DEVICE).half()
    layer.log_weights.requires_grad_()
    x = torch.randn(1, 20, 96, device=DEVICE).half()
    with switch.kernels("fused"):
        with pytest.raises(UnsupportedError, match="want a gradient"):
            layer(x)
        with torch.no_grad():
            layer(x)


@pytest.mark.parametrize("name", ["performer", "dark"])
def test_a_map_has_the_formula_of_its_module(name: str) -> None:
    layer: Attention = ATTENTION[name](32, 2, projections=False, calibrated=True).to(DEVICE)
    layer.log_weights.normal_()
    x = torch.randn(1, 2, 5, 16, device=DEVICE)
    torch.testing.assert_close(layer.fused_map().logs(x), layer.queries(x))
    torch.testing.assert_close(layer.fused_map().key_logs(x), layer.keys(x))


def test_launches_are_remembered_by_the_weights() -> None:
    q, k, v, _ = inputs(40, torch.float16)
    features = made("calibrated")
    weights = features.log_weights
    assert weights is not None
    shifted = torch.empty(weights.numel() + 1, device=DEVICE)[1:].view_as(weights).copy_(weights)

    def sizes(log_weights: Tensor | None) -> Sizes:
        return sizes_of(Projection(q, 2, k, v), None, features._replace(log_weights=log_weights), False)[0]

    assert len({sizes(x) for x in (None, weights, weights.half(), shifted)}) == 4
    assert sizes(weights) == sizes(weights.clone())


def test_what_is_not_finite_stays_in_its_image() -> None:
    q, k, v, g = inputs(60, torch.float32)
    features = FeatureMap("exp")
    alone = everything([x[1:] for x in (q, k, v, g)], features, False)
    with torch.no_grad():
        for x in (q, k, v):
            x[0] = float("nan")
    for both, one in zip(everything([q, k, v, g], features, False), alone, strict=True):
        assert torch.equal(both[1:], one)


def test_gradient_of_queries_that_are_the_keys() -> None:
    q, _, v, g = inputs(40, torch.float32)
    out = library.attend(Projection(q, q.shape[1], q, v), FeatureMap("exp"))
    (plain,) = torch.autograd.grad(out, q, g.detach(), retain_graph=True)
    (differentiable,) = torch.autograd.grad(out, q, g.detach(), create_graph=True)
    torch.testing.assert_close(differentiable, plain, rtol=1e-4, atol=1e-5)


def test_forward_mode_takes_the_formula() -> None:
    layer = ATTENTION["ela_hadamard"](32, 2, projections=False).to(DEVICE)
    x, direction = torch.randn(2, 1, 9, 96, device=DEVICE)
    with switch.kernels("eager"):
        expected = torch.func.jvp(layer, (x,), (direction,))[1]
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (direction,))[1], expected)
    with switch.kernels("fused"), pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.jvp(layer, (x,), (direction,))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda layer, x: layer(x.double()), "float64"),
        (
            lambda layer, x: layer.fuse(Projection(x[:, None], 1, x[:, None], x[:, None, :9]), None),
            "values",
        ),
        (lambda layer, x: torch.export.export(layer, (x,)), "exported"),
    ],
)
def test_what_kernels_refuse(call: object, reason: str) -> None:
    layer = ATTENTION["ela_hadamard"](32, 2, projections=False).to(DEVICE)
    x = torch.randn(2, 20, 96, device=DEVICE)
    with switch.kernels("fused"), pytest.raises(Exception, match=reason):
        call(layer, x)  # type: ignore[operator]
    with switch.kernels("auto"):
        call(layer, x)  # type: ignore[operator]


def test_plans_depend_on_shapes_and_fit_all_of_them() -> None:
    for plan in (plan_forward, plan_backward):
        for tokens in (1, 196, 1000, 4096, 65536):
            for heads in (1, 6, 384):
                for half in (False, True):
                    sizes = plan(tokens, heads, 64, half)
                    assert sizes.chunks == 1 or sizes.chunks <= tokens // sizes.block  # no chunk is empty
                    assert plan(tokens, heads, 64, half) == sizes
    for projected in (plan_projected, plan_projected_backward):
        for tokens in (1, 64, 196, 1000, 4096, 65536):
            for heads in (1, 6, 384):
                for features, plain in ((16, True), (64, False), (256, True), (256, False)):
                    sizes = projected(tokens, heads, features, 64, plain)
                    assert max(sizes.chunks, sizes.readers) <= -(-tokens // max(sizes.block, sizes.query_block))
                    assert features % sizes.unit == sizes.unit % sizes.tile == 0
