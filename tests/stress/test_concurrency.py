"""Fused kernels beside other work on one GPU: the bits of a call alone, and no hang.

Programs of these kernels wait for each other, so that a scenario that goes wrong may never end. Each runs in processes
of its own with a time limit: ``python -m tests.stress.test_concurrency SCENARIO``.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.stress import formulas
from tests.stress.inputs import layer_of
from visionattn.attention import Attention
from visionattn.ops import switch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
LIMIT = 90
"""Seconds of a process; a few of them are the scenario's, the rest imports and compilation."""
ROUNDS = 20
MIXED = [
    *(("ela_hadamard", 9, 9999, 12, 64), ("performer", 1, 16385, 6, 64), ("ela_direction", 2, 4097, 12, 64)),
    *(("ela_hadamard", 1, 65537, 2, 128), ("slay", 2, 4097, 6, 64), ("elu", 1, 1025, 1, 16)),
]
CROWDED = [("ela_hadamard", 64, 4097, 12, 64), ("ela_sum", 96, 2049, 8, 64)]
GRAPHS = [("ela_hadamard", 3, 9999, 12, 64), ("ela_sum", 2, 4097, 6, 64), ("dark", 1, 9999, 6, 64),
          ("ela_hadamard", 128, 196, 6, 64)]  # fmt: skip
FAR = [
    ("ela_hadamard", 1, 2**20, 12, 64, torch.bfloat16),
    ("ela_hadamard", 4096, 600, 6, 64, torch.bfloat16),
    ("elu", 12000, 577, 1, 128, torch.float32),
    ("ela_sum", 8, 2**18, 6, 64, torch.bfloat16),
    ("performer", 2, 2**20, 6, 64, torch.bfloat16),
]
"""Sizes whose packed input has more than 2^31 numbers."""


class Work:
    """A call with its gradient, and the bits that it gives alone."""

    def __init__(self, name: str, batch: int, tokens: int, heads: int, width: int, causal: bool = False) -> None:
        self.name, self.causal = name, causal
        self.layer = layer_of(name, heads, width)
        self.x, self.upstream = packed(batch, tokens, heads * width, torch.bfloat16)
        self.alone = self()

    def __call__(self) -> list[Tensor]:
        return call(self.layer, self.x, self.upstream, self.causal)

    def check(self, found: list[Tensor]) -> None:
        assert all(torch.equal(a, b) for a, b in zip(found, self.alone, strict=True)), f"{self.name}: other bits"


