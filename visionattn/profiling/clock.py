"""Time, memory and what a device can do at best: the clock of all that is measured in speed.

Contenders are timed in turns, in a new order every round, so that a change of the machine's speed meets all alike.
On a GPU, by CUDA events of the current stream; on the CPU, by the clock on the wall.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from visionattn.profiling.protocols import Number, Result

WARM_UP = 5
"""Rounds that are not counted."""

Within = Callable[[], AbstractContextManager[Any]]
"""Makes a context to call something in."""


class Milliseconds(Result):
    """Median and the 5th and 95th percentiles of timings, in milliseconds."""

    median: Number
    p5: Number
    p95: Number

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Milliseconds":
        low, middle, high = np.percentile(np.asarray(seconds) * 1e3, (5, 50, 95))
        return cls(median=middle, p5=low, p95=high)

    def per(self, count: int) -> "Milliseconds":
        """Return the time of one of ``count`` equal parts."""
        return Milliseconds(median=self.median / count, p5=self.p5 / count, p95=self.p95 / count)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a GPU is the current one, whose stream events are recorded on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def time_in_turns(
    calls: Sequence[Callable[[int], Any]],
    device: torch.device,
    rounds: int,
    warm_up: int = WARM_UP,
    within: Sequence[Within] | None = None,
) -> list[Milliseconds]:
    """Time contenders in turns: every round calls each of them once, in a new random order.

    On the CPU, a contender is called once untimed before each timed call: it does not pay for the caches that another
    one has filled. On a GPU it is called once; its inputs, rotated, should be larger than the cache.

    Args:
        calls: contenders. Each is given a number that is one higher at every call of any of them, to rotate its inputs
            by: no two calls in succession are of the same inputs.
        device: where they run.
        rounds: how many timings of each.
        warm_up: rounds before those, not counted.
        within: for each contender, what makes the context that it is called in; entering it is not timed.

    Returns:
        The time of a call of each contender, in their order.
    """
    order = np.random.default_rng(0)
    seconds: list[list[float]] = [[] for _ in calls]
    number = 0
    for turn in range(warm_up + rounds):
        for index in order.permutation(len(calls)):
            with within[index]() if within else nullcontext():
                if device.type == "cpu":
                    calls[index](number)
                    number += 1
                took = _timed(calls[index], number, device)
                number += 1
            if turn >= warm_up:
                seconds[index].append(took)
    return [Milliseconds.of(of_one) for of_one in seconds]


def host_time(
    call: Callable[[int], Any], device: torch.device, rounds: int, in_a_row: int, within: Within
) -> Milliseconds:
    """Return the time that a call from Python keeps a thread, of many calls in a row that no one waits for.

    It is what a training loop pays for a call while the GPU has enough to do: Python, PyTorch and the launches. If the
    GPU's queue fills up, the thread waits, and it is the GPU's time.

    Args:
        call: given the number of the call, to rotate its inputs by.
        device: a GPU.
        rounds: how many timings.
        in_a_row: calls of each.
        within: makes the context that they are in; entering it is not timed.
    """
    seconds = []
    for _ in range(WARM_UP + rounds):
        with within():
            torch.cuda.synchronize(device)
            started = time.perf_counter()
            for number in range(in_a_row):
                call(number)
            seconds.append((time.perf_counter() - started) / in_a_row)
    torch.cuda.synchronize(device)
    return Milliseconds.of(seconds[WARM_UP:])


class Graphed:
    """A call over K sets of inputs, captured as one CUDA graph: what the GPU does, without launches from Python.

    Calling it replays all K; its time is to be divided by ``len()``. The call may take gradients, by
    ``torch.autograd.grad``. Outputs are kept apart, so that none is written where another one still is in the cache.

    Args:
        call: given the tensors of a set.
        sets: K sets of CUDA tensors; the graph reads them where they are.
        warm_up: calls of each set before the capture, on a stream beside.
        pool: of ``torch.cuda.graph_pool_handle``, to share memory with graphs that are replayed one after another.

    Attributes:
        outputs: what the call returned for each set, filled by every replay.
    """

    def __init__(
        self, call: Callable[..., Any], sets: Sequence[Sequence[Tensor]], warm_up: int = 3, pool: Any = None
    ) -> None:
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for inputs in [*sets] * warm_up:
                call(*inputs)
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.outputs = [call(*inputs) for inputs in sets]

    def __len__(self) -> int:
        return len(self.outputs)

    def __call__(self, number: int = 0) -> None:
        """Replay all sets; the number that :func:`time_in_turns` gives is without effect."""
        self.graph.replay()


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return the bytes that a call needs at most, above what is allocated before it; None on the CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def copy_bandwidth(device: torch.device, rounds: int = 20) -> float:
    """Return the bytes read and written in a second by a large copy within a device's memory, median."""
    size = 2**29 if device.type == "cuda" else 2**26
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (took,) = time_in_turns([lambda _: target.copy_(source)], device, rounds)
    return 2 * size / (took.median * 1e-3)


def matrix_rate(device: torch.device, dtype: torch.dtype, rounds: int = 20) -> float:
    """Return the floating-point operations in a second of a large product of random square matrices, median."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    (took,) = time_in_turns([lambda _: a @ b], device, rounds)
    return 2 * side**3 / (took.median * 1e-3)


class Floor(Result):
    """The least time that a device needs for a piece of work.

    Attributes:
        milliseconds: the larger of the time to move the bytes and that to do the operations.
        bound: which of the two it is.
    """

    milliseconds: Number
    bound: Literal["bytes", "operations"]


def floor(moved: float, operations: float, bandwidth: float, rate: float) -> Floor:
    """Return the floor of moving bytes, at :func:`copy_bandwidth`, and doing operations, at :func:`matrix_rate`."""
    moving, doing = moved / bandwidth, operations / rate
    return Floor(milliseconds=max(moving, doing) * 1e3, bound="bytes" if moving >= doing else "operations")


def _timed(call: Callable[[int], Any], number: int, device: torch.device) -> float:
    """Return the seconds of one call."""
    if device.type == "cpu":
        started = time.perf_counter()
        call(number)
        return time.perf_counter() - started
    torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call(number)
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) * 1e-3
