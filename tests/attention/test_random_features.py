"""Random features estimate what they say, without bias, and are the same wherever they are drawn."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from visionattn.attention import attention_layer
from visionattn.errors import ConfigError
from visionattn.ops import dark, performer, slay, softmax, yat
from visionattn.ops.draws import gaussian

D = 8
ignore_signed = pytest.mark.filterwarnings("ignore:slay. poly=:UserWarning")


def cosines(q: Tensor, k: Tensor) -> Tensor:
    return yat.unit(q) @ yat.unit(k).transpose(-2, -1)


def anchored(q: Tensor, k: Tensor) -> Tensor:
    x = cosines(q, k)
    return slay.quadrature_kernel(x, 2, 0.5) / x.square() * (1 + 2 * x.square()) / (D * (D + 2))


def quadrature(q: Tensor, k: Tensor) -> Tensor:
    return slay.quadrature_kernel(cosines(q, k), 2, 0.5)


def exact(q: Tensor, k: Tensor) -> Tensor:
    return softmax.log_kernel(q, k).exp()


EXPECTED: dict[str, tuple[str, dict[str, object], Callable[[Tensor, Tensor], Tensor]]] = {
    "performer orthogonal": ("performer", {"features": 8}, exact),
    "performer iid": ("performer", {"features": 8, "draws": "iid"}, exact),
    "dark": ("dark", {"features": 8}, exact),
    "slay anchor": ("slay", {"poly": "anchor", "features": 8, "epsilon": 0.5}, anchored),
    "slay exact": ("slay", {"poly": "exact", "features": 8, "epsilon": 0.5}, quadrature),
    "slay maclaurin": ("slay", {"poly": "maclaurin", "features": 8, "epsilon": 0.5}, quadrature),
    "slay tensorsketch": ("slay", {"poly": "tensorsketch", "features": 8, "epsilon": 0.5}, quadrature),
}


@ignore_signed
@pytest.mark.parametrize("case", EXPECTED)
def test_contract_random_features_are_unbiased(case: str) -> None:
    name, options, expected = EXPECTED[case]
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 4, D, dtype=torch.float64) * 0.35 for _ in range(2))
    estimates = []
    for seed in range(600, 1200):
        attention = attention_layer(name, seed=2 * seed, nodes=2, **options) if name == "slay" else None
        attention = (attention or attention_layer(name, seed=seed, **options))(D, 1).double()
        log_or_value = attention.kernel if name == "slay" else lambda q, k, a=attention: a.log_kernel(q, k).exp() / 8
        estimates.append(log_or_value(q, k).detach())
    found = torch.stack(estimates)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - expected(q, k)).abs() < 4 * error).all()
    assert (error < 0.2 * expected(q, k).abs()).any()  # the bound is not so wide that anything passes


def test_dark_estimates_its_own_kernel() -> None:
    torch.manual_seed(1)
    q, k = (torch.randn(1, 1, 4, D, dtype=torch.float64) * 0.35 for _ in range(2))
    shift = 0.15 * torch.randn(1, D, D, dtype=torch.float64)
    estimates = []
    for seed in range(600):
        attention = attention_layer("dark", seed=seed, features=8)(D, 1).double()
        attention.shift.data.copy_(shift)
        estimates.append(attention.log_kernel(q, k).detach().exp() / 8)
    found = torch.stack(estimates)
    m = torch.eye(D, dtype=torch.float64) + shift
    expected = torch.exp(torch.einsum("bhid,hed,hef,bhjf->bhij", q, m, m, k) / math.sqrt(D))
    assert ((found.mean(0) - expected).abs() < 4 * found.std(0) / math.sqrt(len(found))).all()
    torch.testing.assert_close(attention.log_target(q, k).exp(), expected)


def test_dark_starts_as_performer() -> None:
    x = torch.randn(2, 9, 24)
    ours = attention_layer("dark")(24, 3)
    other = attention_layer("performer")(24, 3)
    other.load_state_dict({key: value for key, value in ours.state_dict().items() if key != "shift"})
    torch.testing.assert_close(ours(x), other(x))


def test_whitening_makes_queries_and_keys_isotropic() -> None:
    torch.manual_seed(0)
    scales = torch.logspace(-1, 1, D, dtype=torch.float64)
    x = torch.randn(4, 2, 500, D, dtype=torch.float64) * scales
    m = dark.whitening(x, loading=0.0)
    y = (x @ m.transpose(-2, -1)).transpose(0, 1).flatten(1, 2)
    moment = y.transpose(-2, -1) @ y / y.shape[1]
    size = x.square().sum(-1).mean((0, 2)) / D
    torch.testing.assert_close(moment, size[:, None, None] * torch.eye(D, dtype=torch.float64))


def test_whiten_sets_every_layer_from_what_reaches_it() -> None:
    from visionattn.attention import whiten

    torch.manual_seed(0)
    model = torch.nn.Sequential(attention_layer("dark")(24, 3), attention_layer("dark")(24, 3)).double()
    x = torch.randn(8, 50, 24, dtype=torch.float64) * torch.linspace(0.1, 3, 24, dtype=torch.float64)
    with torch.no_grad(), whiten(model, loading=0.0):
        model(x)
    with torch.no_grad():
        for layer, tokens in ((model[0], x), (model[1], model[0](x))):
            q, k, _ = layer.project(tokens)
            warped = layer.warp(torch.cat((q, k), -2)).transpose(0, 1).flatten(1, 2)
            moment = warped.transpose(-2, -1) @ warped / warped.shape[1]
            size = performer.scaled(torch.cat((q, k), -2)).square().mean((0, 2, 3))
            torch.testing.assert_close(moment, size[:, None, None] * torch.eye(8, dtype=torch.float64))
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize("how", ["orthogonal", "iid"])
def test_draws_have_the_normal_law(how: str) -> None:
    drawn = gaussian(2000, 5, 4, 0, how).double()
    flat = drawn.flatten(0, 1)
    torch.testing.assert_close(flat.T @ flat / len(flat), torch.eye(4, dtype=torch.float64), rtol=0, atol=0.06)
    lengths = flat.square().sum(-1)  # chi square of 4 degrees: mean 4, variance 8
    assert abs(lengths.mean() - 4) < 0.15
    assert abs(lengths.var() - 8) < 1
    within = torch.einsum("hid,hjd->hij", drawn[:, :4], drawn[:, :4])
    off = within.masked_fill(torch.eye(4, dtype=torch.bool), 0).abs().amax()
    assert (off < 0.15) == (how == "orthogonal")  # up to rounding to bfloat16


def test_draws_survive_half_precision_and_follow_the_seed() -> None:
    for name in ("performer", "dark", "slay"):
        attention = attention_layer(name, seed=3)(24, 3)
        before = {key: value.clone() for key, value in attention.named_buffers()}
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            attention.to(dtype)
        for key, values in attention.named_buffers():
            torch.testing.assert_close(values, before[key], rtol=0, atol=1e-7)  # float16's smallest numbers
        assert not torch.equal(attention.draws, attention_layer(name, seed=4)(24, 3).draws)


def test_bad_options_are_named() -> None:
    for name, options, message in (
        ("performer", {"features": 0}, "features=0"),
        ("performer", {"draws": "sobol"}, "sobol.*orthogonal"),
        ("performer", {"feature_map": "gelu"}, "gelu.*exp, relu"),
        ("slay", {"poly": "cubic"}, "cubic.*anchor"),
        ("slay", {"epsilon": 0.0}, "epsilon=0"),
        ("slay", {"nodes": 0}, "nodes=0"),
        ("dark", {"features": -1}, "features=-1"),
        ("yat", {"epsilon": -1.0}, "epsilon"),
        ("gka", {"window": -1}, "window=-1"),
        ("cosformer", {"axes": 3}, "axes=3"),
    ):
        with pytest.raises(ConfigError, match=message):
            attention_layer(name, **options)(24, 3)


@pytest.mark.parametrize("poly", ["nystrom", "maclaurin", "tensorsketch"])
def test_signed_polynomials_warn(poly: str) -> None:
    with pytest.warns(UserWarning, match="signed features"):
        attention_layer("slay", poly=poly)(24, 3)


def test_slay_polynomial_maps() -> None:
    torch.manual_seed(0)
    u, w = yat.unit(torch.randn(6, D, dtype=torch.float64)), yat.unit(torch.randn(5, D, dtype=torch.float64))
    square = (u @ w.T).square()
    torch.testing.assert_close(slay.exact_features(u) @ slay.exact_features(w).T, square)
    # With as many anchors as the space of squares has dimensions, Nystrom is exact up to its ridge.
    bank = slay.anchors(200, D, 0)
    close = slay.nystrom_features(u, bank, ridge=1e-9) @ slay.nystrom_features(w, bank, ridge=1e-9).T
    torch.testing.assert_close(close, square, rtol=0, atol=1e-3)


def test_slay_reports_its_feature_size() -> None:
    for options, size in (
        ({"poly": "anchor", "nodes": 3, "features": 5, "anchors": 7}, 105),
        ({"poly": "exact", "nodes": 2, "features": 4}, 2 * 4 * 36),
    ):
        assert attention_layer("slay", **options)(2 * D, 2).feature_size() == size
    assert attention_layer("slay_paper")(128, 2).feature_size() == 256
