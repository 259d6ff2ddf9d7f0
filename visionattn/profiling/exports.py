"""Every mechanism through every way out: errors of exported graphs, and engines that are built of them."""

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from visionattn.attention import ATTENTION
from visionattn.deployment.formats.engines import TENSORRT_RTX, build
from visionattn.deployment.formats.onnx import FORMAT as ONNX
from visionattn.deployment.graph import Graph
from visionattn.deployment.network import Network, Request, load_network
from visionattn.deployment.parity import HALF_LIMIT, errors_of
from visionattn.deployment.session import Place
from visionattn.deployment.verify import half_range, photographs
from visionattn.errors import ExportError
from visionattn.profiling.protocols import Number, Result
from visionattn.profiling.subjects import rounded, vit, yolo_lat

SIZES = {"vit": [(224, 224), (224, 320)], "yolo-lat": [(320, 320), (640, 480)]}
LARGE = (1280, 1280)
DEPTH = 4
"""Blocks of the vision transformer at the large size, where every float16 value is kept in memory."""


Make = Callable[..., Network]
"""Of a mechanism, a precision, a size and what is dynamic: a network."""


class GraphRow(Result):
    """Errors of a mechanism's ONNX graph in ONNX Runtime against torch in float32.

    Attributes:
        subject: ``vit`` or ``yolo-lat``.
        mechanism: its name.
        precision: of the graph.
        size: (H, W) in pixels.
        error: largest relative error of the outputs; nan if a value is not finite.
        parts: the same of each part, and of the scores' logits.
        rounding: of float16, the error that rounding queries, keys and values alone makes in a float32 network.
        peak: of float16, the largest magnitude of all float16 values in the graph, of 65504.
        peak_at: its name.
    """

    subject: str
    mechanism: str
    precision: str
    size: tuple[int, int]
    error: Number
    parts: dict[str, Number]
    rounding: Number | None = None
    peak: Number | None = None
    peak_at: str = ""


class DeviceRow(Result):
    """The same module in float16 on a GPU, against float32 there.

    Attributes:
        error: largest relative error of the outputs; nan if a value is not finite.
        parts: the same of each part, and of the scores' logits.
    """

    subject: str
    mechanism: str
    size: tuple[int, int]
    error: Number
    parts: dict[str, Number]


class ParityReport(Result):
    """Errors of all graphs."""

    graphs: list[GraphRow]
    devices: list[DeviceRow]


class EngineRow(Result):
    """An engine that TensorRT-RTX built, or why not.

    Attributes:
        subject: name of the network.
        mechanism: of its attention.
        precision: of the graph.
        nodes: of the ONNX graph.
        layers: of the network that its parser made.
        seconds: of building.
        megabytes: of the engine.
        refused: what the parser or builder says; empty if it built.
    """

    subject: str
    mechanism: str
    precision: str
    nodes: int = 0
    layers: int = 0
    seconds: Number = 0.0
    megabytes: Number = 0.0
    refused: str = ""


class EngineReport(Result):
    """All engines."""

    engines: list[EngineRow]


def measure_parity(
    weights: Path, mechanisms: Sequence[str] = tuple(ATTENTION), large: tuple[int, int] = LARGE, workers: int = 1
) -> ParityReport:
    """Export every mechanism in two networks, run the graphs at several sizes, and compare.

    In float16 the networks are stretched: queries, keys and values have a standard deviation of 4, at 1280 pixels. On a
    GPU the module that is exported is run there too, whole.

    Args:
        weights: a trained ``yolo-lat-n``, whose attention is exchanged.
        mechanisms: names.
        large: (H, W) of the stretched networks' input.
        workers: processes at a time.
    """
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        done = pool.map(partial(_parity_of, weights, large), mechanisms)
        parts = list(tqdm(done, "exporting", len(mechanisms), disable=None))
    return ParityReport(
        graphs=[row for part in parts for row in part.graphs], devices=[row for part in parts for row in part.devices]
    )


