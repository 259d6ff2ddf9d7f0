"""Exporting: load, capture, write, verify, and only then move into place."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from visionattn.errors import ConfigError, ExportError, ParityError, UnsupportedError, VisionAttnError, suggest
from visionattn.export.formats import FORMATS, Format
from visionattn.export.formats.engines import source_of
from visionattn.export.graph import BuildOptions, Graph
from visionattn.export.info import ModelInfo
from visionattn.export.network import Request, load_network
from visionattn.export.parity import HALF_LIMIT, Parity
from visionattn.export.quantize import Calibration
from visionattn.export.session import Place, Session
from visionattn.export.verify import compare, half_range, photographs


@dataclass(frozen=True)
class Exported:
    """A file that was written and found right.

    Attributes:
        path: the file, or the folder of OpenVINO.
        info: what it tells of itself.
        parity: how far it is from the weights.
        ran: what was compared: the ``file`` itself, or its ``graph`` in ONNX Runtime where the file cannot run here.
        why: why the file cannot run here.
        peak: the float16 value of largest magnitude in a graph of half precision, and that magnitude.
        kept: parts of an int8 network that stayed in float32.
        seconds: that it took to write the file, and to verify it.
    """

    path: Path
    info: ModelInfo
    parity: Parity
    ran: Literal["file", "graph"]
    why: str
    peak: tuple[str, float] | None
    kept: list[str]
    seconds: tuple[float, float]


def export(
    request: Request,
    form: str,
    output: Path | None = None,
    calibration: Calibration | None = None,
    build: BuildOptions | None = None,
    check: Callable[[Path], None] = lambda path: None,
) -> Exported:
    """Write a network in another format and verify the result against the weights.

    Args:
        request: what to export.
        form: a name in :data:`~visionattn.export.formats.FORMATS`.
        output: file to write; None for one beside the weights, named like them.
        calibration: images to quantise by; for int8.
        build: how to build an engine.
        check: called with the verified file before it gets its final name; may raise.

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
    if not path.name.endswith(writer.suffix):
        raise ConfigError(f"output {path}: names of {form} end in {writer.suffix}, by which its runtime is found")
    network = load_network(request)
    with _staged(path) as staged:
        started = time.perf_counter()
        graph = Graph(network, staged.parent, calibration, build)
        _write(writer, form, graph, staged)
        written = time.perf_counter()
        session, why = _opened(writer, staged, graph)
        parity = compare(network, session, calibration.judging if calibration else photographs)
        parity.check(path.name)
        peak = _peak(graph, path) if request.precision == "fp16" and writer.of_onnx else None
        check(staged)
        done = time.perf_counter()
    return Exported(
        path,
        session.info,
        parity,
        "graph" if why else "file",
        why.replace(str(staged), path.name),
        peak,
        graph.kept,
        (written - started, done - written),
    )


def default_path(request: Request, writer: Format) -> Path:
    """Return where an export goes unless told: beside the weights, or ``runs/export`` for what has none."""
    weights = Path(request.weights)
    stem = weights.stem if request.precision == "fp32" else f"{weights.stem}-{request.precision}"
    folder = weights.parent if weights.suffix in (".pt", ".safetensors") else Path("runs/export")
    return folder / f"{stem}{writer.suffix}"


def _check(request: Request, form: str, writer: Format, calibration: Calibration | None) -> None:
    if request.precision not in writer.precisions:
        raise UnsupportedError(f"{form} holds {', '.join(writer.precisions)}; got {request.precision}")
    if (request.precision == "int8") != (calibration is not None):
        raise ConfigError("int8 needs images to calibrate by, and nothing else does: give --calibrate DATA with int8")


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
    except UnsupportedError as error:
        if not writer.of_hardware:
            raise
        return FORMATS["onnx"].open_session(source_of(graph), Place("cpu")), str(error)


def _peak(graph: Graph, path: Path) -> tuple[str, float]:
    """Return the largest magnitude that float16 has to hold."""
    name, peak = half_range(graph.onnx_file, photographs(graph.info, graph.info.batch, graph.info.size))
    if not peak <= HALF_LIMIT:
        raise ParityError(
            f"{path.name}: {name} overflows float16 on photographs; export it in fp32. Nothing was written"
        )
    return name, peak


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """Give a path to write to, in a folder beside the final one; move it into place unless something is raised."""
    if path.is_dir() != path.name.endswith("_openvino_model") and path.exists():
        raise ConfigError(f"output {path} is there already and of another kind; choose another name")
    folder = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # of an export that was killed
    folder.mkdir()
    try:
        yield folder / path.name
        if path.is_dir():
            shutil.rmtree(path)
        (folder / path.name).replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
