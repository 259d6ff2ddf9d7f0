"""Latency of whole models: runtimes side by side in one run, in turns, bare and end to end.

Forward is the network alone, on a random image that lies ready as its input, in its type and memory format. End to end
begins with a photograph as a camera gives it and ends with boxes or probabilities: pre-processing, forward, decoding
and suppression. What does not compute what the weights compute in float32, or fails, is a row with a reason and
no times.
"""

import gc
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from visionattn.errors import ConfigError
from visionattn.profiling.clock import Milliseconds, on, time_in_turns
from visionattn.profiling.protocols import Keep, Number, Result, keep_nothing
from visionattn.profiling.runtimes import (
    COMPILED_TRAINING,
    TRAINING,
    Conditions,
    Subject,
    known_runtimes,
    open_candidate,
    open_subject,
    precision_of,
)
from visionattn.profiling.steps import Attempt, device_name


class LatencyRow(Result):
    """A model in a runtime.

    Attributes:
        model: name or weights.
        parameters: how many; of a detector with batch normalisation folded. None of an exported file.
        runtime: see :data:`~visionattn.profiling.runtimes.RUNTIMES`; int8 has all convolutions and matrix products
            quantised. ``torch-train`` is a step of training, ``torch-train-compiled`` of the compiled model; of an
            exported file it is its format.
        size: (H, W) of the input.
        batch: images of a batch.
        forward: the bare network.
        end_to_end: from pictures to results.
        found: boxes that the end to end call found, or 0.
        attention: timm's ``attn_layer``; empty for the model's own.
        device: ``cpu``, or the name of the GPU.
        precision: of the arithmetic; of training, that of autocast.
        train: forward, loss, backward and a step of SGD.
        peak_memory: bytes above weights and input that forward or training needs; None on the CPU and outside torch.
        error: largest difference to the weights in float32 on a photograph, relative to the largest; None of int8, of
            training, and of files whose weights are not there.
        reason: why there are no times.
    """

    model: str
    parameters: int | None
    runtime: str
    size: tuple[int, int]
    batch: int
    forward: Milliseconds | None = None
    end_to_end: Milliseconds | None = None
    found: int | None = None
    attention: str = ""
    device: str = "cpu"
    precision: str = "fp32"
    train: Milliseconds | None = None
    peak_memory: int | None = None
    error: Number | None = None
    reason: str = ""


class LatencyReport(Result):
    """All rows of a run, and how it was measured."""

    threads: int
    rounds: int
    rows: list[LatencyRow]


@dataclass(frozen=True)
class Sweep:
    """What to time: the product of all.

    Attributes:
        models: weights, names, yamls, exported files.
        attentions: timm's ``attn_layer``, to build each model with; the model's own if empty.
        runtimes: of weights; all that suit the device if empty. An exported file has its own.
        sizes: (H, W) of the input; as trained or exported if empty.
        batches: images of a batch.
        train: time a step of training of models of timm, too.
        train_compiled: and one of the compiled model.
        rounds: how many timings of each.

    Raises:
        ConfigError: a number is not positive, or there is no model.
    """

    models: Sequence[str]
    attentions: Sequence[str] = ()
    runtimes: Sequence[str] = ()
    sizes: Sequence[tuple[int, int]] = ()
    batches: Sequence[int] = (1,)
    train: bool = False
    train_compiled: bool = False
    rounds: int = 60

    def __post_init__(self) -> None:
        if not self.models or self.rounds < 1 or not self.batches or min(self.batches) < 1:
            raise ConfigError(
                f"got {len(self.models)} models, {self.rounds} rounds, batches {list(self.batches)}; "
                "expected 1 or more of each"
            )

    @property
    def trainings(self) -> tuple[str, ...]:
        """What stands in the place of a runtime, of steps of training."""
        return (TRAINING,) * self.train + (COMPILED_TRAINING,) * self.train_compiled


@dataclass
class _Entry:
    row: LatencyRow
    attempts: dict[str, Attempt]


