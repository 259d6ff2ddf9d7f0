"""Trials of attention operations: judged one by one, then timed in turns, by CUDA graph and call by call."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from visionattn.profiling.clock import Graphed, Milliseconds, host_time, time_in_turns
from visionattn.profiling.entrants import Direction, Entrant, Shape
from visionattn.profiling.judge import Judge, Sets, Verdict
from visionattn.profiling.steps import reason_of

ROTATED, MOST_SETS = 100e6, 256
"""Bytes of inputs that calls rotate through, more than a cache holds; and sets of inputs at most."""

ROW, MOST_IN_A_ROW = 20.0, 20
"""Milliseconds that calls in a row take together; and how many at most, so that a GPU's queue holds their launches."""

DISTURBED = 1.1
"""A graph does what calls do without their launches: of one that takes so many times longer nothing is concluded."""


@dataclass(frozen=True)
class Trial:
    """Of an entrant, in one direction.

    Attributes:
        verdict: whether it is right.
        graph: time of a call within a CUDA graph; None without one.
        call: time of a call from Python; None if it is not right.
        host: time that a call keeps Python's thread, of many in a row; None on the CPU.
        reason: why there is no time, or no graph on a GPU; None if there is.
    """

    verdict: Verdict
    graph: Milliseconds | None = None
    call: Milliseconds | None = None
    host: Milliseconds | None = None
    reason: str | None = None

    @property
    def kind(self) -> Literal["graph", "call"]:
        """Of the time that counts: that of the graph, or of the call where there is none."""
        return "graph" if self.graph else "call"

    @property
    def median(self) -> float | None:
        """The time that counts, in milliseconds."""
        time = self.graph or self.call
        return time.median if time else None


def try_all(shape: Shape, direction: Direction, starters: Sequence[Entrant], rounds: int) -> list[Trial]:
    """Return the trials of entrants, in their order: only those that are right are timed."""
    sets = {n: _sets(shape, n, direction) for n in sorted({entrant.layer.streams for entrant in starters})}
    judge = Judge(direction, sets)
    progress = tqdm(starters, f"{shape.tokens} tokens, {direction}", disable=None, leave=False)
    verdicts = {entrant: _too_large(entrant, shape) or judge(entrant) for entrant in progress}
    fit = [entrant for entrant, verdict in verdicts.items() if verdict.reason is None]
    calls = _call_by_call(fit, direction, sets, shape.device, rounds)
    hosts = _of_host(fit, direction, sets, shape.device, rounds, calls)
    graphs, refused = _graphed(fit, direction, sets, shape.device, rounds)
    for entrant in [e for e, graph in graphs.items() if graph.median > DISTURBED * calls[e].median]:
        refused[entrant] = "no graph: it took longer than calls from Python, so something else had the device"
        del graphs[entrant]
    return [
        Trial(
            verdict,
            graphs.get(entrant),
            calls.get(entrant),
            hosts.get(entrant),
            verdict.reason or refused.get(entrant),
        )
        for entrant, verdict in verdicts.items()
    ]


def difference(training: Trial, forward: Trial) -> Trial:
    """Return what training adds to the forward pass."""
    graph, call = _minus(training.graph, forward.graph), _minus(training.call, forward.call)
    host = _minus(training.host, forward.host)
    lost = None if graph or call else "training took no longer than forward: noise"
    return Trial(training.verdict, graph, call, host, training.reason or forward.reason or lost)


def _minus(whole: Milliseconds | None, part: Milliseconds | None) -> Milliseconds | None:
    """Subtract medians; the percentiles are the extremes of both. None where noise hides the difference."""
    if whole is None or part is None or whole.median <= part.median:
        return None
    return Milliseconds(median=whole.median - part.median, p5=whole.p5 - part.p95, p95=whole.p95 - part.p5)


def _sets(shape: Shape, streams: int, direction: Direction) -> list[tuple[Tensor, Tensor]]:
    """Return sets of a packed projection (B, N, streams x dim), and a gradient of the output (B, N, dim)."""
    count = min(max(2, math.ceil(ROTATED / (streams * shape.stream_bytes))), MOST_SETS)
    generator = torch.Generator(shape.device).manual_seed(streams)

    def draw(width: int) -> Tensor:
        numbers = torch.randn(shape.batch, shape.tokens, width, generator=generator, device=shape.device)
        return numbers.to(shape.dtype)

    def projection() -> Tensor:
        return draw(streams * shape.dim).requires_grad_(direction == "training")

    return [(projection(), draw(shape.dim)) for _ in range(count)]


def _too_large(entrant: Entrant, shape: Shape) -> Verdict | None:
    """Refuse all pairs in memory, three times over in float32, where they would take more than a sixteenth of it."""
    needed = 3 * 4 * shape.batch * shape.heads * shape.tokens**2
    if shape.device.type == "cuda":
        memory = torch.cuda.get_device_properties(shape.device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if entrant.form != "math" or needed <= memory / 16:
        return None
    return Verdict(reason=f"all pairs would take {needed / 1e9:.0f} of {memory / 1e9:.0f} GB")


def _call_by_call(
    fit: Sequence[Entrant], direction: Direction, sets: Sets, device: torch.device, rounds: int
) -> dict[Entrant, Milliseconds]:
    """Time calls from Python, launches and all."""
    calls = [_rotating(entrant, direction, sets) for entrant in fit]
    times = time_in_turns(calls, device, rounds, within=[e.within for e in fit])
    return dict(zip(fit, times, strict=True))


def _of_host(
    fit: Sequence[Entrant],
    direction: Direction,
    sets: Sets,
    device: torch.device,
    rounds: int,
    calls: Mapping[Entrant, Milliseconds],
) -> dict[Entrant, Milliseconds]:
    """Time what a call costs Python's thread; on the CPU, which computes in it, nothing is told apart."""
    if device.type == "cpu":
        return {}
    times = {}
    for entrant in fit:
        in_a_row = int(min(max(1.0, ROW / calls[entrant].median), MOST_IN_A_ROW))
        times[entrant] = host_time(_rotating(entrant, direction, sets), device, rounds, in_a_row, entrant.within)
    return times


def _rotating(entrant: Entrant, direction: Direction, sets: Sets) -> Callable[[int], Any]:
    """Return a call whose inputs its number chooses."""
    own = sets[entrant.layer.streams]
    return lambda number: entrant.run(direction, *own[number % len(own)])


def _graphed(
    fit: Sequence[Entrant], direction: Direction, sets: Sets, device: torch.device, rounds: int
) -> tuple[dict[Entrant, Milliseconds], dict[Entrant, str]]:
    """Time calls within CUDA graphs, over all sets each, and tell why others have none; no graphs on the CPU."""
    if device.type == "cpu":
        return {}, {}
    pool = torch.cuda.graph_pool_handle()
    graphs: dict[Entrant, Graphed] = {}
    refused: dict[Entrant, str] = {}
    for entrant in fit:
        try:
            with entrant.within():
                graphs[entrant] = Graphed(partial(entrant.run, direction), sets[entrant.layer.streams], pool=pool)
        except Exception as error:  # whatever cannot be captured, or finds no memory
            refused[entrant] = f"no graph: {reason_of(error)}"
    times = time_in_turns(list(graphs.values()), device, rounds)
    return {e: time.per(len(graph)) for (e, graph), time in zip(graphs.items(), times, strict=True)}, refused
