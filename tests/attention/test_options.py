"""Options by ``attention_layer``, kernels by ``exact_kernel``, and what is particular to one mechanism."""

import copy
import io
import math
import pickle

import pytest
import timm
import torch
from torch import Tensor

import visionattn
from visionattn.attention import ATTENTION, attention_layer, check_kernel, exact_kernel
from visionattn.attention.layer import _layer
from visionattn.errors import ConfigError, UnknownNameError, UnsupportedError
from visionattn.ops import distance, signed


def test_layer_is_a_class_that_timm_takes() -> None:
    layer = visionattn.attention_layer("slay", poly="exact", features=2)
    assert issubclass(layer, ATTENTION["slay"])
    assert layer is attention_layer("slay", features=2, poly="exact")
    assert attention_layer("elu") is ATTENTION["elu"]
    model = timm.create_model(
        "vit_tiny_patch16_224", attn_layer=layer, img_size=32, patch_size=8, embed_dim=24, num_heads=3, depth=2
    ).eval()
    assert model.blocks[1].attn.poly == "exact"
    copied = pickle.loads(pickle.dumps(model))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(copied(x), model(x))
    assert type(copied.blocks[0].attn) is ATTENTION["slay"]


def test_layer_unpickles_in_a_process_that_never_made_it() -> None:
    stored = pickle.dumps(attention_layer("performer", features=7))
    _layer.cache_clear()
    assert pickle.loads(stored)(24, 3).features == 7


def test_layer_takes_a_class_and_adds_to_its_options() -> None:
    layer = attention_layer(attention_layer("slay", poly="exact"), local=3)
    assert layer is attention_layer("slay", local=3, poly="exact")
    own = type("Own", (ATTENTION["elu"],), {})
    assert issubclass(attention_layer(own, local=5), own)


def test_layer_names_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match=r"slay has no option 'polly'.*nearest: poly"):
        attention_layer("slay", polly="exact")
    with pytest.raises(UnknownNameError, match="nearest: slay"):
        attention_layer("slai", poly="exact")
    assert attention_layer("softmax", local=3)(24, 3).local is not None


def co_activation(x: Tensor) -> Tensor:
    return torch.cat((x.square(), torch.ones_like(x[..., :1])), -1)


def one_pair(q: Tensor, k: Tensor) -> Tensor:
    return (q * k).square().sum(-1) + 1


MEANING = "large where the same entries are large, whatever their sign"


def test_exact_kernel_is_the_kernel_it_was_given() -> None:
    torch.manual_seed(0)
    layer = exact_kernel(co_activation, co_activation, kernel=one_pair, meaning=MEANING)
    attention = layer(24, 3).double()
    q, k, v = (torch.randn(2, 3, 40, 8, dtype=torch.float64) for _ in range(3))
    for causal in (False, True):
        weights = one_pair(q.unsqueeze(-2), k.unsqueeze(-3))
        weights = weights.tril() if causal else weights
        truth = weights / weights.sum(-1, keepdim=True) @ v
        torch.testing.assert_close(attention.attend(q, k, v, None, causal), truth, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(attention.reference(q, k, v, is_causal=causal), truth, rtol=1e-10, atol=1e-10)
    assert attention.feature_size() == 9
    assert layer.report is not None
    assert not layer.report.failures
    assert layer.report.minimum > 0
    model = timm.create_model("vit_tiny_patch16_224", attn_layer=layer, img_size=32, patch_size=8, depth=1)
    assert copy.deepcopy(model)(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
    scripted = torch.jit.script(attention)
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(scripted(x), attention(x))


def test_exact_kernel_survives_pickling_and_trains_its_maps() -> None:
    layer = exact_kernel(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Softplus()), positive_part)
    model = torch.nn.Sequential(layer(24, 3), layer(24, 3))
    assert {"0.phi.0.weight", "1.phi.0.weight"} <= {name for name, _ in model.named_parameters()}
    assert model[0].phi is not model[1].phi
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), model(x))
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def positive_part(x: Tensor) -> Tensor:
    return x[..., :4].relu() + 0.1


def test_step_takes_one_token() -> None:
    attention = ATTENTION["elu"](24, 3)
    with pytest.raises(UnsupportedError, match=r"got \(1, 2, 24\)"):
        attention.step(torch.randn(1, 2, 24))


def test_repr_shows_the_options() -> None:
    shown = repr(attention_layer("slay", poly="exact", features=3)(24, 3))
    assert "poly='exact', " in shown
    assert "features=3" in shown


def same(x: Tensor) -> Tensor:
    return x


def one(x: Tensor) -> Tensor:
    return torch.ones_like(x[..., :1])


def root(x: Tensor) -> Tensor:
    return (x - x).abs().sqrt() + x.square()


