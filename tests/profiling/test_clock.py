"""Contenders are called in turns, and floors are what they are by hand."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from visionattn.profiling.clock import (
    Graphed,
    Milliseconds,
    copy_bandwidth,
    floor,
    matrix_rate,
    peak_memory,
    time_in_turns,
)

CPU = torch.device("cpu")


def test_everyone_is_called_in_every_round_in_an_order_that_changes() -> None:
    called: list[tuple[str, int]] = []

    def contender(name: str) -> Callable[[int], None]:
        return lambda number: called.append((name, number))

    times = time_in_turns([contender(name) for name in "abc"], CPU, rounds=7, warm_up=2)
    assert len(times) == 3
    assert [number for _, number in called] == list(range(2 * 3 * 9))
    names = [name for name, _ in called]
    assert names[::2] == names[1::2]  # once untimed, then timed
    rounds = ["".join(names[start : start + 6 : 2]) for start in range(0, len(names), 6)]
    assert all(sorted(one) == list("abc") for one in rounds)
    assert len(set(rounds)) > 2


def test_the_slower_one_is_slower() -> None:
    slow, fast = time_in_turns([lambda _: time.sleep(2e-3), lambda _: time.sleep(2e-4)], CPU, rounds=9, warm_up=1)
    assert fast.median < slow.median
    assert slow.p5 >= 2
    assert slow.p5 <= slow.median <= slow.p95


def test_a_contender_is_called_within_its_context_alone() -> None:
    inside: list[str] = []

    @contextmanager
    def context(name: str) -> Iterator[None]:
        inside.append(name)
        yield
        inside.pop()

    seen: list[tuple[str, list[str]]] = []
    calls = [lambda _, name=name: seen.append((name, [*inside])) for name in "ab"]
    time_in_turns(calls, CPU, 2, 0, [lambda: context("a"), lambda: context("b")])
    assert len(seen) == 8
    assert all(around == [name] for name, around in seen)


def test_milliseconds() -> None:
    times = Milliseconds.of([0.001, 0.002, 0.003])
    assert times.median == 2
    assert times.per(4) == Milliseconds(median=0.5, p5=times.p5 / 4, p95=times.p95 / 4)


def test_floor_is_the_larger_of_two() -> None:
    moved = floor(3e9, 1e12, bandwidth=3e12, rate=1e15)  # 1 ms of bytes, 1 ms of operations: a draw goes to bytes
    assert (moved.milliseconds, moved.bound) == (1, "bytes")
    done = floor(3e9, 5e12, bandwidth=3e12, rate=1e15)
    assert (done.milliseconds, done.bound) == (5, "operations")


def test_the_rates_of_this_machine_are_plausible() -> None:
    assert 1e8 < copy_bandwidth(CPU, rounds=2) < 1e13
    assert 1e8 < matrix_rate(CPU, torch.float32, rounds=2) < 1e14
    assert peak_memory(lambda: None, CPU) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_computes_outputs_and_gradients() -> None:
    def call(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = x.sin()
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
        return out.detach(), grad

    sets = [(torch.randn(1000, device="cuda", requires_grad=True),) for _ in range(3)]
    graph = Graphed(call, sets)
    with torch.no_grad():
        for (x,) in sets:
            x.normal_()
    (times,) = time_in_turns([graph], torch.device("cuda"), 5)
    assert times.median > 0
    assert len(graph) == 3
    for (x,), (out, grad) in zip(sets, graph.outputs, strict=True):
        torch.testing.assert_close(out, x.detach().sin())
        torch.testing.assert_close(grad, x.detach().cos())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_a_gpu() -> None:
    needed = peak_memory(lambda: torch.empty(2**22, device="cuda").square(), torch.device("cuda"))
    assert needed is not None
    assert needed >= 2 * 2**24
