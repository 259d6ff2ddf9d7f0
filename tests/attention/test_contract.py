"""What every mechanism of the registry keeps; a new one is tested by being registered."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from visionattn.attention import ATTENTION, Attention, LinearAttention, attention_layer
from visionattn.attention.features import RandomFeatures
from visionattn.errors import ConfigError, UnknownNameError, UnsupportedError

DIM, HEADS = 24, 3
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in ATTENTION} | {
    "cosformer-length": ("cosformer", {"max_tokens": 16384}),
    "performer-iid": ("performer", {"draws": "iid", "features": 32}),
    "performer-calibrated": ("performer", {"calibrated": True, "features": 32}),
    "performer-relu": ("performer", {"feature_map": "relu"}),
    "slay-exact": ("slay", {"poly": "exact", "features": 4}),
    "slay-nystrom": ("slay", {"poly": "nystrom"}),
    "slay-maclaurin": ("slay", {"poly": "maclaurin", "seed": 3}),
    "slay-tensorsketch": ("slay", {"poly": "tensorsketch"}),
    "gka-window": ("gka", {"window": 4}),
    "agent-few": ("agent", {"agents": 5}),
    "dark-iid": ("dark", {"draws": "iid", "features": 32}),
}
SIGNED = {"slay-nystrom", "slay-maclaurin", "slay-tensorsketch"}
"""Their denominators may be negative: no hull, no bound on rounding."""
UNBOUNDED = {"mala", "inline", "ttt"}
"""Their weights may be negative: no hull, and outputs may be larger than values."""
UNWEIGHTED = {"ttt"}
"""They are no weighted mean of the values."""
BLIND = {"uniform"}
"""They do not read queries and keys."""
OWN = {"dark": {"shift"}, "focused": {"scale"}, "polaformer": {"scale", "power"}, "ttt": {"first", "second"}}
"""They have parameters that timm's attention has not."""
COUPLED = {"focused"}
"""Their heads are not independent."""
LENGTHS = {"cosformer": {"max_tokens": 16384}}
"""Options without which the kernel depends on the number of tokens."""

pytestmark = pytest.mark.filterwarnings("ignore:slay. poly=:UserWarning", "ignore:.*torch.jit.script")


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return str(request.param)


