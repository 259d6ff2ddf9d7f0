"""Exporting: load, capture, write, verify, and only then move into place."""

import glob
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from visionattn.deployment.formats import FORMATS, Format, format_of
from visionattn.deployment.formats.engines import source_of
from visionattn.deployment.graph import BuildOptions, Graph
from visionattn.deployment.info import ModelInfo
from visionattn.deployment.network import Network, Request, load_network
from visionattn.deployment.parity import HALF_LIMIT, Parity
from visionattn.deployment.quantize import Calibration
from visionattn.deployment.session import Place, Session, TorchSession
from visionattn.deployment.verify import compare, half_range, photographs, trials_of
from visionattn.errors import (
    ConfigError,
    ExportError,
    HardwareError,
    ParityError,
    UnsupportedError,
    VisionAttnError,
    suggest,
)

Check = Callable[[Session, Session], Any]
"""Of the weights in float32 and of the file: raises if the file will not do."""


@dataclass(frozen=True)
class Exported:
    """A file that was written and found right.

    Attributes:
        path: the file, or the folder of OpenVINO.
        info: what it tells of itself.
        parity: how far it is from the weights.
        why: why the file cannot run here, so that its ONNX graph was compared in its place; empty if it was run.
        peak: the float16 value of largest magnitude in a graph of half precision, and that magnitude.
        kept: parts of an int8 network that stayed in float32.
        checked: what the caller's own check returned.
        writing: seconds that it took to write the file.
        verifying: seconds that it took to verify it.
    """

    path: Path
    info: ModelInfo
    parity: Parity
    why: str
    peak: tuple[str, float] | None
    kept: list[str]
    checked: Any
    writing: float
    verifying: float


def export(
    request: Request,
    form: str,
    output: Path | None = None,
    calibration: Calibration | None = None,
    build: BuildOptions | None = None,
    check: Check | None = None,
) -> Exported:
    """Write a network in another format and verify the result against the weights.

    Args:
        request: what to export.
        form: a name in :data:`~visionattn.deployment.formats.FORMATS`.
        output: file to write; None for one beside the weights, named like them.
        calibration: images to quantise by; for int8.
        build: how to build an engine.
        check: called before the verified file gets its final name; what it raises stops that.

    Raises:
        ConfigError: an option does not fit.
        UnsupportedError: the format cannot hold the network, or a package is missing.
        ExportError: the network cannot be captured or written.
        ParityError: the file computes something else than the weights. As with every other error, nothing is left under
            the final name, nor changed there.
    """
    if form not in FORMATS:
        raise ConfigError(f"format {form!r}; {suggest(form, FORMATS)}")
    writer = FORMATS[form]
    _check(request, form, writer, calibration)
    path = (output or default_path(request, writer)).absolute()
    if not path.name.endswith(writer.suffix) or format_of(path) is not writer:
        raise ConfigError(f"output {path}: names of {form} end in {writer.suffix}, by which its runtime is found")
    network = load_network(request)
    try:
        return _exported(network, writer, form, path, calibration, build, check)
    except ParityError as error:
        raise ParityError(f"{error}. Nothing was written") from error


def _exported(
    network: Network,
    writer: Format,
    form: str,
    path: Path,
    calibration: Calibration | None,
    build: BuildOptions | None,
    check: Check | None,
) -> Exported:
    build = build or BuildOptions()
    if writer.of_hardware:
        network = replace(network, info=_limited(network.info, build))
    with _staged(path, writer.is_folder) as staged:
        started = time.perf_counter()
        graph = Graph(network, staged.parent, calibration, build)
        _write(writer, form, graph, staged)
        written = time.perf_counter()
        session, why = _opened(writer, staged, graph)
        if session.info.updated(opset=None) != ModelInfo.model_validate_json(network.info.model_dump_json()):
            raise ParityError(f"{path.name} does not tell of itself what was asked for: {session.info}")
        parity = compare(network, session, calibration.judging if calibration else photographs)
        parity.check(path.name)
        peak = _peak(graph, path) if network.info.precision == "fp16" and writer.of_onnx else None
        checked = check(TorchSession(network.truth, network.info, Place("cpu")), session) if check else None
        done = time.perf_counter()
    return Exported(
        path=path,
        info=session.info,
        parity=parity,
        why=why.replace(str(staged), path.name),  # the user knows the file by its final name
        peak=peak,
        kept=graph.kept,
        checked=checked,
        writing=written - started,
        verifying=done - written,
    )


