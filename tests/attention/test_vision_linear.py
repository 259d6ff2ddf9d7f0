"""What is particular to the linear attentions of vision transformers: their sources' formulas, and what cancels."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.attention import ATTENTION, Attention, attention_layer
from visionattn.errors import ConfigError, UnsupportedError

DIM, HEADS = 24, 3


def make(name: str, **options: object) -> Attention:
    torch.manual_seed(0)
    attention = attention_layer(name, **options)(DIM, HEADS).double()
    for key, parameter in attention.named_parameters():
        if "." not in key:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return attention


def qkv(tokens: int = 21) -> list[Tensor]:
    return [torch.randn(2, HEADS, tokens, DIM // HEADS, dtype=torch.float64) for _ in range(3)]


def joined(x: Tensor) -> Tensor:
    """All heads of a token side by side, (B, N, C), as sources have them before heads are split."""
    return x.transpose(1, 2).flatten(2)


def apart(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def test_focused_is_the_formula_of_its_source() -> None:
    attention, (q, k, v) = make("focused", power=2.5), qkv()
    features = []
    for x in (q, k):
        a = (F.relu(joined(x)) + 1e-6) / F.softplus(attention.scale.flatten())
        sharp = a**2.5
        features.append(apart(sharp / sharp.norm(dim=-1, keepdim=True) * a.norm(dim=-1, keepdim=True)))
    weights = features[0] @ features[1].transpose(-2, -1)
    truth = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(attention.attend(q, k, v, None, False), truth, rtol=1e-10, atol=1e-10)


def test_focused_refuses_powers_that_blunt() -> None:
    with pytest.raises(ConfigError, match=r"power=0\.5; give at least 1"):
        attention_layer("focused", power=0.5)(DIM, HEADS)


@pytest.mark.parametrize("name", ["focused", "polaformer"])
def test_the_length_of_a_query_cancels_and_that_of_a_key_does_not(name: str) -> None:
    attention, (q, k, v) = make(name), qkv()
    if name == "polaformer":
        attention.power.data.fill_(0.4)  # channels of one power
    lengths = torch.rand(2, 1, 21, 1, dtype=torch.float64) + 0.5
    out = attention.attend(q, k, v, None, False)
    # Not to the last digit: the small constant of the ReLU stays as it is.
    torch.testing.assert_close(attention.attend(q * lengths, k, v, None, False), out, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(attention.attend(q, k * lengths, v, None, False), out, rtol=1e-2, atol=1e-2)


def test_polaformer_reads_values_by_two_kernels_that_the_sign_of_a_query_swaps() -> None:
    attention, (q, k, v) = make("polaformer"), qkv()
    twice = torch.cat((v[..., :4], v[..., :4]), -1)
    same, opposite = attention.attend(q, k, twice, None, False).chunk(2, -1)
    swapped_opposite, swapped_same = attention.attend(-q, k, twice, None, False).chunk(2, -1)
    torch.testing.assert_close(swapped_same, same)
    torch.testing.assert_close(swapped_opposite, opposite)
    assert not torch.allclose(same, opposite)


def test_polaformer_of_power_one_splits_the_product() -> None:
    attention, (q, k, _) = make("polaformer"), qkv()
    attention.scale.data.fill_(0.0)
    attention.power.data.fill_(-1e3)
    q, k = q * F.softplus(attention.scale), k * F.softplus(attention.scale)
    ones = torch.eye(21, dtype=torch.float64).expand(2, HEADS, 21, 21)  # values that return the weights
    same, opposite = (
        attention.attend(q, k, torch.cat(values, -1), None, False)
        for values in ((ones, torch.zeros_like(ones)), (torch.zeros_like(ones), ones))
    )
    s = F.softplus(attention.scale)
    positive, negative = ((F.relu(sign * q / s) for sign in (1, -1)), (F.relu(sign * k / s) for sign in (1, -1)))
    (q_plus, q_minus), (k_plus, k_minus) = positive, negative
    mass_same = (q_plus * k_plus.sum(-2, keepdim=True) + q_minus * k_minus.sum(-2, keepdim=True)).sum(-1, keepdim=True)
    mass_other = (q_minus * k_plus.sum(-2, keepdim=True) + q_plus * k_minus.sum(-2, keepdim=True)).sum(-1, keepdim=True)
    difference = same[..., :21] * mass_same - opposite[..., 21:] * mass_other
    torch.testing.assert_close(difference, q / s @ (k / s).transpose(-2, -1), rtol=1e-4, atol=1e-4)


def test_polaformer_takes_any_width_of_a_head() -> None:
    attention = ATTENTION["polaformer"](9, 3).double()
    q, k, v = (torch.randn(1, 3, 7, 3, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(attention.attend(q, k, v, None, False), attention.reference(q, k, v))
    assert attention.feature_size() == 6


def means(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean value, plain linear attention by ELU+1 and the mean of its kernel times D^(-1/2)."""
    kernel = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1)
    linear = kernel / kernel.sum(-1, keepdim=True) @ v
    return v.mean(-2, keepdim=True), linear, kernel.mean(-1, keepdim=True) * q.shape[-1] ** -0.5


def test_mala_is_linear_attention_with_an_amplified_deviation() -> None:
    attention, (q, k, v) = make("mala"), qkv()
    mean, linear, z = means(q, k, v)
    truth = mean + (1 + z) * (linear - mean)
    torch.testing.assert_close(attention.attend(q, k, v, None, False), truth, rtol=1e-10, atol=1e-10)


