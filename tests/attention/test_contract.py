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

from visionattn.attention import ATTENTION, Attention, LinearAttention
from visionattn.errors import ConfigError, UnknownNameError, UnsupportedError

DIM, HEADS = 24, 3
LINEAR = [name for name, cls in ATTENTION.items() if issubclass(cls, LinearAttention)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"qkv_bias": True},
    {"qk_norm": True, "norm_layer": nn.LayerNorm},
    {"qkv_bias": True, "scale_norm": True, "norm_layer": nn.LayerNorm, "proj_bias": False},
]


@pytest.fixture(params=list(ATTENTION))
def name(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return str(request.param)


def make(name: str, **options: Any) -> Attention:
    return ATTENTION[name](DIM, HEADS, **options).double().eval()


def qkv(tokens: int = 13, scale: float = 2.0, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(batch, HEADS, tokens, DIM // HEADS, dtype=torch.float64) * scale for _ in range(3))
    return q, k, v


def attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.attend(q, k, v, None, False)


@pytest.mark.parametrize("tokens", [1, 2, 13, 196])
@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_contract_fast_form_equals_reference(name: str, tokens: int, scale: float) -> None:
    attention = make(name)
    q, k, v = qkv(tokens, scale)
    torch.testing.assert_close(attend(attention, q, k, v), attention.reference(q, k, v), rtol=1e-10, atol=1e-10)


def test_contract_gradients(name: str) -> None:
    attention = make(name)
    leaves = [x.requires_grad_() for x in qkv(5, 1.0, 1)]
    assert torch.autograd.gradcheck(attention.reference, leaves)
    weights = torch.randn_like(leaves[2])
    fast, explicit = (
        torch.autograd.grad((form(*leaves) * weights).sum(), leaves)
        for form in (lambda *x: attend(attention, *x), attention.reference)
    )
    torch.testing.assert_close(fast, explicit, rtol=1e-9, atol=1e-10)


def test_contract_constant_values_come_back(name: str) -> None:
    q, k, _ = qkv()
    v = torch.randn(1, HEADS, 1, DIM // HEADS, dtype=torch.float64).expand_as(q)
    torch.testing.assert_close(attend(make(name), q, k, v), v)


def test_contract_output_lies_in_the_hull_of_the_values(name: str) -> None:
    q, k, v = qkv(40, 5.0)
    out = attend(make(name), q, k, v)
    assert (out <= v.amax(-2, keepdim=True) + 1e-12).all()
    assert (out >= v.amin(-2, keepdim=True) - 1e-12).all()


def test_contract_one_token_gets_its_own_value(name: str) -> None:
    q, k, v = qkv(1)
    torch.testing.assert_close(attend(make(name), q, k, v), v)


def test_contract_depends_on_queries_and_keys(name: str) -> None:
    q, k, v = qkv()
    out = attend(make(name), q, k, v)
    assert not torch.allclose(out, attend(make(name), q.flip(-1), k, v))
    assert not torch.allclose(out, attend(make(name), q, k.flip(-1), v))


def test_contract_permuting_tokens_permutes_the_output(name: str) -> None:
    attention, x = make(name), torch.randn(2, 13, DIM, dtype=torch.float64)
    order = torch.randperm(13)
    torch.testing.assert_close(attention(x[:, order]), attention(x)[:, order])


def test_contract_heads_and_images_are_independent(name: str) -> None:
    attention = make(name)
    q, k, v = qkv()
    out = attend(attention, q, k, v)
    torch.testing.assert_close(attend(attention, q[1:, 2:], k[1:, 2:], v[1:, 2:]), out[1:, 2:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "limit"), [(196, 60.0), (16384, 60.0), (16384, 1.0)])
def test_contract_half_precision_neither_overflows_nor_drifts(
    name: str, dtype: torch.dtype, tokens: int, limit: float
) -> None:
    if name not in LINEAR and tokens > 4096:
        tokens = 4096  # the quadratic control in float64 would need gigabytes
    q, k, v = ((torch.rand(1, 1, tokens, 16) * 2 - 1) * limit for _ in range(3))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    attention = make(name)
    out = attend(attention, q, k, v)
    truth = attend(attention, q.double(), k.double(), v.double())
    assert out.dtype == dtype
    assert out.isfinite().all()
    # An average of many values is small beside them, so rounding is measured against the values.
    error = (out.double() - truth).abs().max() / v.double().abs().max()
    assert error < 4 * torch.finfo(dtype).eps
    assert (out.double() - truth).norm() < 2 * torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_contract_checkpoints_carry_over_to_and_from_timm(name: str, options: dict[str, Any]) -> None:
    stock = timm.layers.Attention(DIM, HEADS, **options)
    ours = ATTENTION[name](DIM, HEADS, **options)
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
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
    bare = ATTENTION[name](DIM, HEADS, projections=False)
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    assert not list(bare.parameters())
    torch.testing.assert_close(whole.proj(bare(whole.qkv(x))), whole(x))


def test_contract_masks_are_kept_or_refused(name: str) -> None:
    attention, x = make(name), torch.randn(1, 6, DIM, dtype=torch.float64)
    if name in LINEAR:
        with pytest.raises(UnsupportedError, match="attn_mask=None"):
            attention(x, is_causal=True)
        with pytest.raises(UnsupportedError, match="attn_mask=None"):
            attention(x, attn_mask=torch.ones(6, 6, dtype=torch.bool))
    else:
        torch.testing.assert_close(attention(x, is_causal=True)[:, :1], attention(x[:, :1]))


def test_contract_bad_arguments(name: str) -> None:
    with pytest.raises(ConfigError, match="num_heads=5"):
        ATTENTION[name](DIM, 5)
    with pytest.raises(ConfigError, match="norm_layer"):
        ATTENTION[name](DIM, HEADS, qk_norm=True)
    if name in LINEAR:
        with pytest.raises(UnsupportedError, match=r"attn_drop=0\.1"):
            ATTENTION[name](DIM, HEADS, attn_drop=0.1)


def by_state_dict(attention: Attention, name: str) -> Attention:
    buffer = io.BytesIO()
    torch.save(attention.state_dict(), buffer)
    buffer.seek(0)
    other = make(name)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


COPIES: dict[str, Callable[[Attention, str], Any]] = {
    "deepcopy": lambda attention, _: copy.deepcopy(attention),
    "pickle": lambda attention, _: pickle.loads(pickle.dumps(attention)),
    "state_dict": by_state_dict,
    "script": lambda attention, _: torch.jit.script(attention),
    "compile": lambda attention, _: torch.compile(attention, fullgraph=True, backend="aot_eager"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("way", COPIES)
def test_contract_survives(name: str, way: str) -> None:
    attention = make(name)
    copied = COPIES[way](attention, name)
    for tokens in (13, 7):
        x = torch.randn(2, tokens, DIM, dtype=torch.float64)
        torch.testing.assert_close(copied(x), attention(x))


def test_contract_exports_with_any_number_of_tokens(name: str) -> None:
    attention = make(name)
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", max=4096)}
    program = torch.export.export(
        attention, (torch.randn(2, 13, DIM, dtype=torch.float64),), dynamic_shapes={"x": sizes}
    )
    for shape in ((3, 21, DIM), (2, 196, DIM)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(program.module()(x), attention(x))


def test_contract_meta_device(name: str) -> None:
    attention = ATTENTION[name](DIM, HEADS, device="meta")
    assert attention(torch.empty(2, 5, DIM, device="meta")).shape == (2, 5, DIM)


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"ela_hadamart.*nearest: ela_hadamard"):
        ATTENTION["ela_hadamart"]