def default_path(request: Request, writer: Format) -> Path:
    """Return where an export goes unless told: beside the weights, or ``runs/export`` for what has none."""
    weights = Path(request.weights)
    known = weights.suffix in (".pt", ".safetensors")
    stem = weights.stem if known or weights.suffix in (".yaml", ".yml") else weights.name  # names of timm have dots
    precision = "" if request.precision == "fp32" else f"-{request.precision}"
    return (weights.parent if known else Path("runs/export")) / f"{stem}{precision}{writer.suffix}"


def _check(request: Request, form: str, writer: Format, calibration: Calibration | None) -> None:
    if request.precision not in writer.precisions:
        raise UnsupportedError(
            f"{form} holds {', '.join(writer.precisions)}; got {request.precision}; choose another format"
        )
    if request.nms == "embedded" and not writer.embeds_nms:
        raise UnsupportedError(f"{form} has no operation for nms=embedded; use none, free or peaks, or another format")
    if (request.precision == "int8") != (calibration is not None):
        raise ConfigError("int8 needs images to calibrate by, and nothing else does: give --calibrate DATA with int8")


def _limited(info: ModelInfo, build: BuildOptions) -> ModelInfo:
    """Return the description of an engine, which has a largest batch and size where it is dynamic."""
    H, W = info.size
    most = build.max_size or (2 * H, 2 * W)
    if most[0] < H or most[1] < W:
        raise ConfigError(f"max_size {most} is below the size {info.size}; give one as large or larger")
    return info.updated(
        max_batch=max(build.max_batch, info.batch) if "batch" in info.dynamic else None,
        max_size=most if "size" in info.dynamic else None,
    )


def _write(writer: Format, form: str, graph: Graph, path: Path) -> None:
    try:
        writer.write(graph, path)
    except (VisionAttnError, OSError):
        raise
    except Exception as error:  # writers raise what they like
        raise ExportError(f"{form}: {graph.info.model} cannot be written: {type(error).__name__}: {error}") from error


def _opened(writer: Format, path: Path, graph: Graph) -> tuple[Session, str]:
    """Open the file, or the ONNX graph that it was made of where its runtime has no hardware here."""
    try:
        return writer.open_session(path, Place("" if writer.of_hardware else "cpu")), ""
    except HardwareError as error:
        return FORMATS["onnx"].open_session(source_of(graph), Place("cpu")), str(error)


def _peak(graph: Graph, path: Path) -> tuple[str, float]:
    """Return the largest magnitude that float16 has to hold, and where."""
    sizes = {size for _, size in trials_of(graph.info)}
    found = [half_range(graph.onnx_file, photographs(graph.info, graph.info.batch, size)) for size in sizes]
    name, peak = max(found, key=lambda each: (each[1] != each[1], each[1]))
    if not peak <= HALF_LIMIT:
        raise ParityError(f"{path.name}: {name} overflows float16 on photographs; export it in fp32")
    return name, peak


@contextmanager
def _staged(path: Path, is_folder: bool) -> Iterator[Path]:
    """Give a path to write to, in a folder beside the final one; move it into place unless something is raised."""
    if path.exists() and path.is_dir() != is_folder:
        raise ConfigError(f"output {path} is there already and of another kind; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        process = left.name.split(".")[-2]
        if process.isdigit() and not _alive(int(process)):  # of an export that was killed
            shutil.rmtree(left, ignore_errors=True)
    folder = path.with_name(f".{path.name}.{os.getpid()}.partial")
    folder.mkdir()
    try:
        yield folder / path.name
        if path.is_dir():  # a folder does not replace another
            path.replace(folder / "old")
        (folder / path.name).replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk has no name
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
