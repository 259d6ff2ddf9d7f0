"""Fused kernels on a GPU: accuracy, the same bits twice, and all that PyTorch does around an operator."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from visionattn.attention import ATTENTION, Attention
from visionattn.errors import UnsupportedError
from visionattn.ops import switch

if torch.cuda.is_available():
    from visionattn.ops.fused import launch, moments_library, projected_library
    from visionattn.ops.fused import library as positive_library

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ENTRYWISE = ["ela_hadamard", "elu", "relu"]
PROJECTED = ["performer", "dark", "calibrated", "slay", "slay_paper"]
MOMENTS = ["ela_sum", "ela_diff", "ela_direction"]
FUSED = [*ENTRYWISE, *PROJECTED, *MOMENTS]


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """Fill free memory with NaN, which a kernel that leaves a place unwritten would return."""
    torch.manual_seed(0)
    torch.full((2**27,), float("nan"), device="cuda")


def made(name: str, width: int = 64, heads: int = 2) -> Attention:
    if name == "calibrated":
        layer = ATTENTION["performer"](heads * width, heads, projections=False, calibrated=True).cuda()
        layer.log_weights.normal_()
        return layer
    layer = ATTENTION[name](heads * width, heads, projections=False).cuda()
    if name == "dark":
        torch.nn.init.normal_(layer.shift, std=0.1)
    return layer


def packed(layer: Attention, batch: int, tokens: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return torch.randn(batch, tokens, 3 * layer.dim, device="cuda").mul(scale).to(dtype)


def run(layer: Attention, x: Tensor, path: switch.Path, gradient: Tensor | None = None) -> list[Tensor]:
    """Output, and the gradients of input and parameters."""
    inputs = [x.detach().requires_grad_(), *layer.parameters()]
    with switch.kernels(path):
        out = layer(inputs[0])
        gradient = torch.ones_like(out) if gradient is None else gradient.to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("batch", "tokens", "width"), [(2, 17, 24), (140, 196, 64), (1, 4097, 64),
                                                        (140, 196, 96), (1, 600, 128)])  # fmt: skip
@pytest.mark.parametrize("name", FUSED)
def test_errors_are_those_of_eager(name: str, batch: int, tokens: int, width: int, dtype: torch.dtype) -> None:
    layer = made(name, width)
    x = packed(layer, batch, tokens, dtype)
    gradient = torch.randn(batch, tokens, layer.dim, device="cuda").to(dtype)
    if name in PROJECTED and dtype == torch.float32:
        with pytest.raises(UnsupportedError, match="projections take half precision"):
            run(layer, x, "fused", gradient)
        return
    found = run(layer, x, "fused", gradient)
    eager = run(layer, x, "eager", gradient)
    truth = run(layer.double(), x.double(), "eager", gradient.double())
    for fused, usual, exact in zip(found, eager, truth, strict=True):
        assert fused.dtype == usual.dtype
        assert fused.isfinite().all()
        if exact.norm() > 0:
            floor = 2e-6 if dtype == torch.float32 else 0.1 * torch.finfo(dtype).eps
            assert error(fused, exact) <= 1.5 * error(usual, exact) + floor


@pytest.mark.parametrize("tokens", [196, 3000])
@pytest.mark.parametrize("name", FUSED)
def test_the_same_bits_twice(name: str, tokens: int) -> None:
    layer = made(name)
    x = packed(layer, 2, tokens, torch.bfloat16)
    first = run(layer, x, "fused")
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(layer, x, "fused"), strict=True))


@pytest.mark.parametrize("name", FUSED)
def test_long_vectors_in_float16(name: str) -> None:
    layer = made(name)
    x = (torch.rand(1, 16384, 3 * layer.dim, device="cuda") * 120 - 60).half()
    x[:, ::2] = x[:, ::2].sign() * 60
    found = run(layer, x, "fused")
    truth = run(layer.double(), x.double(), "eager")
    for y, exact in zip(found, truth, strict=True):
        assert (y.isfinite() | (exact.abs() > 6e4)).all()  # gradients of such vectors may be too large for the type
    assert found[0].isfinite().all()


@pytest.mark.parametrize("kib", [64, 99, 163])
@pytest.mark.parametrize("name", ["ela_hadamard", "performer", "dark", "slay", "ela_sum"])
def test_a_gpu_with_less_shared_memory(name: str, kib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """T4, RTX and A100 have so much: smaller blocks are taken, and the errors are those of eager."""
    monkeypatch.setattr(launch, "shared_memory", lambda device: kib * 1024)
    for library in (positive_library, projected_library, moments_library):
        library._prepared_forward.cache_clear()
        library._prepared_backward.cache_clear()
    layer = made(name)
    x = packed(layer, 2, 300, torch.float16)
    for fused, eager in zip(run(layer, x, "fused"), run(layer, x, "eager"), strict=True):
        assert error(fused, eager.double()) < 2e-2
    for library in (positive_library, projected_library, moments_library):
        library._prepared_forward.cache_clear()
        library._prepared_backward.cache_clear()


@pytest.mark.parametrize("name", FUSED)
def test_strides_do_not_matter(name: str) -> None:
    layer = made(name, 32)
    x = packed(layer, 2, 15 * 20, torch.float16)
    image = x.transpose(1, 2).reshape(2, -1, 15, 20)  # contiguous: a token's numbers are far apart
    with torch.no_grad(), switch.kernels("fused"):
        expected = layer(x)
        assert torch.equal(layer(image.flatten(2).transpose(1, 2)), expected)
        last = image.to(memory_format=torch.channels_last)
        assert torch.equal(layer(last.flatten(2).transpose(1, 2)), expected)


@pytest.mark.parametrize("name", FUSED)
def test_operator_is_registered_soundly(name: str) -> None:
    layer = made(name, 16).half()
    calls: list[tuple[object, tuple[object, ...]]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.namespace == "visionattn":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Recorder():
        run(layer, packed(layer, 2, 40, torch.float16), "fused")
    assert len(calls) == 2
    for operator, arguments in calls:
        grad = [x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in arguments]
        inputs = grad if len(grad) == len(calls[0][1]) else arguments
        torch.library.opcheck(operator, tuple(inputs), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", FUSED)
def test_training_in_a_whole_compiled_graph(name: str) -> None:
    torch.compiler.reset()
    layer = made(name)
    compiled = torch.compile(layer, fullgraph=True)
    for tokens in (196, 300):
        x = packed(layer, 2, tokens, torch.bfloat16).requires_grad_()
        out = compiled(x)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
        with switch.kernels("fused"):
            usual = layer(x)
            (expected,) = torch.autograd.grad(usual.float().square().sum(), x)
        torch.testing.assert_close(out, usual, rtol=2e-2, atol=2e-2)
        assert error(gradient, expected.double()) < 2e-2


def test_no_compilation_for_another_resolution() -> None:
    from visionattn.ops.fused import positive

    layer = made("ela_hadamard")
    for tokens in (2100, 2112):
        run(layer, packed(layer, 1, tokens, torch.float16), "fused")

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in (positive.forward, positive.backward) for caches in
                   kernel.device_caches.values())  # fmt: skip

    before = compiled()
    for tokens in (2101, 2128, 3000, 4096, 5001):
        run(layer, packed(layer, 1, tokens, torch.float16), "fused")
    assert compiled() == before


@pytest.mark.parametrize("name", FUSED)
def test_capture_in_a_cuda_graph(name: str) -> None:
    layer = made(name)
    x = packed(layer, 1, 3000, torch.bfloat16)
    expected = run(layer, x, "fused")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(layer, x, "fused")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(layer, x, "fused")
    for _ in range(3):
        for y in found:
            y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", FUSED)
def test_activation_checkpointing(name: str) -> None:
    layer = made(name)
    x = packed(layer, 2, 300, torch.bfloat16).requires_grad_()
    with switch.kernels("fused"):
        (expected,) = torch.autograd.grad(layer(x).float().square().sum(), x)
        (found,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).float().square().sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", FUSED)
def test_second_derivative(name: str) -> None:
    layer = made(name, 32)
    x = packed(layer, 1, 60, torch.float16, 0.5)

    def penalty(layer: Attention, x: Tensor, path: switch.Path) -> Tensor:
        x = x.detach().requires_grad_()
        with switch.kernels(path):
            (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
            return torch.autograd.grad(first.float().square().sum(), x)[0]

    found = penalty(layer, x, "fused")
    truth = penalty(layer.double(), x.double(), "eager")
    assert error(found, truth) < 2e-2


class Small(torch.nn.Module):
    """Projections around an attention."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into = torch.nn.Linear(32, 3 * 128)
        self.attention = ATTENTION[name](128, 2, projections=False)
        self.out = torch.nn.Linear(128, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(self.into(x)))