@pytest.mark.parametrize(
    ("phi", "psi", "kernel", "meaning", "failure"),
    [
        (same, same, lambda q, k: (q * k).sum(-1), "aligned", "negative"),
        (one, one, lambda q, k: (0 * q * k).sum(-1) + 1, "none", "not discriminative"),
        (co_activation, co_activation, lambda q, k: (q * k).square().sum(-1), MEANING, "differs from the kernel"),
        (co_activation, co_activation, one_pair, " ", "no geometric meaning"),
        (root, root, lambda q, k: (q * k).square().sum(-1), MEANING, "gradients are not finite"),
    ],
)
def test_each_criterion_can_fail(phi, psi, kernel, meaning, failure) -> None:
    report = check_kernel(phi, psi, kernel, meaning)
    assert any(failure in text for text in report.failures)
    with pytest.raises(ConfigError, match=failure):
        exact_kernel(phi, psi, kernel=kernel, meaning=meaning)


def test_a_kernel_that_is_negative_only_in_a_corner_is_found() -> None:
    def kernel(q: Tensor, k: Tensor) -> Tensor:  # negative only where q + k is short, which draws do not meet
        return (q + k).square().sum(-1) - 0.5

    report = check_kernel(same, same, kernel, "far sums")
    assert report.minimum < 0


def test_sum_and_difference_stay_exact_far_from_the_origin() -> None:
    """The expanded form loses all digits here in float32: distances of 1 between vectors of length 2,000."""
    torch.manual_seed(0)
    k = torch.randn(1, 1, 100, 16, dtype=torch.float64)
    q, v = k + 0.1 * torch.randn_like(k), torch.randn(1, 1, 100, 16, dtype=torch.float64)
    truth = attention_layer("ela_diff")(16, 1).reference(q, k, v)
    for shift in (0.0, 500.0):
        far_q, far_k = (q + shift).float(), (k + shift).float()
        exact = attention_layer("ela_diff")(16, 1).reference(far_q.double(), far_k.double(), v)
        out = distance.linear(far_q, -far_k, v.float())
        assert (out - exact).abs().max() < 1e-4
        assert (exact - truth).abs().max() < 1e-3
    features = [
        torch.cat((x, x.square().sum(-1, keepdim=True), torch.ones_like(x[..., :1])), -1) for x in (far_q, far_k)
    ]
    flipped = torch.cat((-2 * far_k, torch.ones_like(far_k[..., :1]), far_k.square().sum(-1, keepdim=True)), -1)
    naive = signed.linear(features[0], flipped, v.float())
    assert (naive - exact).abs().max() > 1e-2


def test_difference_of_equal_tokens_gives_the_mean() -> None:
    x = torch.ones(1, 1, 5, 8).requires_grad_()
    v = torch.randn(1, 1, 5, 8)
    out = distance.linear(x, -x, v)
    torch.testing.assert_close(out, v.mean(-2, keepdim=True).expand_as(v))
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_gka_equals_masked_softmax_with_key_bias() -> None:
    torch.manual_seed(0)
    attention = attention_layer("gka", window=3)(24, 3).double()
    attention.log_bandwidth.data = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    x = torch.randn(2, 3, 17, 8, dtype=torch.float64)
    square = attention.log_bandwidth.exp().square().view(3, 1, 1)
    logits = x @ x.transpose(-2, -1) / square - (x.square().sum(-1) / 2).unsqueeze(-2) / square
    places = torch.arange(17)
    for causal in (False, True):
        near = (places.unsqueeze(1) - places).abs() <= 3
        near = near & (places <= places.unsqueeze(1)) if causal else near
        truth = logits.masked_fill(~near, -math.inf).softmax(-1) @ x
        torch.testing.assert_close(attention.attend(x, x, x, None, causal), truth, rtol=1e-11, atol=1e-11)


