"""Rotary positions and centred keys, in every mechanism, against their definitions."""

from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor

from visionattn.attention import ATTENTION, Attention, attention_layer
from visionattn.errors import UnsupportedError

DIM, HEADS, PREFIX, GRID = 24, 3, 2, (3, 4)
TOKENS = PREFIX + GRID[0] * GRID[1]
TURNED = [name for name in ATTENTION if name != "gka"]


def make(name: str, **options: Any) -> Attention:
    torch.manual_seed(0)
    return attention_layer(name, **options)(DIM, HEADS, qkv_bias=True).double().eval()


def tokens() -> Tensor:
    return torch.randn(2, TOKENS, DIM, dtype=torch.float64)


def angles() -> Tensor:
    """One angle for each patch and pair of channels."""
    return torch.randn(GRID[0] * GRID[1], DIM // HEADS // 2, dtype=torch.float64)


def table(theta: Tensor, half: bool) -> Tensor:
    """Sines and cosines of all channels as timm lays them out."""
    each = torch.cat((theta, theta), -1) if half else theta.repeat_interleave(2, -1)
    return torch.cat((each.sin(), each.cos()), -1)


def turn(x: Tensor, theta: Tensor, half: bool) -> Tensor:
    """Multiply pairs of channels, as complex numbers, by exp(i theta), token by token."""
    D = x.shape[-1]
    first, second = (list(range(D // 2)), list(range(D // 2, D))) if half else (range(0, D, 2), range(1, D, 2))
    out = x.clone()
    for pair, (a, b) in enumerate(zip(first, second, strict=True)):
        number = torch.complex(x[:, :, PREFIX:, a], x[:, :, PREFIX:, b]) * torch.polar(
            torch.ones_like(theta[:, pair]), theta[:, pair]
        )
        out[:, :, PREFIX:, a], out[:, :, PREFIX:, b] = number.real, number.imag
    return out


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", TURNED)
def test_contract_rope_turns_queries_and_keys_before_the_kernel(name: str, half: bool) -> None:
    attention, x, theta = make(name, rotate_half=half), tokens(), angles()
    q, k, v = attention.project(x)
    mixed = attention.reference(turn(q, theta, half), turn(k, theta, half), v)
    out = attention(x, rope=table(theta, half))
    torch.testing.assert_close(out, attention.finish(mixed), rtol=1e-9, atol=1e-9)
    if name != "uniform":
        assert not torch.allclose(out, attention(x))


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "norm_layer": torch.nn.LayerNorm}], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("half", [False, True])
def test_softmax_with_rope_equals_timm(half: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    stock = timm.layers.AttentionRope(DIM, HEADS, num_prefix_tokens=PREFIX, rotate_half=half, **options).eval().double()
    ours = attention_layer("softmax", rotate_half=half)(DIM, HEADS, qkv_bias=True, **options).eval().double()
    ours.load_state_dict(stock.state_dict())
    x, rope = tokens(), table(angles(), half)
    torch.testing.assert_close(ours(x, rope=rope), stock(x, rope=rope), rtol=1e-12, atol=1e-12)


def test_rope_of_another_size_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="rope: got"):
        make("relu")(tokens(), rope=table(angles(), False)[:, :-2])
    with pytest.raises(UnsupportedError, match="rope: got"):
        make("relu")(tokens()[:, :5], rope=table(angles(), False))
    with pytest.raises(UnsupportedError, match="gka"):
        make("gka")(tokens(), rope=table(angles(), False))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", list(ATTENTION))
def test_contract_centred_keys(name: str, masked: bool) -> None:
    """Kernels read keys less the mean of those that take part; features of exp(q.k), less that of queries, too."""
    attention, x = make(name, center_keys=True), tokens()
    keep = torch.arange(TOKENS) < (9 if masked else TOKENS)
    mask = keep.expand(2, 1, 1, TOKENS) if masked else None
    q, k, v = attention.project(x)
    shift = k[:, :, keep].mean(-2, keepdim=True)
    if name in ("performer", "dark"):
        shift = shift + q[:, :, keep].mean(-2, keepdim=True)
    moved = k if name == "gka" else k - shift
    mixed = attention.reference(q, moved, v, mask)
    torch.testing.assert_close(attention(x, attn_mask=mask), attention.finish(mixed), rtol=1e-9, atol=1e-9)


def test_centring_is_exact_for_softmax_and_gka() -> None:
    for name in ("softmax", "gka"):
        plain, centred, x = make(name), make(name, center_keys=True), tokens()
        mask = torch.rand(TOKENS, TOKENS) > 0.3 if name == "softmax" else None
        for options in ({}, {"attn_mask": mask}):
            torch.testing.assert_close(centred(x, **options), plain(x, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["performer", "dark"])
def test_centring_is_exact_for_what_random_features_estimate(name: str) -> None:
    attention, x = make(name, center_keys=True), tokens()
    if name == "dark":
        attention.shift.data += 0.2 * torch.randn_like(attention.shift)
    q, k, v = attention.project(x)
    centred = attention.place(q, k, None, None, False)
    torch.testing.assert_close(attention.target(*centred, v), attention.target(q, k, v), rtol=1e-12, atol=1e-12)


def test_centring_makes_estimates_better() -> None:
    """Keys with a large common vector, as pretrained networks have them."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, HEADS, 200, DIM // HEADS, dtype=torch.float64) * 0.7 for _ in range(3))
    k = k + 3.0
    errors = {}
    for center in (False, True):
        attention = make("performer", center_keys=center, features=64)
        placed = attention.place(q, k, None, None, False)
        truth = attention.target(q, k, v)
        errors[center] = ((attention.attend(*placed, v, None, False) - truth).norm() / truth.norm()).item()
    assert errors[True] < 0.5 * errors[False]


def test_centring_sees_tokens_to_come() -> None:
    for name in ("performer", "relu", "softmax"):
        with pytest.raises(UnsupportedError, match="center_keys"):
            make(name, center_keys=True)(tokens(), is_causal=True)
        with pytest.raises(UnsupportedError, match="center_keys"):
            make(name, center_keys=True).step(tokens()[:, :1])


@pytest.mark.parametrize("name", TURNED)
def test_contract_placing_survives_export_and_script(name: str) -> None:
    attention, x, rope = make(name, center_keys=True), tokens(), table(angles(), False)
    expected = attention(x, rope=rope)
    program = torch.export.export(attention, (x,), {"rope": rope})
    torch.testing.assert_close(program.module()(x, rope=rope), expected)
    torch.testing.assert_close(torch.jit.script(attention)(x, rope=rope), expected)


def test_weights_of_draws_are_in_the_kernel() -> None:
    attention = make("performer", calibrated=True, features=16)
    attention.log_weights.normal_()
    q, k = (torch.randn(1, HEADS, 5, DIM // HEADS, dtype=torch.float64) for _ in range(2))
    found = attention.log_kernel(q, k).exp()
    scale = (DIM // HEADS) ** -0.25
    for i in range(5):
        for j in range(5):
            x, y = q[0, :, i] * scale, k[0, :, j] * scale
            logs = torch.einsum("hfd,hd->hf", attention.draws, x + y) - (x.square() + y.square()).sum(-1)[:, None] / 2
            torch.testing.assert_close(found[0, :, i, j], (logs + attention.log_weights[:, 0]).exp().sum(-1))
