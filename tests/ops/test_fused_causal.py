"""The fused kernels of causal attention by positive features: by Triton's interpreter where there is no GPU."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from visionattn.attention import attention_layer
from visionattn.errors import UnsupportedError
from visionattn.ops import positive, scan, switch
from visionattn.ops.fused import FeatureMap, causal_library
from visionattn.ops.fused.causal_library import attend_causal as attend_by_features

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SINGLE = (torch.float32,) * 3
MIXED = (torch.float32, torch.float32, torch.float16)
HALF = (torch.float16,) * 3  # not bfloat16, which Triton's interpreter cuts off where a GPU rounds

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]


def cut(monkeypatch: pytest.MonkeyPatch, chunks: int, block: int = 16) -> None:
    """Cut heads into chunks, and these into blocks, however few tokens they have."""
    plan = causal_library.plan
    monkeypatch.setattr(causal_library, "plan", lambda *sizes: plan(*sizes)._replace(chunks=chunks, block=block))


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Forget launches that were prepared by another plan."""
    yield
    causal_library._prepared_forward.cache_clear()
    causal_library._prepared_backward.cache_clear()


def attend_causal(a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """Attend by logarithms of features."""
    return attend_by_features(a, b, v, FeatureMap("exp"))


def made(N: int, F: int, E: int, dtypes: Dtypes = SINGLE, heads: int = 1, scale: float = 1) -> list[Tensor]:
    """Return logarithms of queries and keys, values, and a gradient of the output."""
    generator = torch.Generator().manual_seed(N + F + E)
    a, b, v, do = (torch.randn(1, heads, N, width, generator=generator) for width in (F, F, E, E))
    given = zip((scale * a, scale * b, v, do), (*dtypes, dtypes[-1]), strict=True)
    return [x.to(DEVICE, dtype) for x, dtype in given]


def ramp(N: int, low: float, high: float) -> Tensor:
    return torch.linspace(low, high, N, device=DEVICE).unsqueeze(-1)


def explicitly(a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """Attend by the matrix of all pairs."""
    allowed = torch.ones(a.shape[-2], a.shape[-2], dtype=torch.bool, device=a.device).tril()
    return positive.within(a, b, v, allowed).mixed


def eagerly(a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    return scan.causal(positive, a, b, v)


def gradients(attend: Attend, inputs: list[Tensor], do: Tensor) -> list[Tensor]:
    """Return the output and the gradients of all inputs."""
    x = [y.detach().requires_grad_() for y in inputs]
    o = attend(*x)
    return [o.detach(), *torch.autograd.grad(o, x, do)]


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm().clamp(min=1e-3))


def floor(v: Tensor) -> float:
    """Return an error that is none: products keep 16 bits where values are in half precision, all of float32 else."""
    return 2e-7 if v.dtype == torch.float32 else 0.1 * torch.finfo(v.dtype).eps


def assert_accurate(inputs: list[Tensor], do: Tensor) -> None:
    """Assert that errors are those of the eager formula, or of a rounding."""
    truths = gradients(explicitly, [x.double() for x in inputs], do.double())
    fused, eager = (gradients(attend, inputs, do) for attend in (attend_causal, eagerly))
    for got, other, truth in zip(fused, eager, truths, strict=True):
        assert got.shape == other.shape
        assert got.dtype == other.dtype
        assert error(got, truth) <= 1.5 * error(other, truth) + floor(do)


@pytest.mark.parametrize(("N", "F", "E"), [(1, 16, 16), (15, 24, 20), (16, 16, 16), (17, 16, 40), (70, 40, 16)])
def test_accuracy(N: int, F: int, E: int) -> None:
    *inputs, do = made(N, F, E)
    assert_accurate(inputs, do)


@pytest.mark.parametrize(("dtypes", "F"), [(SINGLE, 24), (MIXED, 16), (HALF, 16), (HALF, 24)])
def test_accuracy_in_chunks(dtypes: Dtypes, F: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 3)
    *inputs, do = made(70, F, 16, dtypes)
    assert_accurate(inputs, do)


@pytest.mark.parametrize("dtypes", [SINGLE, HALF])
def test_many_features_and_wide_values_are_taken_in_tiles(dtypes: Dtypes, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 2)
    *inputs, do = made(18, 80, 100, dtypes)
    plan = causal_library.plan(18, 1, 128, 128, dtypes == HALF)
    assert plan.feature_tile < 128
    assert plan.value_tile < 128
    assert_accurate(inputs, do)


@pytest.mark.parametrize("kind", ["elu", "relu"])
def test_a_map_taken_on_chip_is_that_of_the_eager_formula(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 3)
    *inputs, do = made(60, 20, 16, scale=4)
    features = FeatureMap(kind)

    def by_formula(attend: Attend) -> Attend:
        return lambda q, k, v: attend(features.logs(q), features.logs(k), v)

    truths = gradients(by_formula(explicitly), [x.double() for x in inputs], do.double())
    eager = gradients(by_formula(eagerly), inputs, do)
    fused = gradients(lambda q, k, v: attend_by_features(q, k, v, features), inputs, do)
    for got, other, truth in zip(fused, eager, truths, strict=True):
        assert error(got, truth) <= 1.5 * error(other, truth) + 2e-7


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_values_may_have_much_in_common(offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 3)
    a, b, v, do = made(150, 16, 16)
    assert_accurate([a, b, v + offset], do)


@pytest.mark.parametrize("dtypes", [SINGLE, MIXED, HALF])
@pytest.mark.parametrize("size", [6, 60])
def test_one_key_may_outweigh_all_others(size: int, dtypes: Dtypes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are then its value, which is far from all others, and gradients are what is left of it."""
    cut(monkeypatch, 3)
    a, b, v, do = made(150, 16, 16, dtypes, heads=2)
    a[..., 50, :], b[..., 70, :], v[..., 70, :] = size, size * b[..., 70, :].sign(), 500
    assert_accurate([a, b, v], do)


@pytest.mark.parametrize("dtypes", [SINGLE, HALF])
@pytest.mark.parametrize("slope", [-60, 0, 60])
def test_logarithms_may_be_large(slope: int, dtypes: Dtypes, monkeypatch: pytest.MonkeyPatch) -> None:
    """They range over 120 nats and more, at random or along the tokens, queries against keys or with them."""
    cut(monkeypatch, 3)
    a, b, v, do = made(60, 16, 16, dtypes, heads=2, scale=1 if slope else 60)
    with_and_against = torch.tensor([1, -1], device=DEVICE).reshape(2, 1, 1)
    a, b = a + with_and_against * ramp(60, -slope, slope), b + ramp(60, -slope, slope)
    assert_accurate([a.to(dtypes[0]), b.to(dtypes[1]), v], do)


def test_logarithms_may_range_over_120_nats_within_a_block() -> None:
    """And all tokens still count: each by one feature."""
    a, b, v, do = made(16, 16, 16)
    token = torch.arange(16, device=DEVICE)
    assert_accurate([a, b - 10 * (token - token.unsqueeze(-1)).abs(), v], do)


def test_some_logarithms_may_be_those_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 2)
    a, b, v, do = made(34, 16, 16)
    a[..., ::3], b[..., :20, 4:] = -torch.inf, -torch.inf
    fused = gradients(attend_causal, [a, b, v], do)
    for got, other in zip(fused, gradients(eagerly, [a.clamp(-1e30), b.clamp(-1e30), v], do), strict=True):
        torch.testing.assert_close(got, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["exp", "elu", "relu"])
def test_a_key_mask_is_that_of_the_eager_formula(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens before the first that is kept get zeros."""
    cut(monkeypatch, 2)
    *inputs, do = made(40, 16, 16)
    keep = (torch.arange(40, device=DEVICE) % 5 > 1).reshape(1, 1, 40, 1)
    keep[..., :18, :] = False
    features = FeatureMap(kind)

    def eagerly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scan.causal(positive, features.logs(q), features.logs(k), v, keep)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_by_features(q, k, v, features, keep)

    for got, other in zip(gradients(masked, inputs, do), gradients(eagerly, inputs, do), strict=True):
        torch.testing.assert_close(got, other, rtol=1e-5, atol=1e-5)
    assert not masked(*inputs)[..., :18, :].any()


@pytest.mark.parametrize(
    ("name", "options"),
    [("ela_hadamard", {}), ("relu", {}), ("cosformer", {}), ("dark", {"features": 20}),
     ("performer", {"features": 20, "feature_map": "relu"}), ("slay", {"features": 4, "anchors": 4})],
)  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
def test_mechanisms_are_those_of_the_eager_formula(name: str, options: dict[str, object], masked: bool) -> None:
    torch.manual_seed(0)
    layer = attention_layer(name, **options)(32, 2, projections=False).to(DEVICE)
    x = torch.randn(2, 20, 96, device=DEVICE)
    mask = torch.rand(2, 1, 1, 20, device=DEVICE) > 0.3 if masked else None

    def attend(path: switch.Path) -> tuple[Tensor, ...]:
        inputs = [x.clone().requires_grad_(), *layer.parameters()]
        with switch.kernels(path):
            o = layer(inputs[0], attn_mask=mask, is_causal=True)
            return o.detach(), *torch.autograd.grad(o.square().sum(), inputs)

    for got, other in zip(attend("fused"), attend("eager"), strict=True):
        torch.testing.assert_close(got, other, rtol=1e-4, atol=2e-5)


def test_too_many_features_are_refused() -> None:
    layer = attention_layer("performer", features=257)(32, 2, projections=False).to(DEVICE)
    with switch.kernels("fused"), pytest.raises(UnsupportedError, match="257 features"):
        layer(torch.randn(1, 4, 96, device=DEVICE), is_causal=True)


def test_a_constant_comes_back_and_the_first_token_gets_its_own_value() -> None:
    a, b, v, _ = made(34, 16, 16, scale=30)
    constant = torch.full_like(v, 3)
    torch.testing.assert_close(attend_causal(a, b, constant), constant, rtol=1e-6, atol=0)
    torch.testing.assert_close(attend_causal(a, b, v)[..., 0, :], v[..., 0, :], rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("first", [5, 33])
def test_later_tokens_change_nothing_but_roundings_in_their_block(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 2)
    a, b, v, _ = made(50, 16, 16)
    before = attend_causal(a, b, v)[..., :first, :]
    for x, new in zip((a, b, v), made(50, 16, 16, scale=90)[:3], strict=True):
        x[..., first:, :] = new[..., first:, :] + 30
    after = attend_causal(a, b, v)[..., :first, :]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)  # a rounding of what is 30 larger
    whole = first // 16 * 16
    assert torch.equal(after[..., :whole, :], before[..., :whole, :])


def test_results_are_the_same_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 2)
    *inputs, do = made(34, 16, 16)
    for x, y in zip(gradients(attend_causal, inputs, do), gradients(attend_causal, inputs, do), strict=True):
        assert torch.equal(x, y)


def test_the_number_of_chunks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    *inputs, do = made(66, 16, 16, scale=3)
    whole = gradients(attend_causal, inputs, do)
    cut(monkeypatch, 5)
    for x, y in zip(gradients(attend_causal, inputs, do), whole, strict=True):
        assert error(x, y.double()) < 1e-6


def test_any_strides_will_do() -> None:
    *inputs, _ = made(18, 16, 16, heads=2)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:2]]
    turned.append(inputs[2].transpose(2, 3).contiguous().transpose(2, 3))
    do = torch.ones((), device=DEVICE).expand_as(inputs[2])
    for x, y in zip(gradients(attend_causal, turned, do), gradients(attend_causal, inputs, do.clone()), strict=True):
        assert torch.equal(x, y)