def test_gka_makes_no_square_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def watch(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **kwargs: object) -> Tensor:
        seen.append(attn_mask)
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]  # else the kernel that is not fused is taken
        return fused(q, k, v, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    x = torch.randn(1, 1, 300, 8)
    keep = torch.ones(1, 1, 1, 300, dtype=torch.bool)
    attention_layer("gka")(8, 1).attend(x, x, x, keep, True)
    attention_layer("gka", window=5)(8, 1).attend(x, x, x, keep, True)
    assert seen[0] is None
    assert seen[1].numel() <= 3 * 5 * 5


def test_gka_has_no_projections_but_one() -> None:
    attention = attention_layer("gka")(24, 3, qkv_bias=True)
    assert {key: tuple(value.shape) for key, value in attention.named_parameters()} == {
        "log_bandwidth": (3,),
        "proj.weight": (24, 24),
        "proj.bias": (24,),
    }
    torch.testing.assert_close(attention.log_bandwidth.exp(), torch.full((3,), math.sqrt(8) / 2))
    with pytest.raises(UnsupportedError, match="qk_norm"):
        attention_layer("gka")(24, 3, qk_norm=True, norm_layer=torch.nn.LayerNorm)


@pytest.mark.parametrize("prefix", [0, 1])
def test_cosformer_in_two_dimensions(prefix: int) -> None:
    torch.manual_seed(0)
    height, width = 3, 5
    attention = attention_layer("cosformer", axes=2)(24, 3).double()
    q, k, v = (torch.randn(2, 3, prefix + 15, 8, dtype=torch.float64) for _ in range(3))
    places = [(0.5, 0.5)] * prefix + [
        (row / height, column / width) for row in range(height) for column in range(width)
    ]
    weights = (q.clamp(min=0) + 1e-6) @ (k.clamp(min=0) + 1e-6).transpose(-2, -1)
    for i, (row, column) in enumerate(places):
        for j, (other_row, other_column) in enumerate(places):
            weights[..., i, j] *= math.cos(math.pi / 2 * (row - other_row)) * math.cos(
                math.pi / 2 * (column - other_column)
            )
    truth = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(attention.attend(q, k, v, None, False, (height, width)), truth, rtol=1e-10, atol=1e-10)
    assert attention.feature_size() == 32
    with pytest.raises(UnsupportedError, match="grid"):
        attention.attend(q, k, v, None, False)
    with pytest.raises(UnsupportedError, match="max_tokens"):
        attention.step(torch.randn(1, 1, 24, dtype=torch.float64))


def test_cosformer_refuses_more_tokens_than_it_was_made_for() -> None:
    attention = attention_layer("cosformer", max_tokens=3)(24, 3)
    state = None
    for _ in range(3):
        _, state = attention.step(torch.randn(1, 1, 24), state)
    with pytest.raises(UnsupportedError, match="max_tokens=3"):
        attention.step(torch.randn(1, 1, 24), state)
    with pytest.raises(UnsupportedError, match="max_tokens=3"):
        attention(torch.randn(1, 4, 24))


def test_yat_needs_no_square_matrix_in_training() -> None:
    from visionattn.ops import yat

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, yat.BLOCK * 2 + 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sizes: list[int] = []

    def note(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    for causal in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            out = yat.attend(q, k, v, 1e-3, None, causal)
        assert max(sizes) < yat.BLOCK * q.shape[-2]
        truth = attention_layer("yat")(8, 1).reference(q, k, v, is_causal=causal)
        torch.testing.assert_close(out, truth, rtol=1e-9, atol=1e-9)
        weights = torch.randn_like(out)
        found, expected = (torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (out, truth))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_elu_has_its_slope_at_zero() -> None:
    x = torch.zeros(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(ATTENTION["elu"](4, 1).log_features(x).sum(), x)
    torch.testing.assert_close(slope, torch.ones_like(slope))


@pytest.mark.parametrize("options", [("ela_direction", {}), ("slay", {"poly": "exact", "features": 2})], ids=str)
def test_causal_forms_return_constant_values_where_no_key_answers(options: tuple[str, dict[str, object]]) -> None:
    torch.manual_seed(0)
    name, chosen = options
    attention = attention_layer(name, **chosen)(8, 1)
    k = torch.randn(1, 1, 70, 8)
    q = -k if name == "ela_direction" else torch.zeros_like(k)
    v = torch.full_like(k, 3.7)
    torch.testing.assert_close(attention.attend(q, k, v, None, False), v)
    torch.testing.assert_close(attention.attend(q, k, v, None, True), v)
    state = None
    for token in range(3):
        now = slice(token, token + 1)
        out, state = attention.advance(q[:, :, now], k[:, :, now], v[:, :, now], state)
        torch.testing.assert_close(out, v[:, :, now])


def test_padding_does_not_reach_others_through_the_local_convolution() -> None:
    attention = attention_layer("elu", local=3)(24, 3)
    x = torch.randn(1, 12, 24)
    keep = (torch.arange(12) != 5).expand(1, 1, 1, 12)
    other = x.clone()
    other[:, 5] += 100
    rest = torch.arange(12) != 5
    found, expected = (attention(y, attn_mask=keep, grid=(3, 4))[:, rest] for y in (other, x))
    torch.testing.assert_close(found, expected)


def test_options_that_cannot_be_hashed_are_refused() -> None:
    with pytest.raises(ConfigError, match="give numbers"):
        attention_layer("performer", features=[3])


def test_a_kernel_that_is_not_a_number_somewhere_fails() -> None:
    report = check_kernel(co_activation, co_activation, lambda q, k: one_pair(q, k) / (one_pair(q, k) < 200), MEANING)
    assert report.failures


def test_state_can_be_saved() -> None:
    attention = attention_layer("ela_sum")(24, 3)
    x = torch.randn(1, 6, 24)
    state = None
    for token in range(5):
        _, state = attention.step(x[:, token : token + 1], state)
    buffer = io.BytesIO()
    torch.save(tuple(state), buffer)
    buffer.seek(0)
    restored = type(state)(*torch.load(buffer, weights_only=True))
    torch.testing.assert_close(attention.step(x[:, 5:], restored)[0], attention(x, is_causal=True)[:, 5:])
