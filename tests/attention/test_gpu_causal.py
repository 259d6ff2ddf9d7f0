"""Fused kernels of causal attention on a GPU: accuracy, the same bits in every run, and CUDA graphs and streams."""

import pytest
import torch
from torch import Tensor

from visionattn.attention import ATTENTION, Attention
from visionattn.ops import switch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ENTRYWISE = ["ela_hadamard", "elu", "relu"]
BY_LOGARITHMS = ["performer", "dark", "slay", "slay_paper", "cosformer", "focused"]
CAUSAL = [*ENTRYWISE, *BY_LOGARITHMS]
TOKENS = 2**19
"""Tokens of all heads that are about what a GPU's programs take at a time: results of a race show there."""


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """Fill free memory with NaN, which a kernel that leaves a place unwritten would return."""
    torch.manual_seed(0)
    torch.full((2**28,), float("nan"), device="cuda")


def made(name: str, width: int = 64, heads: int = 2) -> Attention:
    layer = ATTENTION[name](heads * width, heads, projections=False).cuda()
    if name == "dark":
        torch.nn.init.normal_(layer.shift, std=0.1)
    return layer


def packed(layer: Attention, batch: int, tokens: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return torch.randn(batch, tokens, 3 * layer.dim, device="cuda").mul(scale).to(dtype)


def run(layer: Attention, x: Tensor, path: switch.Path, gradient: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Output, and the gradients of input and parameters."""
    inputs = [x.detach().requires_grad_(), *layer.parameters()]
    with switch.kernels(path):
        out = layer(inputs[0], attn_mask=mask, is_causal=True)
        return [out.detach(), *torch.autograd.grad(out, inputs, gradient.to(out.dtype))]


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def assert_accurate(layer: Attention, x: Tensor, mask: Tensor | None = None) -> None:
    """Assert that errors are those of the eager formula, or of a rounding."""
    gradient = torch.randn(*x.shape[:2], layer.dim, device="cuda").to(x.dtype)
    found = run(layer, x, "fused", gradient, mask)
    eager = run(layer, x, "eager", gradient, mask)
    truth = run(layer.double(), x.double(), "eager", gradient.double(), mask)
    layer.float()
    for fused, usual, exact in zip(found, eager, truth, strict=True):
        assert fused.dtype == usual.dtype
        assert fused.isfinite().all()
        if exact.norm() > 0:
            floor = 2e-6 if x.dtype == torch.float32 else 0.1 * torch.finfo(x.dtype).eps
            assert error(fused, exact) <= 1.5 * error(usual, exact) + floor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("batch", "tokens", "width"), [(2, 17, 24), (3, 1001, 64), (1, 700, 128)])
@pytest.mark.parametrize("name", CAUSAL)
def test_errors_are_those_of_eager(name: str, batch: int, tokens: int, width: int, dtype: torch.dtype) -> None:
    layer = made(name, width)
    assert_accurate(layer, packed(layer, batch, tokens, dtype))


@pytest.mark.parametrize("name", CAUSAL)
def test_masked_keys_are_none(name: str) -> None:
    layer = made(name)
    mask = torch.rand(2, 1, 1, 900, device="cuda") > 0.3
    mask[:, :, :, :70] = False
    x = packed(layer, 2, 900, torch.bfloat16)
    assert_accurate(layer, x, mask)
    with switch.kernels("fused"):
        assert not layer(x, attn_mask=mask, is_causal=True)[:, :70].any()


@pytest.mark.parametrize("kind", ["outliers", "offset", "ramp", "constant"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ENTRYWISE)
def test_uncommon_inputs(name: str, dtype: torch.dtype, kind: str) -> None:
    """Logarithms grow by more than a block is taken at once for, or values have much in common."""
    layer = made(name)
    x = packed(layer, 2, 800, torch.float32)
    q, k, v = x.chunk(3, -1)
    if kind == "outliers":
        q[:, 500], k[:, 300], v[:, 300] = 60, 60 * k[:, 300].sign(), 500
    elif kind == "offset":
        v += 30
    elif kind == "ramp":
        k += torch.linspace(-60, 60, 800, device="cuda").unsqueeze(-1)
    else:
        v[:] = 3
        gradient = torch.randn_like(v)
        out, _ = run(layer, x.to(dtype), "fused", gradient)
        torch.testing.assert_close(out, torch.full_like(out, 3))
        return
    assert_accurate(layer, x.to(dtype))


@pytest.mark.parametrize("tokens", [4096, 16384])
@pytest.mark.parametrize("name", CAUSAL)
def test_the_same_bits_in_every_run(name: str, tokens: int) -> None:
    layer = made(name)
    x = packed(layer, TOKENS // tokens, tokens, torch.bfloat16)
    gradient = torch.randn(*x.shape[:2], layer.dim, device="cuda")
    first = run(layer, x, "fused", gradient)
    for _ in range(30):
        assert all(torch.equal(a, b) for a, b in zip(first, run(layer, x, "fused", gradient), strict=True))


@pytest.mark.parametrize(("batch", "tokens"), [(128, 1024), (128, 577), (1, 65536)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits_whatever_the_number_of_heads(batch: int, tokens: int, dtype: torch.dtype) -> None:
    layer = made("ela_hadamard", heads=6)
    x = packed(layer, batch, tokens, dtype)
    gradient = torch.randn(*x.shape[:2], layer.dim, device="cuda")
    first = run(layer, x, "fused", gradient)
    for _ in range(30):
        assert all(torch.equal(a, b) for a, b in zip(first, run(layer, x, "fused", gradient), strict=True))


@pytest.mark.parametrize("name", CAUSAL)
def test_two_streams_at_once(name: str) -> None:
    layer = made(name)
    xs = [packed(layer, 4, 4096, torch.bfloat16) for _ in range(2)]
    gradient = torch.randn(4, 4096, layer.dim, device="cuda")
    expected = [run(layer, x, "fused", gradient) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    found = []
    for _ in range(5):
        for stream, x in zip(streams, xs, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(layer, x, "fused", gradient))
    torch.cuda.synchronize()
    for index, tensors in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected[index % 2], strict=True))


@pytest.mark.parametrize("name", CAUSAL)
def test_capture_in_a_cuda_graph(name: str) -> None:
    layer = made(name)
    x = packed(layer, 1, 3000, torch.bfloat16)
    gradient = torch.randn(1, 3000, layer.dim, device="cuda")
    expected = run(layer, x, "fused", gradient)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(layer, x, "fused", gradient)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(layer, x, "fused", gradient)
    for _ in range(3):
        for y in found:
            y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ENTRYWISE)
def test_training_in_a_whole_compiled_graph(name: str) -> None:
    torch.compiler.reset()
    layer = made(name)
    compiled = torch.compile(layer, fullgraph=True)
    x = packed(layer, 2, 600, torch.bfloat16).requires_grad_()
    out = compiled(x, is_causal=True)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
    with switch.kernels("fused"):
        usual = layer(x, is_causal=True)
        (expected,) = torch.autograd.grad(usual.float().square().sum(), x)
    torch.testing.assert_close(out, usual, rtol=2e-2, atol=2e-2)
    assert error(gradient, expected.double()) < 2e-2
