"""Latency of whole models: runtimes side by side in one run, in turns, bare and end to end.

Forward is the network alone, on a random image that lies ready as its input. End to end begins with a photograph as a
camera gives it and ends with boxes or probabilities: pre-processing, forward, decoding and suppression. Each model is
called in turn with all others, forward first: it meets caches that another model has filled.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from visionattn.errors import ConfigError
from visionattn.export import Runner
from visionattn.export.formats import FORMATS
from visionattn.export.graph import Graph
from visionattn.export.network import Network, Request, load_network
from visionattn.export.quantize import Calibration
from visionattn.export.runner import runner_of
from visionattn.export.session import Place, Session, TorchSession
from visionattn.export.verify import piece
from visionattn.profiling.protocols import Number, Result

Runtime = Literal["torch", "torch-compiled", "onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8"]
RUNTIMES: tuple[Runtime, ...] = (
    "torch",
    "torch-compiled",
    "onnxruntime",
    "onnxruntime-int8",
    "openvino",
    "openvino-int8",
)

WARM_UP = 5
"""Rounds that are not counted."""

PICTURE = (480, 640)
"""(H, W) of the picture that end to end begins with."""


class Milliseconds(Result):
    """Median and the 5th and 95th percentiles of a batch."""

    median: Number
    p5: Number
    p95: Number

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Milliseconds":
        low, middle, high = np.percentile(np.asarray(seconds) * 1e3, (5, 50, 95))
        return cls(median=middle, p5=low, p95=high)


class LatencyRow(Result):
    """A model in a runtime.

    Attributes:
        model: name or weights.
        parameters: how many; of a detector with batch normalisation folded.
        runtime: see :data:`RUNTIMES`; int8 has all convolutions and matrix products quantised.
        size: (H, W) of the input.
        batch: images of a batch.
        forward: the bare network.
        end_to_end: from pictures to results.
        found: boxes that the end to end call found, or 0.
    """

    model: str
    parameters: int
    runtime: str
    size: tuple[int, int]
    batch: int
    forward: Milliseconds
    end_to_end: Milliseconds
    found: int


class LatencyReport(Result):
    """All rows of a run, and how it was measured."""

    threads: int
    rounds: int
    rows: list[LatencyRow]


@dataclass(frozen=True)
class _Candidate:
    model: str
    parameters: int
    runtime: str
    size: tuple[int, int]
    runner: Runner
    session: Session


def measure_latency(
    models: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    runtimes: Sequence[Runtime] = RUNTIMES,
    batch: int = 1,
    rounds: int = 60,
    threads: int = 0,
    calibration: Calibration | None = None,
) -> LatencyReport:
    """Time models in several runtimes on the CPU.

    All are loaded first; then every round times each of them once, forward and end to end, in a new order, so that a
    change of the machine's speed meets all alike. Files of int8 are not compared with their weights here. Detectors
    with an NMS-free head run the other one, whose overlaps are suppressed afterwards, as Ultralytics does unless told.

    Args:
        models: weights, names or yamls.
        sizes: (H, W) of the input.
        runtimes: which.
        batch: images of a batch.
        rounds: how many timings of each.
        threads: of the CPU; 0 for one a core.
        calibration: images for int8.

    Raises:
        ConfigError: int8 without calibration.
    """
    threads = threads or torch.get_num_threads()
    if calibration is None and any(runtime.endswith("int8") for runtime in runtimes):
        raise ConfigError("int8 needs images to calibrate by; give --calibrate DATA, or leave the int8 runtimes out")
    with tempfile.TemporaryDirectory() as folder:
        candidates = [
            _load(model, size, runtime, batch, threads, calibration, Path(folder) / f"{index}-{size[0]}-{runtime}")
            for index, model in enumerate(models)
            for size in sizes
            for runtime in tqdm(runtimes, f"{model} {size[0]}", disable=None)
        ]
    pictures = [piece(index, PICTURE) for index in range(batch)]
    order = np.random.default_rng(0)
    forward: list[list[float]] = [[] for _ in candidates]
    whole: list[list[float]] = [[] for _ in candidates]
    for number in tqdm(range(rounds + WARM_UP), "timing", disable=None):
        for index in order.permutation(len(candidates)):
            candidate = candidates[index]
            images = torch.rand(batch, 3, *candidate.size)
            one, two = _timed(lambda: candidate.session(images)), _timed(lambda: candidate.runner(pictures))  # noqa: B023
            if number >= WARM_UP:
                forward[index].append(one)
                whole[index].append(two)
    rows = [
        LatencyRow(
            model=c.model,
            parameters=c.parameters,
            runtime=c.runtime,
            size=c.size,
            batch=batch,
            forward=Milliseconds.of(one),
            end_to_end=Milliseconds.of(two),
            found=sum(len(getattr(result, "scores", ())) for result in c.runner(pictures)),
        )
        for c, one, two in zip(candidates, forward, whole, strict=True)
    ]
    return LatencyReport(threads=threads, rounds=rounds, rows=rows)


def _load(
    model: str,
    size: tuple[int, int],
    runtime: Runtime,
    batch: int,
    threads: int,
    calibration: Calibration | None,
    folder: Path,
) -> _Candidate:
    precision: Any = "int8" if runtime.endswith("int8") else "fp32"
    network = load_network(Request(model, size, batch, precision=precision))
    session = _session(network, runtime, threads, calibration, folder)
    parameters = sum(parameter.numel() for parameter in network.truth.parameters())
    return _Candidate(model, parameters, runtime, size, runner_of(session, size), session)


def _session(
    network: Network, runtime: Runtime, threads: int, calibration: Calibration | None, folder: Path
) -> Session:
    place = Place("cpu", threads)
    if runtime == "torch":
        return TorchSession(network.module, network.info, place)
    folder.mkdir()
    if runtime == "torch-compiled":
        # The captured program: models of one class would share, and exhaust, the cache of their forward's compilations.
        compiled: Any = torch.compile(Graph(network, folder).program.module())
        return TorchSession(compiled, network.info, place)
    form = FORMATS["openvino" if runtime.startswith("openvino") else "onnx"]
    path = folder / f"model{form.suffix}"
    form.write(Graph(network, folder, calibration), path)
    return form.open_session(path, place)


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