def test_mala_attends_more_sharply_from_a_longer_query() -> None:
    attention, (q, k, _) = make("mala"), qkv()
    weights = torch.eye(21, dtype=torch.float64).expand(2, HEADS, 21, 21)
    q = q.abs()
    tops = [attention.attend(q * length, k, weights, None, False).amax(-1) for length in (0.5, 1.0, 2.0, 4.0)]
    assert all((longer > shorter).all() for shorter, longer in pairwise(tops))


def test_inline_does_not_see_what_all_keys_share() -> None:
    attention, (q, k, v) = make("inline"), qkv()
    shift = 5 * torch.randn(1, HEADS, 1, DIM // HEADS, dtype=torch.float64)
    for causal in (False, True):
        out = attention.attend(q, k, v, None, causal)
        torch.testing.assert_close(attention.attend(q, k + shift, v, None, causal), out)


@pytest.mark.parametrize("name", ["mala", "inline"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_values_far_from_zero_do_not_drown_their_differences(name: str, dtype: torch.dtype, scale: float) -> None:
    """The mean is taken off before anything is multiplied: all the error is that of rounding the result."""
    attention, (q, k, v) = make(name), qkv(300)
    q, k, v = (x.to(dtype) for x in (scale * q, scale * k, v + 10))
    q[..., 7, :] = 0
    truth = attention.attend(q.double(), k.double(), v.double(), None, False)
    out = attention.attend(q, k, v, None, False)
    torch.testing.assert_close(out.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("grid", [(7, 11), (2, 3), (9, 9)])
def test_agents_are_pooled_queries_of_the_grid(grid: tuple[int, int], prefix: int) -> None:
    attention, (q, k, v) = make("agent", axes=2, agents=16), qkv(prefix + grid[0] * grid[1])
    image = q[:, :, prefix:].transpose(-2, -1).unflatten(-1, grid).flatten(0, 1)
    agents = F.adaptive_avg_pool2d(image, 4).flatten(-2).transpose(-2, -1).unflatten(0, q.shape[:2])
    read, gather = (x @ y.transpose(-2, -1) / x.shape[-1] ** 0.5 for x, y in ((q, agents), (agents, k)))
    truth = read.softmax(-1) @ (gather.softmax(-1) @ v)
    torch.testing.assert_close(attention.attend(q, k, v, None, False, grid), truth, rtol=1e-10, atol=1e-10)


def test_agents_know_the_grid_and_refuse_one_that_is_too_large() -> None:
    attention, (q, k, v) = make("agent", axes=2), qkv(144)
    out = attention.attend(q, k, v, None, False, (12, 12))
    assert not torch.allclose(attention.attend(q, k, v, None, False, (8, 18)), out)
    with pytest.raises(UnsupportedError, match=r"144 tokens with grid=\(12, 13\)"):
        attention.attend(q, k, v, None, False, (12, 13))
    with pytest.raises(UnsupportedError, match="axes=2 needs grid"):
        attention.attend(q, k, v, None, False)


def test_padded_regions_have_no_agents() -> None:
    """Two rows of regions of four are padding: the agents are those of the upper half alone."""
    attention, (q, k, v) = make("agent", axes=2, agents=16), qkv(64)
    keep = (torch.arange(64) < 32).view(1, 1, 1, 64)
    q[:, :, 32:], k[:, :, 32:], v[:, :, 32:] = 1e3, 1e3, 1e3
    agents = F.adaptive_avg_pool2d(q[:, :, :32].transpose(-2, -1).unflatten(-1, (4, 8)).flatten(0, 1), (2, 4))
    agents = agents.flatten(-2).transpose(-2, -1).unflatten(0, q.shape[:2])
    whole = q, k, v
    q, k, v = (x[:, :, :32] for x in whole)
    read, gather = (x @ y.transpose(-2, -1) / x.shape[-1] ** 0.5 for x, y in ((q, agents), (agents, k)))
    out = attention.attend(*whole, keep, False, (8, 8))[:, :, :32]
    torch.testing.assert_close(out, read.softmax(-1) @ (gather.softmax(-1) @ v), rtol=1e-10, atol=1e-10)


def test_agents_do_not_see_what_all_keys_share() -> None:
    attention, (q, k, v) = make("agent", agents=5), qkv()
    shift = 5 * torch.randn(1, HEADS, 1, DIM // HEADS, dtype=torch.float64)
    out = attention.attend(q, k, v, None, False)
    torch.testing.assert_close(attention.attend(q, k + shift, v, None, False), out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": 3}, "axes=3; accepted: 1"),
        ({"agents": 0}, "agents=0; give at least 1"),
        ({"agents": 50, "axes": 2}, "give a square, such as 49"),
    ],
)
def test_agent_refuses_bad_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attention_layer("agent", **options)(DIM, HEADS)


def test_rala_is_the_formula_of_its_source() -> None:
    attention, (q, k, v) = make("rala"), qkv()
    q_features, k_features = (F.elu(x) + 1 for x in (q, k))
    saliency = q_features.mean(-2, keepdim=True) @ k_features.transpose(-2, -1) * (DIM // HEADS) ** -0.5
    weighted = 21 * saliency.softmax(-1).transpose(-2, -1) * k_features
    truth = q_features @ (weighted.transpose(-2, -1) @ v) / (q_features @ weighted.sum(-2).unsqueeze(-1))
    torch.testing.assert_close(attention.attend(q, k, v, None, False), truth, rtol=1e-10, atol=1e-10)


def test_rala_of_one_dominating_key_is_finite_in_half_precision() -> None:
    attention, (q, k, v) = make("rala"), qkv(3136)
    q, k, v = (x.half() for x in (q, k, v))
    k[:, :, 7] = 200.0
    out = attention.attend(q, k, v, None, False)
    torch.testing.assert_close(out, v[:, :, 7:8].expand_as(out), rtol=2e-3, atol=2e-3)
