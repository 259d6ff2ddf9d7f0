"""Memory and time against resolution, per attention: of a vision transformer, or of a bare attention layer.

An attention is measured only after its output was compared with that of float32 on the CPU, up to a size that is no
burden there; one that does not fit into memory is a row with a reason.
"""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from visionattn.attention import ATTENTION
from visionattn.deployment.network import Request, load_network
from visionattn.errors import ConfigError, ParityError, suggest
from visionattn.profiling.clock import Milliseconds, on, peak_memory, time_in_turns
from visionattn.profiling.protocols import Keep, Number, Result, deviation, keep_nothing
from visionattn.profiling.steps import ACCEPTED, DTYPES, Attempt, DType, TrainingStep, device_name, infer

DIM, HEADS, PATCH = 384, 6, 16
"""Of a bare layer: its width and heads, and the side in pixels of what is a token."""

MOST_CHECKED = 4096
"""Tokens up to which an output is compared with that on the CPU; beyond, it is only to be finite."""

Step = Literal["inference", "training"]


class MemoryRow(Result):
    """A mechanism at a size.

    Attributes:
        mechanism: name of the attention.
        step: ``inference``, or ``training``: forward, loss, backward and a step of SGD.
        size: (H, W) in pixels.
        tokens: of the patches.
        device: ``cpu``, or the name of the GPU.
        time: of a call.
        peak_memory: bytes above weights and input that it needs; None on the CPU.
        growth: power of the number of tokens that memory grew by since the size before; None where one is not known.
        reason: why there are no figures.
    """

    mechanism: str
    step: Step
    size: tuple[int, int]
    tokens: int
    device: str
    time: Milliseconds | None = None
    peak_memory: int | None = None
    growth: Number | None = None
    reason: str = ""


class MemoryReport(Result):
    """All rows of a run, and what was measured: a model or ``layer``, for one image."""

    subject: str
    dtype: str
    rounds: int
    rows: list[MemoryRow]


@dataclass(frozen=True)
class MemoryPlan:
    """What to measure.

    Attributes:
        mechanisms: names in :data:`~visionattn.attention.ATTENTION`.
        sizes: (H, W) in pixels, measured from the smallest to the largest.
        device: ``cpu`` or a CUDA GPU.
        model: name of a vision transformer of timm; empty for a bare layer of width 384 with 6 heads.
        dtype: of the arithmetic; in training, of autocast.
        train: measure a step of training, too.
        rounds: how many timings of each.

    Raises:
        ConfigError: a name is unknown, a number not positive, a layer's size no multiple of 16, or fp16 to train in.
    """

    mechanisms: Sequence[str]
    sizes: Sequence[tuple[int, int]]
    device: torch.device
    model: str = "vit_small_patch16_224"
    dtype: DType = "fp32"
    train: bool = False
    rounds: int = 20

    def __post_init__(self) -> None:
        for mechanism in self.mechanisms:
            if mechanism not in ATTENTION:
                raise ConfigError(f"mechanism {mechanism!r}; {suggest(mechanism, ATTENTION)}")
        if self.rounds < 1 or not self.mechanisms or not self.sizes:
            raise ConfigError(
                f"got {self.rounds} rounds, {len(self.mechanisms)} mechanisms, {len(self.sizes)} sizes; "
                "expected 1 or more of each"
            )
        wrong = [size for size in self.sizes if not self.model and (size[0] % PATCH or size[1] % PATCH)]
        if wrong:
            raise ConfigError(f"sizes {wrong}: of a bare layer both sides must be multiples of {PATCH}")
        if self.train and self.dtype == "fp16":
            raise ConfigError("a training step in fp16 would need its loss scaled; give bf16 or fp32")

    @property
    def steps(self) -> tuple[Step, ...]:
        """What is done with each."""
        return ("inference", "training") if self.train else ("inference",)


@dataclass(frozen=True)
class _Subject:
    """A network in float32 on the CPU, its input, how many tokens that has, and the loss of its output."""

    module: nn.Module
    inputs: Tensor
    tokens: int
    loss: Callable[[Tensor], Tensor]