def measure_latency(sweep: Sweep, conditions: Conditions, keep: Keep = keep_nothing) -> LatencyReport:
    """Time models in several runtimes.

    For a size and a batch, all are loaded first; then every round times each of them once, forward and end to end, in a
    new order, so that a change of the machine's speed meets all alike. Detectors with an NMS-free head run the other
    one, whose overlaps are suppressed afterwards, as Ultralytics does unless told. Of files with a fixed batch, batches
    are filled up and split.

    Args:
        sweep: what.
        conditions: how, all alike.
        keep: takes the rows so far.

    Raises:
        ConfigError: a runtime is unknown, unsuitable or not calibrated; nothing can be trained.
        VisionAttnError: a model cannot be loaded at all.
    """
    if conditions.threads:
        torch.set_num_threads(conditions.threads)
    runtimes = known_runtimes(sweep.runtimes, conditions)
    attentions = sweep.attentions or [""]
    subjects = [open_subject(*pair, conditions) for pair in itertools.product(sweep.models, attentions)]
    if sweep.trainings and not any(subject.trainable for subject in subjects):
        raise ConfigError(f"--train is for classifiers of timm; got {', '.join(sweep.models)}: leave it out")
    config: Any = torch._dynamo.config
    rows, sizes = list[LatencyRow](), sweep.sizes or (None,)
    # Models of one class share the cache of their forward's compilations, which is made for a few.
    with config.patch(recompile_limit=256, accumulated_recompile_limit=2048), on(conditions.device):
        for size, batch in itertools.product(sizes, sweep.batches):
            planned = list(_planned(subjects, runtimes, sweep.trainings))
            rows += _measure(planned, size, batch, sweep.rounds, conditions)
            keep(rows)
            _forget(conditions.device)
    return LatencyReport(threads=torch.get_num_threads(), rounds=sweep.rounds, rows=rows)


def _planned(
    subjects: Sequence[Subject], runtimes: Sequence[str], trainings: Sequence[str]
) -> Iterator[tuple[Subject, str]]:
    for subject in subjects:
        if subject.exported:
            yield subject, subject.runtime
            continue
        yield from ((subject, runtime) for runtime in runtimes)
        if subject.trainable:
            yield from ((subject, training) for training in trainings)


def _measure(
    planned: Sequence[tuple[Subject, str]],
    size: tuple[int, int] | None,
    batch: int,
    rounds: int,
    conditions: Conditions,
) -> list[LatencyRow]:
    """Load, check and time all contenders of a size and a batch."""
    with tempfile.TemporaryDirectory() as folder:
        entries = [
            _entered(subject, runtime, size or subject.info.size, batch, conditions, Path(folder) / str(index))
            for index, (subject, runtime) in enumerate(tqdm(planned, f"loading, {size or ''} x {batch}", disable=None))
        ]
        attempts = [attempt for entry in entries for attempt in entry.attempts.values()]
        times = iter(time_in_turns(attempts, conditions.device, rounds))
    return [_timed(entry, {field: next(times) for field in entry.attempts}) for entry in entries]


def _entered(
    subject: Subject, runtime: str, size: tuple[int, int], batch: int, conditions: Conditions, folder: Path
) -> _Entry:
    row = LatencyRow(
        model=subject.weights,
        parameters=subject.parameters,
        runtime=runtime,
        size=size,
        batch=batch,
        attention=subject.attention,
        device=device_name(conditions.device),
        precision=precision_of(subject, runtime, conditions),
    )
    opening = Attempt(lambda _: open_candidate(subject, runtime, size, batch, conditions, folder))
    candidate = opening()
    if candidate is None:
        return _Entry(row.model_copy(update={"reason": opening.reason}), {})
    attempts = {field: Attempt(call) for field, call in candidate.calls.items()}
    return _Entry(LatencyRow(**row.model_dump() | candidate.facts), attempts)


def _timed(entry: _Entry, times: dict[str, Milliseconds]) -> LatencyRow:
    reason = next((attempt.reason for attempt in entry.attempts.values() if attempt.reason), "")
    return entry.row.model_copy(update={"reason": reason, "peak_memory": None} if reason else times)


def _forget(device: torch.device) -> None:
    """Give back what contenders of a size and batch took."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