def step(module: torch.nn.Module, x: Tensor, half: bool) -> None:
    """Give each parameter its gradient, by fused kernels."""
    with switch.kernels("fused"), torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        module(x).float().square().mean().backward()


def train_share(rank: int, name: str, half: bool, x: Tensor, folder: str) -> None:
    """Do one step on every second image, in a process of its own, and keep the gradients."""
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    module = DistributedDataParallel(Small(name).cuda())
    step(module, x[rank::2].cuda(), half)
    gradients = {key: parameter.grad.cpu() for key, parameter in module.module.named_parameters()}
    torch.save(gradients, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize(("name", "half"), [("ela_hadamard", False), ("ela_sum", False), ("ela_hadamard", True),
                                            ("dark", True)])  # fmt: skip
def test_two_processes_train_as_one(name: str, half: bool, tmp_path: Path) -> None:
    x = torch.randn(4, 300, 32)
    torch.multiprocessing.spawn(train_share, (name, half, x, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = Small(name).cuda()
    step(whole, x.cuda(), half)
    for key, parameter in whole.named_parameters():
        assert torch.equal(first[key], second[key]), key
        assert parameter.grad.norm() > 0, key
        assert error(first[key], parameter.grad.cpu().double()) < (1e-2 if half else 1e-5), key