def test_double_backward() -> None:
    *inputs, do = made(18, 16, 16)

    def penalty(attend: Attend, inputs: list[Tensor], do: Tensor) -> tuple[Tensor, ...]:
        x = [y.detach().requires_grad_() for y in inputs]
        first = torch.autograd.grad(attend(*x), x, do, create_graph=True)
        return torch.autograd.grad(sum((g.square().sum() for g in first), torch.zeros((), device=DEVICE)), x)

    truths = penalty(explicitly, [x.double() for x in inputs], do.double())
    for got, truth in zip(penalty(attend_causal, inputs, do), truths, strict=True):
        assert error(got, truth) < 1e-5


def test_only_what_is_wanted_gets_a_gradient() -> None:
    a, b, v, _ = made(5, 16, 16)
    b.requires_grad_()
    attend_causal(a, b, v).sum().backward()
    assert b.grad is not None
    assert a.grad is None
    assert not attend_causal(a, b.detach(), v).requires_grad


@pytest.mark.parametrize("dtypes", [SINGLE, MIXED])
def test_the_operator_is_described_right(dtypes: Dtypes) -> None:
    *inputs, _ = made(3, 16, 16, dtypes)
    for save in (False, True):
        torch.library.opcheck(
            causal_library._forward,
            (*(x.requires_grad_(save) for x in inputs), "exp", save),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
