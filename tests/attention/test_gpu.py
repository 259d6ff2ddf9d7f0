"""The mechanisms on a GPU: the same numbers in half precision, no N x N memory, whole graphs."""

import pytest
import torch
from torch import Tensor

from visionattn.attention import ATTENTION, Attention, LinearAttention
from visionattn.attention.features import RandomFeatures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=list(ATTENTION))
def name(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return str(request.param)


def inputs(attention: Attention, tokens: int, limit: float, dtype: torch.dtype) -> list[Tensor]:
    width = attention.head_dim
    x = [(torch.rand(1, attention.num_heads, tokens, width, device="cuda") * 2 - 1).mul(limit).to(dtype) for _ in "qkv"]
    return x if attention.streams == 3 else [x[0]] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "limit"), [(196, 60.0), (16384, 60.0), (16384, 1.0)])
def test_half_precision_agrees_with_float64(name: str, dtype: torch.dtype, tokens: int, limit: float) -> None:
    attention = ATTENTION[name](128, 2).cuda().double()
    tokens = tokens if isinstance(attention, LinearAttention) else min(tokens, 4096)
    x = inputs(attention, tokens, limit, dtype)
    with torch.no_grad():
        truth = attention.attend(*(y.double() for y in x), None, False)
        out = attention.to(dtype).attend(*x, None, False)
    assert out.dtype == dtype
    assert out.isfinite().all()
    eps = max(torch.finfo(dtype).eps, 2.5e-4 if isinstance(attention, RandomFeatures) or limit > 1 else 0)
    largest = max(x[2].double().abs().max(), truth.abs().max())  # outputs of a few are larger than values
    assert (out.double() - truth).abs().max() < 4 * eps * largest
    assert (out.double() - truth).norm() < 2 * eps * truth.norm()


@pytest.mark.parametrize("causal", [False, True])
def test_training_needs_no_square_matrix(name: str, causal: bool) -> None:
    tokens = 8192
    attention = ATTENTION[name](64, 1).cuda()
    if causal and not attention.ordered:
        pytest.skip("has no causal form")
    x = [y.requires_grad_() for y in inputs(attention, tokens, 1.0, torch.float16)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attention.attend(*x, None, causal)
    torch.autograd.grad(out.float().square().sum(), x if attention.streams == 3 else x[:1], allow_unused=True)
    peak = torch.cuda.max_memory_allocated() - before
    features = attention.feature_size() if isinstance(attention, LinearAttention) else 0
    bound = 4 * tokens * (64 * 24 + 8 * features)
    if causal and isinstance(attention, LinearAttention):
        bound += 4 * tokens * 32 * (features * 4 + 64)  # what chunks keep of their pairs
    if name.startswith("yat"):
        bound += 4 * tokens * 512 * 10  # a block of queries, several times over
    assert peak < min(bound, 3 * 4 * tokens**2), f"{peak / 2**20:.0f} MiB of {bound / 2**20:.0f}"


def test_training_under_autocast(name: str) -> None:
    attention = ATTENTION[name](128, 2, qkv_bias=True).cuda()
    x = torch.randn(2, 300, 128, device="cuda", requires_grad=True)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype):
            out = attention(x)
        truth = attention(x)
        assert (out - truth).norm() < 20 * torch.finfo(dtype).eps * truth.norm()
        out.float().square().sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())


def test_whole_graph_by_inductor(name: str) -> None:
    attention = ATTENTION[name](128, 2).cuda().eval()
    x = torch.randn(2, 300, 128, device="cuda")
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(attention, fullgraph=True)
        torch.testing.assert_close(compiled(x), attention(x), rtol=1e-3, atol=1e-3)