def measure_engines(mechanisms: Sequence[str] = tuple(ATTENTION)) -> EngineReport:
    """Build engines of a ViT with every mechanism, and of the YOLO-LATs."""
    rows = [_engine(vit(name, "fp16", (224, 224)), "vit_tiny_patch16_224", name) for name in mechanisms]
    for model in ("yolo-lat-p", "yolo-lat-n", "yolo-lat-s"):
        for precision in ("fp32", "fp16"):
            for dynamic in ((), ("batch", "size")):
                request = Request(model, (320, 320), dynamic=dynamic, precision=precision)
                name = f"{model}, dynamic {', '.join(dynamic)}" if dynamic else model
                rows.append(_engine(load_network(request), name, "ela_hadamard"))
    return EngineReport(engines=rows)


def _parity_of(weights: Path, large: tuple[int, int], mechanism: str) -> ParityReport:
    graphs, devices = list[GraphRow](), list[DeviceRow]()
    for subject, sizes in SIZES.items():
        make = partial(yolo_lat, weights) if subject == "yolo-lat" else vit
        graphs += _exact(make, subject, mechanism, sizes)
        graphs.append(_half(make, subject, mechanism, large))
        if torch.cuda.is_available():
            devices.append(_on_gpu(make, subject, mechanism, large))
    return ParityReport(graphs=graphs, devices=devices)


def _exact(make: Make, subject: str, mechanism: str, sizes: Sequence[tuple[int, int]]) -> Iterable[GraphRow]:
    network = make(mechanism, "fp32", sizes[0], ("batch", "size"))
    with tempfile.TemporaryDirectory() as folder:
        session = ONNX.open_session(Graph(network, Path(folder)).onnx_file, Place("cpu"))
        for size in sizes:
            images = photographs(network.info, 2, size)
            parts = _parts(network, session(images), images)
            what: dict[str, Any] = {"subject": subject, "mechanism": mechanism, "precision": "fp32", "size": size}
            yield GraphRow(**what, error=_worst(parts), parts=parts)


def _half(make: Make, subject: str, mechanism: str, size: tuple[int, int]) -> GraphRow:
    shallow = {"depth": DEPTH} if subject == "vit" else {}
    network = make(mechanism, "fp16", (320, 320), ("batch", "size"), stretched=True, **shallow)
    with tempfile.TemporaryDirectory() as folder:
        file = Graph(network, Path(folder)).onnx_file
        images = photographs(network.info, 1, size)
        parts = _parts(network, ONNX.open_session(file, Place("cpu"))(images), images)
        name, peak = half_range(file, images)
    return GraphRow(
        subject=subject,
        mechanism=mechanism,
        precision="fp16",
        size=size,
        error=_worst(parts) if peak <= HALF_LIMIT else float("nan"),
        parts=parts,
        rounding=_worst(_parts(network, [rounded(network.truth, images)], images)),
        peak=peak,
        peak_at=name,
    )


@torch.inference_mode()
def _on_gpu(make: Make, subject: str, mechanism: str, size: tuple[int, int]) -> DeviceRow:
    network = make(mechanism, "fp16", size, stretched=True)
    images = photographs(network.info, 1, size).cuda()
    found = network.module.cuda()(images)
    network.truth.cuda()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        parts = _parts(network, [found], images)
    return DeviceRow(subject=subject, mechanism=mechanism, size=size, error=_worst(parts), parts=parts)


def _parts(network: Network, found: list[Tensor], images: Tensor) -> dict[str, float]:
    with torch.inference_mode():
        truth = network.truth(images).cpu()
    return {row.part: row.relative for row in errors_of([truth], found, network.info)}


def _worst(parts: dict[str, float]) -> float:
    """Return the largest error of what the network puts out; logits of scores are not."""
    return float(np.max([error for part, error in parts.items() if part != "score logits"]))  # nan if one of them is


def _engine(network: Network, subject: str, mechanism: str) -> EngineRow:
    import onnx

    what: dict[str, Any] = {"subject": subject, "mechanism": mechanism, "precision": network.info.precision}
    with tempfile.TemporaryDirectory() as folder:
        graph = Graph(network, Path(folder))
        nodes = len(onnx.load(str(graph.onnx_file)).graph.node)
        started = time.perf_counter()
        try:
            built = build(TENSORRT_RTX, graph)
        except ExportError as error:
            return EngineRow(**what, nodes=nodes, refused=str(error))
        seconds = time.perf_counter() - started
    return EngineRow(**what, nodes=nodes, layers=built.layers, seconds=seconds, megabytes=len(built.plan) / 1e6)