def measure_memory(plan: MemoryPlan, keep: Keep = keep_nothing) -> MemoryReport:
    """Measure mechanisms at all sizes: at each, all are loaded first, then timed in turns.

    Raises:
        ConfigError: the model is unknown, or takes no ``attn_layer``.
    """
    if plan.model:
        load_network(Request(plan.model, model_kwargs={"attn_layer": plan.mechanisms[0]}))
    rows: list[MemoryRow] = []
    with on(plan.device):
        for step in plan.steps:
            for size in tqdm(sorted(plan.sizes, key=math.prod), step, disable=None):
                rows += _at_size(plan, step, size)
                keep(rows)
                gc.collect()
                if plan.device.type == "cuda":
                    torch.cuda.empty_cache()
    return MemoryReport(
        subject=plan.model or "layer", dtype=plan.dtype, rounds=plan.rounds, rows=[_grown(row, rows) for row in rows]
    )


def _at_size(plan: MemoryPlan, step: Step, size: tuple[int, int]) -> list[MemoryRow]:
    """Measure all mechanisms at a size."""
    entries = [_entered(plan, mechanism, step, size) for mechanism in plan.mechanisms]
    times = time_in_turns([attempt for _, attempt in entries], plan.device, plan.rounds)
    return [
        row.model_copy(update={"reason": attempt.reason, "peak_memory": None} if attempt.reason else {"time": took})
        for (row, attempt), took in zip(entries, times, strict=True)
    ]


def _entered(plan: MemoryPlan, mechanism: str, step: Step, size: tuple[int, int]) -> tuple[MemoryRow, Attempt]:
    """Return a row without a time, and what is to be timed; a failure so far is among its reasons."""
    opening = Attempt(lambda _: _opened(plan, mechanism, step, size))
    tokens, memory, call = opening() or (size[0] * size[1] // PATCH**2, None, None)
    device = device_name(plan.device)
    row = MemoryRow(mechanism=mechanism, step=step, size=size, tokens=tokens, device=device, peak_memory=memory)
    return row, Attempt(call) if call else opening


def _opened(
    plan: MemoryPlan, mechanism: str, step: Step, size: tuple[int, int]
) -> tuple[int, int | None, Callable[[int], Any]]:
    """Build and check a mechanism's network; return its tokens, peak memory in bytes, and the call to be timed."""
    subject = _layer(mechanism, size) if not plan.model else _transformer(plan.model, mechanism, size)
    if step == "training":
        module, inputs = subject.module.to(plan.device), subject.inputs.to(plan.device)
        training = TrainingStep(module, inputs, subject.loss, plan.dtype)
        training.check()
        return subject.tokens, peak_memory(training, plan.device), training
    small = subject.tokens <= MOST_CHECKED
    expected = infer(subject.module, subject.inputs) if small else None
    dtype = DTYPES[plan.dtype]
    module, inputs = subject.module.to(plan.device, dtype), subject.inputs.to(plan.device, dtype)
    _check(infer(module, inputs).float().cpu(), expected, plan.dtype)
    memory = peak_memory(lambda: infer(module, inputs), plan.device)
    return subject.tokens, memory, lambda _: infer(module, inputs)


def _layer(mechanism: str, size: tuple[int, int]) -> _Subject:
    tokens = size[0] * size[1] // PATCH**2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = ATTENTION[mechanism](DIM, HEADS).eval()
        inputs = torch.randn(1, tokens, DIM)
    return _Subject(layer, inputs, tokens, lambda output: output.float().square().mean())


def _transformer(model: str, mechanism: str, size: tuple[int, int]) -> _Subject:
    network = load_network(Request(model, size, model_kwargs={"attn_layer": mechanism}))
    bare: Any = network.truth.model
    tokens = size[0] * size[1] // network.info.stride**2
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    return _Subject(bare, images, tokens, lambda logits: -logits.float().log_softmax(-1)[:, 0].mean())


def _check(found: Tensor, expected: Tensor | None, dtype: DType) -> None:
    """Raise a ParityError if an output is far from that expected, or not finite."""
    error = 0.0 if expected is None else deviation(found, expected)[0]
    if not found.isfinite().all() or not error <= ACCEPTED[dtype]:
        raise ParityError(
            f"not timed: the output differs from that of float32 on the CPU by {error:.1e} (relative L2), or is not "
            f"finite; accepted for {dtype}: {ACCEPTED[dtype]:g}"
        )


def _grown(row: MemoryRow, rows: Sequence[MemoryRow]) -> MemoryRow:
    """Return a row with the growth of its memory since the size before."""
    own = [other for other in rows if (other.mechanism, other.step) == (row.mechanism, row.step)]
    before = [other for other in own if other.tokens < row.tokens]
    if not before or not before[-1].peak_memory or not row.peak_memory:
        return row
    growth = math.log(row.peak_memory / before[-1].peak_memory) / math.log(row.tokens / before[-1].tokens)
    return row.model_copy(update={"growth": growth})
