"""Calibrated features: the same expectation, a smaller spread, and projections that mean the same to softmax."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import visionattn
from tests.conversion.test_convert import build, images
from visionattn.attention import attention_layer
from visionattn.conversion.calibrate import Moments, fit
from visionattn.ops import calibration
from visionattn.ops.draws import gaussian

D, HEADS = 8, 2


def covariance(scales: Tensor, seed: int) -> Tensor:
    turned, _ = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return turned * scales @ turned.T


def test_geometric_mean_and_balance() -> None:
    a, b = (covariance(torch.logspace(-2, 1, D, dtype=torch.float64), seed) for seed in (0, 1))
    mean = calibration.geometric_mean(a, b)
    torch.testing.assert_close(mean @ torch.linalg.inv(a) @ mean, b)  # the equation that defines it
    t = calibration.balance(a[None], b[None], loading=0.0)[0]
    back = torch.linalg.inv(t)
    torch.testing.assert_close(t @ a @ t.T, back @ b @ back.T)
    least = (t @ a @ t.T).trace() * 2
    for seed in range(20):
        other = torch.matrix_exp(
            0.2 * torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        )
        turn = t @ other
        inverse = torch.linalg.inv(turn)
        assert (turn.T @ a @ turn).trace() + (inverse @ b @ inverse.T).trace() > least - 1e-9


def test_dense_exponential_is_unbiased_and_its_spread_is_as_derived() -> None:
    """In each direction, (1 - 4 A) (1 - 8 A)^(-1/2) exp(2 (1 - 4 A) z^2 / (1 - 8 A)) is the second moment."""
    torch.manual_seed(0)
    lengths = torch.linspace(0.05, 1.5, D, dtype=torch.float64)
    draws = gaussian(1, 400_000, D, 0, "iid").double()
    chosen, weights = calibration.dense_exponential(draws, lengths.diag()[None])
    z = 0.5 * lengths.sqrt()
    values = (weights[0, 0] + chosen[0] @ z - z.square().sum() / 2).exp()
    assert abs(values.mean() - 1) < 4 * values.std() / math.sqrt(len(values))
    a = (1 - 2 * lengths - ((2 * lengths + 1).square() + 8 * lengths).sqrt()) / 16
    second = ((1 - 4 * a) / (1 - 8 * a).sqrt() * (2 * (1 - 4 * a) * z.square() / (1 - 8 * a)).exp()).prod()
    second = second * (-z.square().sum()).exp()
    assert values.square().mean().item() == pytest.approx(second.item(), rel=0.05)

    def spread(a: Tensor) -> Tensor:  # expected logarithm, of z of these lengths
        return ((1 - 4 * a).log() - (1 - 8 * a).log() / 2 + 2 * lengths * (1 - 4 * a) / (1 - 8 * a)).sum()

    for change in (-0.01, 0.01):
        assert spread(a + change) > spread(a)
    assert spread(a) < spread(torch.zeros_like(a))


def tokens_with_structure() -> tuple[Any, Tensor]:
    """An attention whose queries and keys have means and very different spreads a channel, and its tokens."""
    torch.manual_seed(3)
    attention = attention_layer("performer", calibrated=True, features=8)(D * HEADS, HEADS, qkv_bias=True).double()
    scales = torch.logspace(-0.7, 0.3, D, dtype=torch.float64).repeat(HEADS)
    projection = attention.qkv
    projection.weight.data[: D * HEADS] *= 1.2 * scales[:, None]
    projection.weight.data[D * HEADS : 2 * D * HEADS] *= 1.2 * scales.flip(0)[:, None]
    projection.bias.data.normal_(std=0.5)
    return attention, torch.randn(4, 50, D * HEADS, dtype=torch.float64)


def calibrated(seed: int, foldable: bool = True) -> tuple[Any, Any, Tensor]:
    plain, x = tokens_with_structure()
    fitted, _ = tokens_with_structure()
    fitted.seed = plain.seed = seed
    plain.reset_parameters()
    moments = Moments(per_image=False)
    moments.add(*fitted.project(x)[:2])
    fit(fitted, moments, foldable)
    return plain, fitted, x


@torch.no_grad()
def test_calibration_does_not_change_what_is_estimated() -> None:
    plain, fitted, x = calibrated(0)
    expected = plain.target(*plain.project(x))
    torch.testing.assert_close(fitted.target(*fitted.project(x)), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(plain.qkv.weight, fitted.qkv.weight)


@pytest.mark.parametrize("foldable", [True, False])
@torch.no_grad()
def test_calibrated_features_are_unbiased_and_spread_less(foldable: bool) -> None:
    found: dict[str, list[Tensor]] = {"plain": [], "fitted": []}
    for seed in range(400):
        for name, attention in zip(found, calibrated(seed, foldable)[:2], strict=True):
            q, k, _ = attention.project(calibrated_tokens)
            found[name].append(attention.log_kernel(q, k).exp() / 8)
            exact = attention.log_target(q, k).exp()
        estimates = torch.stack(found["fitted"])
    error = estimates.std(0) / math.sqrt(len(estimates))
    outside = ((estimates.mean(0) - exact).abs() > 4 * error).double().mean()
    assert outside < 0.01  # estimates of long vectors are skewed
    spreads = {name: (torch.stack(x) / torch.stack(x).mean(0)).std(0).median() for name, x in found.items()}
    assert spreads["fitted"] < 0.8 * spreads["plain"]


calibrated_tokens = tokens_with_structure()[1][:1, :6]


@torch.no_grad()
def test_a_calibrated_model_is_nearer_to_its_teacher() -> None:
    model = build("plain")
    projection = model.blocks[0].attn.qkv
    projection.weight.data[: 2 * model.embed_dim] *= 0.5
    projection.bias.data[model.embed_dim : 2 * model.embed_dim] += 0.7  # a key that all have in common
    x, other = images(model, 68).split([64, 4])

    def first(network: Any) -> Tensor:
        return network.forward_intermediates(other, indices=[0], intermediates_only=True)[0]

    def error(**options: Any) -> float:
        difference = first(visionattn.convert(model, "performer", **options)) - first(model)
        return difference.norm().item()

    plain = error(center_keys=False)
    for options in ({"center_keys": True}, {"center_keys": "constant"}, {"center_keys": False}):
        assert error(calibrate=x, **options) < 0.9 * plain
    assert error(calibrate=[(x, None)]) == pytest.approx(error(calibrate=x), rel=1e-4)


@pytest.mark.parametrize("name", ["performer", "dark"])
@torch.no_grad()
def test_calibration_of_models_with_rope_and_without_biases(name: str) -> None:
    for kind in ("rope", "qk_norm"):
        model = build(kind)
        x = images(model, 4)
        student = visionattn.convert(model, name, calibrate=x)
        assert torch.equal(student.blocks[0].attn.qkv.weight, visionattn.convert(model, name).blocks[0].attn.qkv.weight)
        assert student.blocks[0].attn.log_weights.any()
        assert student(x).isfinite().all()