def packed(batch: int, tokens: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw a packed projection and the gradient of the output."""
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    x = torch.randn(batch, tokens, 3 * dim, device=DEVICE, dtype=dtype, generator=generator)
    return x, torch.randn(batch, tokens, dim, device=DEVICE, dtype=dtype, generator=generator)


def call(layer: Attention, x: Tensor, upstream: Tensor, causal: bool = False) -> list[Tensor]:
    """Return the output and the gradient of the packed projection."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf, is_causal=causal)
    return [y.detach(), *torch.autograd.grad(y, leaf, upstream)]


def everything() -> list[Work]:
    causal = [Work("ela_hadamard", 4, 4097, 6, 64, True), Work("elu", 1, 9999, 6, 64, True)]
    return [Work(*shape) for shape in MIXED] + causal


def in_turns(work: list[Work], streams: list[torch.cuda.Stream], beside: Callable[[], Any] | None = None) -> None:
    """Make the calls on streams in turns, with other work on a stream of its own."""
    other = torch.cuda.Stream(priority=-1)
    torch.cuda.synchronize()
    for _ in range(ROUNDS):
        if beside:
            with torch.cuda.stream(other):
                beside()
        found = []
        for number, each in enumerate(work):
            with torch.cuda.stream(streams[number % len(streams)]):
                found.append(each())
        torch.cuda.synchronize()
        for each, parts in zip(work, found, strict=True):
            each.check(parts)


def streams() -> None:
    """Several streams."""
    in_turns(everything(), [torch.cuda.Stream() for _ in range(3)])


def priorities() -> None:
    """A stream that goes before another."""
    in_turns(everything(), [torch.cuda.Stream(priority=0), torch.cuda.Stream(priority=-1)])


def matmuls() -> None:
    """Large products at the same time."""
    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    in_turns(everything(), [torch.cuda.Stream(), torch.cuda.Stream()], lambda: [a @ a for _ in range(3)])


def programs() -> None:
    """More programs than a GPU holds, while another kernel holds all of it for milliseconds."""
    import triton
    import triton.language as tl

    @triton.jit
    def spin(out, turns, size: tl.constexpr):  # type: ignore[no-untyped-def]
        x = tl.arange(0, size).to(tl.float32)
        for _ in range(turns):
            x = x * 1.0000001 + 1e-9
        tl.store(out + tl.program_id(0) * size + tl.arange(0, size), x)

    crowd = 16 * torch.cuda.get_device_properties(DEVICE).multi_processor_count
    out = torch.empty(crowd * 4096, device=DEVICE)
    work = [Work(*shape) for shape in CROWDED] + [Work("ela_hadamard", 96, 577, 8, 64, True)]
    in_turns(
        work, [torch.cuda.Stream(), torch.cuda.Stream()], lambda: spin[(crowd,)](out, 20000, size=4096, num_warps=32)
    )


def graphs() -> None:
    """Captured graphs, replayed on a stream each."""
    work = [Work(*shape) for shape in GRAPHS] + [Work("ela_hadamard", 4, 4097, 6, 64, True)]
    captured = []
    for each in work:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            each()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = each()
        captured.append((graph, found, stream))
    torch.cuda.synchronize()
    for number in range(5 * ROUNDS):
        last = number % 10 == 9
        for graph, found, stream in captured:
            with torch.cuda.stream(stream):
                if last:
                    for part in found:
                        part.fill_(float("nan"))
                graph.replay()
        if last:
            torch.cuda.synchronize()
            for each, (_, found, _) in zip(work, captured, strict=True):
                each.check(found)


def threads() -> None:
    """Threads, each with a stream of its own, that share the layers."""
    work, failures = everything(), []
    torch.cuda.synchronize()

    def go() -> None:
        try:
            stream = torch.cuda.Stream()
            for _ in range(ROUNDS // 4):
                with torch.cuda.stream(stream):
                    found = [each() for each in work]
                stream.synchronize()
                for each, parts in zip(work, found, strict=True):
                    each.check(parts)
        except Exception as error:
            failures.append(error)

    running = [threading.Thread(target=go) for _ in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failures:
        raise failures[0]


def offsets() -> None:
    """Inputs so large that a place in them needs more than 32 bits."""
    for name, batch, tokens, heads, width, dtype in FAR:
        layer = layer_of(name, heads, width)
        x, upstream = packed(batch, tokens, heads * width, dtype)
        y, gradient = call(layer, x, upstream)
        assert y.isfinite().all()
        assert gradient.isfinite().all()

        def head(part: Tensor, heads: int = heads) -> Tensor:
            """The last head of the last image, which lies farthest."""
            return part[-1:].unflatten(-1, (heads, -1))[:, :, -1:].transpose(1, 2).double()

        leaves = [head(part).requires_grad_() for part in x.chunk(3, -1)]
        state = {key: value[..., -1:, :, :] for key, value in layer.state_dict().items()}  # of a head; no map has banks
        exact = formulas.attend(name, state, *leaves)
        truth = [exact, *torch.autograd.grad(exact, leaves, head(upstream))]
        bound = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-4  # a wrong place is off by one
        for found, true in zip((y, *gradient.chunk(3, -1)), truth, strict=True):
            assert (head(found) - true).norm() < bound * true.norm(), f"{name}, {batch} x {tokens} x {heads} x {width}"
        del x, upstream, y, gradient
        torch.cuda.empty_cache()


SCENARIOS = {f.__name__: f for f in (streams, priorities, matmuls, programs, graphs, threads, offsets)}


def started(scenario: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.stress.test_concurrency", scenario]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen[str]) -> None:
    """Wait for processes, and end those that go on too long."""
    end, texts, hung = time.monotonic() + LIMIT * len(processes), [], []
    for process in processes:
        try:
            text, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
            hung.append(process.args)
        texts.append(text[-3000:])
    assert not hung, f"no end after {LIMIT * len(processes)} s: {hung}; {texts}"
    assert all(process.returncode == 0 for process in processes), "\n".join(texts)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_beside_other_work(scenario: str) -> None:
    finish(started(scenario))


def test_two_processes() -> None:
    finish(started("matmuls"), started("programs"))


if __name__ == "__main__":
    with switch.kernels("fused"):
        SCENARIOS[sys.argv[1]]()