@pytest.fixture(params=list(ATTENTION))
def name(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return str(request.param)


def layer(variant: str, **more: Any) -> type[Attention]:
    name, options = VARIANTS[variant]
    return attention_layer(name, **(options | more))


def make(variant: str, **options: Any) -> Attention:
    attention = layer(variant)(DIM, HEADS, **options).double().eval()
    for key, parameter in attention.named_parameters():
        if "." not in key:  # the mechanism's own, away from where they start
            parameter.data += 0.1 * torch.randn_like(parameter)
    if getattr(attention, "log_weights", None) is not None:
        attention.log_weights += torch.randn_like(attention.log_weights)
    return attention


def fixed_length(variant: str) -> Attention:
    name, _ = VARIANTS[variant]
    attention = layer(variant, **LENGTHS.get(name, {}))(DIM, HEADS)
    return attention.double().eval()


def qkv(attention: Attention, tokens: int = 13, scale: float = 2.0, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(batch, HEADS, tokens, DIM // HEADS, dtype=torch.float64) * scale for _ in range(3))
    return (q, k, v) if attention.streams == 3 else (q, q, q)


def attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False):
    return attention.attend(q, k, v, mask, causal)


def ordered(attention: Attention) -> Attention:
    """Skip what is asked of a causal form alone where there is none; another test asks whether it is refused."""
    if not attention.ordered:
        pytest.skip("has no causal form")
    return attention


@pytest.mark.parametrize("tokens", [1, 2, 13, 196])
@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_contract_fast_form_equals_reference(variant: str, tokens: int, scale: float) -> None:
    attention = make(variant)
    q, k, v = qkv(attention, tokens, scale)
    truth = attention.reference(q, k, v)
    bound = 1e-8 if variant in SIGNED else 1e-10  # a denominator of either sign cancels
    torch.testing.assert_close(attend(attention, q, k, v), truth, rtol=bound, atol=bound)


@pytest.mark.parametrize("tokens", [1, 7, 32, 75])
def test_contract_causal_form_equals_masked_reference(variant: str, tokens: int) -> None:
    attention = ordered(make(variant))
    q, k, v = qkv(attention, tokens)
    truth = attention.reference(q, k, v, is_causal=True)
    bound = 1e-7 if variant in SIGNED else 1e-10
    torch.testing.assert_close(attend(attention, q, k, v, causal=True), truth, rtol=bound, atol=bound)


def test_contract_steps_equal_causal_form(variant: str) -> None:
    attention, x = ordered(fixed_length(variant)), torch.randn(2, 40, DIM, dtype=torch.float64)
    state, steps = None, []
    for token in range(40):
        y, state = attention.step(x[:, token : token + 1], state)
        steps.append(y)
    bound = 1e-7 if variant in SIGNED else 1e-10
    torch.testing.assert_close(torch.cat(steps, 1), attention(x, is_causal=True), rtol=bound, atol=bound)


def test_contract_what_has_no_causal_form_says_so(variant: str) -> None:
    attention, x = make(variant), torch.randn(2, 9, DIM, dtype=torch.float64)
    if attention.ordered:
        pytest.skip("has a causal form")
    for call in (
        lambda: attention(x, is_causal=True),
        lambda: attend(attention, *qkv(attention), causal=True),
        lambda: attention.reference(*qkv(attention), is_causal=True),
        lambda: attention.step(x[:, :1]),
    ):
        with pytest.raises(UnsupportedError, match="no causal form"):
            call()


def test_contract_state_of_linear_mechanisms_does_not_grow(name: str) -> None:
    attention = ordered(fixed_length(name))
    if not isinstance(attention, LinearAttention):
        pytest.skip("quadratic: its state is all keys and values")

    def size(state: Any) -> int:
        return state.numel() if isinstance(state, Tensor) else 0 if isinstance(state, int) else sum(map(size, state))

    sizes, state = [], None
    for _ in range(5):
        _, state = attention.step(torch.randn(1, 1, DIM, dtype=torch.float64), state)
        sizes.append(size(state))
    assert len(set(sizes)) == 1
    width = DIM // HEADS
    assert sizes[0] <= HEADS * (attention.feature_size() + 2) * (width + 3)


@pytest.mark.parametrize("causal", [False, True])
def test_contract_masks_keep_what_they_say(variant: str, causal: bool) -> None:
    attention = ordered(make(variant)) if causal else make(variant)
    q, k, v = qkv(attention, 45)
    keep = torch.rand(2, 1, 1, 45) > 0.4
    keep[..., 0] = True
    out, truth = attend(attention, q, k, v, keep, causal), attention.reference(q, k, v, keep, causal)
    if variant == "gka-window":  # a query may have no key within its window
        assert not out[truth.isnan() | (truth == 0)].any()
        out, truth = out.where(~truth.isnan(), 0.0), truth.nan_to_num()
    bound = 1e-6 if variant in SIGNED else 1e-10
    torch.testing.assert_close(out, truth, rtol=bound, atol=bound)


@pytest.mark.parametrize("causal", [False, True])
def test_contract_padding_equals_truncation(variant: str, causal: bool) -> None:
    attention, x = fixed_length(variant), torch.randn(2, 37, DIM, dtype=torch.float64)
    attention = ordered(attention) if causal else attention
    padded = torch.cat((x, torch.full((2, 12, DIM), 1e3, dtype=torch.float64)), 1)
    keep = (torch.arange(49) < 37).expand(2, 1, 1, 49)
    bound = 1e-7 if variant in SIGNED else 1e-9
    out = attention(padded, attn_mask=keep, is_causal=causal)[:, :37]
    torch.testing.assert_close(out, attention(x, is_causal=causal), rtol=bound, atol=bound)


@pytest.mark.parametrize("causal", [False, True])
def test_contract_query_without_keys_gets_zeros(name: str, causal: bool) -> None:
    attention = ordered(make(name)) if causal else make(name)
    q, k, v = qkv(attention, 35)
    keep = torch.zeros(2, 1, 1, 35, dtype=torch.bool)
    keep[1, ..., 20:] = True
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    out = attend(attention.float(), *leaves, keep, causal)
    assert not out[0].any()
    assert out.isfinite().all()
    if causal:
        assert not out[1, :, :20].any()
    gradients = torch.autograd.grad(1e4 * out.sum(), leaves, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)


def test_contract_other_masks_are_refused(name: str) -> None:
    attention, x = make(name), torch.randn(1, 6, DIM, dtype=torch.float64)
    pairs = torch.rand(6, 6, dtype=torch.float64)
    if name == "softmax":
        assert attention(x, attn_mask=pairs).shape == x.shape
        return
    for mask in (pairs, pairs > 0.5, torch.zeros(1, 6, dtype=torch.float64)):
        with pytest.raises(UnsupportedError, match="boolean key padding"):
            attention(x, attn_mask=mask)


def test_contract_gradients(variant: str) -> None:
    attention = make(variant)
    x = [y.requires_grad_() for y in qkv(attention, 5, 1.0, 1)]
    leaves = x if attention.streams == 3 else x[:1]

    def form(which: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Tensor:
        return which(*(inputs if len(inputs) == 3 else inputs * 3), **options)

    assert torch.autograd.gradcheck(lambda *inputs: form(attention.reference, *inputs), leaves)
    learned = [p for key, p in attention.named_parameters() if "." not in key]
    weights = torch.randn_like(x[2])
    for causal in (False, True) if attention.ordered else (False,):
        fast, explicit = (
            torch.autograd.grad((out * weights).sum(), [*leaves, *learned], allow_unused=variant in BLIND)
            for out in (
                form(lambda *y, c=causal: attention.attend(*y, None, c), *leaves),
                form(attention.reference, *leaves, is_causal=causal),
            )
        )
        bound = 1e-7 if variant in SIGNED else 1e-9
        torch.testing.assert_close(fast, explicit, rtol=bound, atol=bound)


def test_contract_constant_values_come_back(variant: str) -> None:
    attention = make(variant)
    if attention.streams == 1:
        pytest.skip("features are the values")
    q, k, _ = qkv(attention)
    v = torch.randn(1, HEADS, 1, DIM // HEADS, dtype=torch.float64).expand_as(q)
    if variant in UNWEIGHTED:
        assert not torch.allclose(attend(attention, q, k, v), v, rtol=0.1, atol=0.1)
        return
    for causal in (False, True) if attention.ordered else (False,):
        torch.testing.assert_close(attend(attention, q, k, v, causal=causal), v)


@pytest.mark.parametrize("causal", [False, True])
def test_contract_output_lies_in_the_hull_of_the_values(variant: str, causal: bool) -> None:
    if variant in SIGNED:
        pytest.skip("weights may be negative")
    attention = ordered(make(variant)) if causal else make(variant)
    q, k, v = qkv(attention, 40, 5.0)
    out = attend(attention, q, k, v, causal=causal)
    if variant in UNBOUNDED:
        assert (out > v.amax(-2, keepdim=True) + 1).any()
        return
    assert (out <= v.amax(-2, keepdim=True) + 1e-10).all()
    assert (out >= v.amin(-2, keepdim=True) - 1e-10).all()


def test_contract_one_token_gets_its_own_value(variant: str) -> None:
    attention = make(variant)
    q, k, v = qkv(attention, 1)
    if variant in UNWEIGHTED:
        assert not torch.allclose(attend(attention, q, k, v), v, rtol=0.1, atol=0.1)
        return
    torch.testing.assert_close(attend(attention, q, k, v), v)


def test_contract_vanishing_queries_and_keys_give_the_mean(name: str) -> None:
    attention = make(name)
    if attention.positional or attention.streams == 1:
        pytest.skip("places, or values, still differ")
    _, _, v = qkv(attention)
    nothing = torch.zeros_like(v)
    if name in UNWEIGHTED:
        assert not attend(attention, nothing, nothing, v).any()
        return
    torch.testing.assert_close(attend(attention, nothing, nothing, v), v.mean(-2, keepdim=True).expand_as(v))


def test_contract_gradients_are_bounded_at_vanishing_tokens(name: str) -> None:
    attention = ATTENTION[name](DIM, HEADS)
    x = torch.randn(2, 9, DIM)
    x[:, 3] = 0
    x.requires_grad_()
    attention(x).square().sum().backward()
    assert x.grad is not None
    others = torch.arange(9) != 3
    assert x.grad[:, 3].abs().max() < 2e3 * x.grad[:, others].abs().max()


def test_contract_depends_on_queries_and_keys(variant: str) -> None:
    attention = make(variant)
    q, k, v = qkv(attention)
    out = attend(attention, q, k, v)
    if variant in BLIND:
        torch.testing.assert_close(out, v.mean(-2, keepdim=True).expand_as(v))
        return
    assert not torch.allclose(out, attend(attention, q.flip(-1), k, v))
    if attention.streams == 3:
        assert not torch.allclose(out, attend(attention, q, k.flip(-1), v))


def test_contract_permuting_tokens_permutes_the_output(variant: str) -> None:
    attention, x = make(variant), torch.randn(2, 13, DIM, dtype=torch.float64)
    order = torch.randperm(13)
    permuted = attention(x[:, order])
    if attention.positional or variant == "gka-window":
        assert not torch.allclose(permuted, attention(x)[:, order])
    else:
        bound = 1e-7 if variant in SIGNED else 1e-10
        torch.testing.assert_close(permuted, attention(x)[:, order], rtol=bound, atol=bound)


def test_contract_heads_and_images_are_independent(variant: str) -> None:
    attention = make(variant)
    q, k, v = qkv(attention)
    out = attend(attention, q, k, v)
    others = []
    for x in (q, k, v):
        other = x.clone()
        other[0, 1] += 1.0
        others.append(other)
    changed = attend(attention, *others)
    same = torch.ones(2, HEADS, dtype=torch.bool)
    same[0, 1] = False
    if variant in COUPLED:
        assert not torch.allclose(changed[same], out[same])
        same[0] = False
    torch.testing.assert_close(changed[same], out[same])
    if variant != "gka" and variant != "gka-window":  # moving all features by one is no change to distances
        assert not torch.allclose(changed[0, 1], out[0, 1])


@pytest.mark.parametrize("prefix", [0, 2])
def test_contract_local_convolution_on_any_grid(name: str, prefix: int) -> None:
    height, width = 3, 7
    attention = ATTENTION[name](DIM, HEADS, local=3).double()
    x = torch.randn(2, prefix + height * width, DIM, dtype=torch.float64)
    q, k, v = attention.project(x)
    tokens = v.transpose(1, 2).flatten(2)[:, prefix:]
    image = tokens.transpose(1, 2).reshape(2, DIM, height, width)
    near = nn.functional.conv2d(image, attention.local.weight, attention.local.bias, padding=1, groups=DIM)
    near = torch.cat((torch.zeros(2, prefix, DIM, dtype=torch.float64), near.flatten(2).transpose(1, 2)), 1)
    mixed = attend(attention, q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x, grid=(height, width)), attention.proj(mixed + near))
    with pytest.raises(UnsupportedError, match="grid"):
        attention(x)
    with pytest.raises(UnsupportedError, match="local" if attention.ordered else "no causal form"):
        attention(x, is_causal=True, grid=(height, width))
    with pytest.raises(UnsupportedError, match="local"):
        attention.step(x[:, :1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "limit"), [(196, 60.0), (16384, 60.0), (16384, 1.0)])
def test_contract_precisions_agree_and_none_overflows(
    variant: str, dtype: torch.dtype, tokens: int, limit: float
) -> None:
    attention = layer(variant)(16, 1).double().eval()
    linear = isinstance(attention, LinearAttention)
    tokens = tokens if linear and variant != "slay-exact" else min(tokens, 2048)  # float64 truth would need gigabytes
    q, k, v = ((torch.rand(1, 1, tokens, 16) * 2 - 1).mul(limit).to(dtype) for _ in range(3))
    if attention.streams == 1:
        q = k = v
    truth = attend(attention, q.double(), k.double(), v.double())
    out = attend(attention.to(dtype), q, k, v)
    assert out.dtype == dtype
    if variant in SIGNED:
        return
    assert out.isfinite().all()
    # An average of many values is small beside them, so rounding is measured against the values. In float32, features
    # of random draws and logits that are products of queries and keys, in the thousands, lose up to 1e-3.
    coarse = isinstance(attention, RandomFeatures) or (limit > 1 and (not linear or not attention.ordered))
    eps = max(torch.finfo(dtype).eps, 2.5e-4 if coarse else 5e-6)
    largest = max(v.double().abs().max(), truth.abs().max())
    error = (out.double() - truth).abs().max() / largest
    assert error < 4 * eps
    assert (out.double() - truth).norm() < 2 * eps * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_contract_causal_form_does_not_overflow(name: str, dtype: torch.dtype) -> None:
    attention = ordered(ATTENTION[name](16, 1)).to(dtype)
    q, k, v = ((torch.rand(1, 1, 256, 16) * 2 - 1).mul(60).to(dtype) for _ in range(3))
    if attention.streams == 1:
        q = k = v
    k[..., -1, :] = 60.0  # a late key that outweighs all before it
    out = attend(attention, q, k, v, causal=True)
    truth = attention.double().reference(q.double(), k.double(), v.double(), is_causal=True)
    within = truth.abs() < 0.99 * torch.finfo(dtype).max
    error = ((out.double() - truth).abs() / truth.abs().clamp(min=60))[within]
    assert error.max() < 8 * torch.finfo(dtype).eps


def test_contract_autocast_does_not_touch_the_features(variant: str) -> None:
    attention = layer(variant)(DIM, HEADS, qkv_bias=True).eval()
    x = 4 * torch.randn(2, 50, DIM)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        q, k, v = attention.project(x)
        out = attention(x)
        mixed = attend(attention.double(), q.double(), k.double(), v.double())
    truth = attention.finish(mixed)
    if variant not in SIGNED:
        assert (out.double() - truth).norm() < 4 * torch.finfo(torch.bfloat16).eps * truth.norm()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"qkv_bias": True},
    {"qk_norm": True, "norm_layer": nn.LayerNorm},
    {"qkv_bias": True, "scale_norm": True, "norm_layer": nn.LayerNorm, "proj_bias": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_contract_checkpoints_of_timm_load(name: str, options: dict[str, Any]) -> None:
    if ATTENTION[name].streams == 1:
        pytest.skip("has no projections of queries, keys and values")
    stock = timm.layers.Attention(DIM, HEADS, **options)
    ours = ATTENTION[name](DIM, HEADS, **options)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    own = set(before) - set(stock.state_dict())
    assert own == OWN.get(name, set()) | {key for key, _ in ours.named_buffers()}
    ours.load_state_dict(stock.state_dict(), strict=name not in OWN)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, before[key] if key in own else stock.state_dict()[key])
    stock.load_state_dict({key: value for key, value in ours.state_dict().items() if key not in own})
    assert ours(torch.randn(2, 5, DIM)).shape == (2, 5, DIM)


def test_softmax_contract_equals_timm() -> None:
    torch.manual_seed(0)
    stock = timm.layers.Attention(DIM, HEADS, qkv_bias=True).eval()
    ours = ATTENTION["softmax"](DIM, HEADS, qkv_bias=True).eval()
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 7, DIM)
    mask = torch.rand(7, 7) > 0.3
    mask.fill_diagonal_(True)
    torch.testing.assert_close(ours(x), stock(x))
    torch.testing.assert_close(ours(x, attn_mask=mask), stock(x, attn_mask=mask))
    torch.testing.assert_close(ours(x, is_causal=True), stock(x, is_causal=True))


def test_contract_caller_may_project(name: str) -> None:
    whole = make(name)
    bare = ATTENTION[name](DIM, HEADS, projections=False).double()
    bare.load_state_dict({key: value for key, value in whole.state_dict().items() if "." not in key})
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    assert whole.qkv(x).shape[-1] == whole.streams * DIM
    torch.testing.assert_close(whole.proj(bare(whole.qkv(x))), whole(x))


def test_contract_bad_arguments(name: str) -> None:
    with pytest.raises(ConfigError, match="num_heads=5"):
        ATTENTION[name](DIM, 5)
    with pytest.raises(ConfigError, match="norm_layer"):
        ATTENTION[name](DIM, HEADS, qk_norm=True)
    with pytest.raises(ConfigError, match="local=4"):
        ATTENTION[name](DIM, HEADS, local=4)
    if name not in ("softmax", "gka"):
        with pytest.raises(UnsupportedError, match="attn_drop"):
            ATTENTION[name](DIM, HEADS, attn_drop=0.1)


def by_state_dict(attention: Attention, variant: str) -> Attention:
    buffer = io.BytesIO()
    torch.save(attention.state_dict(), buffer)
    buffer.seek(0)
    other = make(variant)
    for values in other.buffers():
        values.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


COPIES: dict[str, Callable[[Attention, str], Any]] = {
    "deepcopy": lambda attention, _: copy.deepcopy(attention),
    "pickle": lambda attention, _: pickle.loads(pickle.dumps(attention)),
    "state_dict": by_state_dict,
    "script": lambda attention, _: torch.jit.script(attention),
}


@pytest.mark.parametrize("way", COPIES)
def test_contract_survives(variant: str, way: str) -> None:
    attention = make(variant)
    copied = COPIES[way](attention, variant)
    for tokens in (13, 7):
        x = torch.randn(2, tokens, DIM, dtype=torch.float64)
        keep = torch.arange(tokens).expand(2, 1, 1, tokens) != 3
        bound = 1e-7 if variant in SIGNED else 1e-9
        torch.testing.assert_close(copied(x), attention(x), rtol=bound, atol=bound)
        torch.testing.assert_close(copied(x, keep), attention(x, keep), rtol=bound, atol=bound)


def compiled(attention: Attention) -> Any:
    torch.compiler.reset()  # all mechanisms are one code object, whose number of graphs is limited
    return torch.compile(attention, fullgraph=True, backend="aot_eager")


def test_contract_compiles_whole(name: str) -> None:
    attention, x = make(name), torch.randn(2, 13, DIM, dtype=torch.float64)
    torch.testing.assert_close(compiled(attention)(x), attention(x))


@pytest.mark.slow
def test_contract_causal_and_masked_forms_compile_whole(name: str) -> None:
    attention, x = ordered(make(name)), torch.randn(2, 40, DIM, dtype=torch.float64)
    options = {"attn_mask": torch.arange(40).expand(2, 1, 1, 40) != 3, "is_causal": True}
    torch.testing.assert_close(compiled(attention)(x, **options), attention(x, **options), rtol=1e-9, atol=1e-9)


def test_contract_exports_with_any_number_of_tokens(variant: str) -> None:
    attention = make(variant)
    least = 5 if variant == "gka-window" else None  # more than its window of 4
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", min=least, max=4096)}
    program = torch.export.export(
        attention, (torch.randn(2, 13, DIM, dtype=torch.float64),), dynamic_shapes={"x": sizes}
    )
    for shape in ((3, 21, DIM), (2, 196, DIM)):
        x = torch.randn(shape, dtype=torch.float64)
        bound = 1e-7 if variant in SIGNED else 1e-9
        torch.testing.assert_close(program.module()(x), attention(x), rtol=bound, atol=bound)


def test_contract_meta_device(variant: str) -> None:
    attention = layer(variant)(DIM, HEADS, device="meta")
    assert all(tensor.is_meta for tensor in (*attention.parameters(), *attention.buffers()))
    assert attention(torch.empty(2, 5, DIM, device="meta")).shape == (2, 5, DIM)


def test_contract_reset_restores_what_storage_lost(variant: str) -> None:
    fresh = layer(variant)(DIM, HEADS)
    attention = layer(variant)(DIM, HEADS, device="meta").to_empty(device="cpu")
    for tensor in (*attention.parameters(), *attention.buffers()):
        tensor.data.fill_(torch.nan)
    for module in attention.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in (*attention.parameters(), *attention.buffers()))
    for (key, values), (_, expected) in zip(attention.named_buffers(), fresh.named_buffers(), strict=True):
        assert torch.equal(values, expected), key


def test_contract_no_images_give_no_tokens(variant: str) -> None:
    attention = make(variant)
    for causal in (False, True) if attention.ordered else (False,):
        x = torch.zeros(0, 9, DIM, dtype=torch.float64, requires_grad=True)
        mixed = attention(x, is_causal=causal, attn_mask=torch.ones(0, 1, 1, 9, dtype=torch.bool), grid=(3, 3))
        assert mixed.shape == (0, 9, DIM)
        mixed.sum().backward()
        assert x.grad is not None


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"ela_hadamart.*nearest: ela_hadamard"):
        ATTENTION["ela_hadamart"]
