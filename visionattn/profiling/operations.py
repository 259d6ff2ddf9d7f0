"""Speed of attention operations, side by side with softmax attention and with what the device can do at best.

What is timed is the module from the packed projection of all heads to the mixed values, without linear layers, on
N(0, 1) numbers that are new to the cache. A form is timed only after its output and gradient agreed with float64.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from visionattn.attention import ATTENTION
from visionattn.errors import ConfigError
from visionattn.profiling.clock import Floor, Milliseconds, copy_bandwidth, floor, matrix_rate, on
from visionattn.profiling.entrants import FORMS, Direction, Entrant, Form, Shape, entrants, floor_work
from visionattn.profiling.protocols import Keep, Number, Result, keep_nothing
from visionattn.profiling.steps import DTYPES, DType, device_name
from visionattn.profiling.trials import Trial, difference, try_all

MECHANISMS = (
    *("ela_hadamard", "elu", "relu", "ela_sum", "ela_diff", "ela_direction"),
    *("performer", "dark", "slay", "gka"),
)
TOKENS = (196, 400, 1024, 1600, 4096, 6400, 16384)


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        mechanisms: names in :data:`~visionattn.attention.ATTENTION`.
        tokens: numbers N of tokens.
        forms: of the mechanisms.
        backward: measure training too, and what it adds to the forward pass.
        total: tokens of a batch in all: the batch is ``max(1, total // N)``.
        batch: of all N; 0 for that of ``total``.
        heads: of the attention.
        head_dim: width of a head.
        dtype: of inputs and outputs.
        features: random features of performer and dark.
        device: ``cuda`` or ``cpu``.
        rounds: timings of each.
        causal: each token attends to itself and those before it.
    """

    mechanisms: Sequence[str] = MECHANISMS
    tokens: Sequence[int] = TOKENS
    forms: Sequence[Form] = FORMS
    backward: bool = True
    total: int = 65536
    batch: int = 0
    heads: int = 6
    head_dim: int = 64
    dtype: DType = "bf16"
    features: int = 256
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rounds: int = 60
    causal: bool = False

    def shape(self, tokens: int) -> Shape:
        """Return the shape for N tokens."""
        batch = self.batch or max(1, self.total // tokens)
        return Shape(batch, tokens, self.heads, self.head_dim, DTYPES[self.dtype], self.device, self.causal)


class OperationRow(Result):
    """An entrant at a number of tokens.

    Attributes:
        mechanism: its name; ``softmax`` for ``scaled_dot_product_attention``.
        form: ``eager``, ``compiled`` or ``fused``; a backend of softmax.
        tokens: N.
        batch: B.
        direction: ``forward``; ``training``, which is forward and backward; or ``backward``, what training adds to
            forward: medians are subtracted, and its p5 and p95 are the extremes of both.
        error: relative L2 error to float64, of the output, or of the gradient of the input.
        ratio: the error over that of the eager form; the larger one of output and gradient.
        bitwise: whether a second call gave the same bits.
        graph: time of a call within a CUDA graph; None without one.
        call: time of a call from Python.
        host: time that a call keeps Python's thread, of many in a row that no one waits for; None on the CPU.
        peak_memory: bytes at most above the inputs; None on the CPU.
        floor: milliseconds that the device needs at least.
        bound: by ``bytes`` or ``operations``.
        times_floor: time over the floor.
        speedup: time of the fastest backend of softmax over the time.
        reason: why there is no time, or no graph; None if there is.
    """

    mechanism: str
    form: str
    tokens: int
    batch: int
    direction: Direction
    error: Number | None = None
    ratio: Number | None = None
    bitwise: bool | None = None
    graph: Milliseconds | None = None
    call: Milliseconds | None = None
    host: Milliseconds | None = None
    peak_memory: int | None = None
    floor: Number
    bound: Literal["bytes", "operations"]
    times_floor: Number | None = None
    speedup: Number | None = None
    reason: str | None = None

    @property
    def time(self) -> Milliseconds | None:
        """Of the graph, or of the call where there is none."""
        return self.graph or self.call


class OperationsReport(Result):
    """All rows, and what they depend on.

    Attributes:
        device: ``cpu``, or the name of the GPU.
        dtype: of inputs and outputs.
        heads: H.
        head_dim: D.
        features: random features of performer and dark.
        rounds: timings of each.
        causal: whether each token attends to itself and those before it.
        bandwidth: bytes read and written in a second by a copy.
        matrix_rate: floating-point operations in a second of a matrix product.
        rows: see :class:`OperationRow`.
    """

    device: str
    dtype: str
    heads: int
    head_dim: int
    features: int
    rounds: int
    causal: bool = False
    bandwidth: Number
    matrix_rate: Number
    rows: list[OperationRow]


def measure_operations(plan: Plan, keep: Keep = keep_nothing) -> OperationsReport:
    """Measure attention operations in turns; one that fails when it is checked or captured is a row with a reason.

    Raises:
        UnknownNameError: a mechanism is not registered.
        ConfigError: a number is not positive, or there is no such device.
    """
    _check(plan)
    config: Any = torch._dynamo.config
    rows: list[OperationRow] = []
    with on(plan.device):
        bandwidth, rate = copy_bandwidth(plan.device), matrix_rate(plan.device, DTYPES[plan.dtype])
    with on(plan.device), config.patch(recompile_limit=256):  # all mechanisms share the code that is compiled
        for tokens in plan.tokens:
            rows += _measure(plan, plan.shape(tokens), partial(floor, bandwidth=bandwidth, rate=rate))
            keep(rows)
            _forget(plan.device)
    return OperationsReport(
        device=device_name(plan.device),
        dtype=plan.dtype,
        heads=plan.heads,
        head_dim=plan.head_dim,
        features=plan.features,
        rounds=plan.rounds,
        causal=plan.causal,
        bandwidth=bandwidth,
        matrix_rate=rate,
        rows=rows,
    )


def _check(plan: Plan) -> None:
    for name in plan.mechanisms:
        ATTENTION[name]
    numbers = {name: getattr(plan, name) for name in ("total", "heads", "head_dim", "features", "rounds")}
    for name, number in [*numbers.items(), *(("tokens", tokens) for tokens in plan.tokens)]:
        if number < 1:
            raise ConfigError(f"{name}={number}; give at least 1")
    if plan.batch < 0:
        raise ConfigError(f"batch={plan.batch}; give a number of items, or 0 for as many as make up the total")
    if plan.device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: PyTorch finds no GPU; use the device cpu")


def _measure(plan: Plan, shape: Shape, floor_of: Callable[[int, int], Floor]) -> list[OperationRow]:
    """Return the rows of a shape."""
    starters = list(entrants(shape, plan.mechanisms, plan.forms, plan.features))
    trials: dict[Direction, list[Trial]] = {"forward": try_all(shape, "forward", starters, plan.rounds)}
    if plan.backward:
        trials["training"] = try_all(shape, "training", starters, plan.rounds)
        trials["backward"] = list(map(difference, trials["training"], trials["forward"]))
    rows = []
    for direction, found in trials.items():
        softmax = [trial for entrant, trial in zip(starters, found, strict=True) if entrant.mechanism == "softmax"]
        for entrant, trial in zip(starters, found, strict=True):
            least = floor_of(*floor_work(entrant.layer, shape, direction))
            rivals = [rival.median for rival in softmax if rival.median and rival.kind == trial.kind]
            rows.append(_row(entrant, shape, direction, trial, least, min(rivals, default=None)))
    return rows


def _row(
    entrant: Entrant, shape: Shape, direction: Direction, trial: Trial, least: Floor, best: float | None
) -> OperationRow:
    verdict, time = trial.verdict, trial.median
    return OperationRow(
        mechanism=entrant.mechanism,
        form=entrant.form,
        tokens=shape.tokens,
        batch=shape.batch,
        direction=direction,
        error=verdict.error,
        ratio=verdict.ratio,
        bitwise=verdict.bitwise,
        graph=trial.graph,
        call=trial.call,
        host=trial.host,
        peak_memory=verdict.peak,
        floor=least.milliseconds,
        bound=least.bound,
        times_floor=time / least.milliseconds if time else None,
        speedup=best / time if best and time else None,
        reason=trial.reason,
    )


def _forget(device: torch.device) -> None:
    """Free what was compiled and cached for a shape."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
