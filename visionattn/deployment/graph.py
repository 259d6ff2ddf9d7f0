"""A network captured as a graph, once, for all formats: torch's exported program, and ONNX made of it."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from visionattn.deployment.info import ModelInfo, as_text
from visionattn.deployment.network import Network
from visionattn.deployment.nms import onnx_translation
from visionattn.deployment.quantize import Calibration, quantize_onnx
from visionattn.errors import ConfigError, ExportError, UnsupportedError

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 18
"""Of ONNX: the newest for which ONNX Runtime has all kernels on GPUs, and which TensorRT 10 and OpenVINO read."""


@dataclass(frozen=True)
class BuildOptions:
    """How to build an engine of TensorRT.

    Attributes:
        max_batch: largest batch of a dynamic one.
        max_size: largest (H, W) of a dynamic size; twice the size if None.
        workspace: GiB that the builder may use; 0 for all there is.
        level: how long to search, 0 to 5.
        timing_cache: file of earlier measurements, read and written anew.

    Raises:
        ConfigError: a number is out of range.
    """

    max_batch: int = 16
    max_size: tuple[int, int] | None = None
    workspace: float = 0.0
    level: int = 3
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 5 or self.workspace < 0 or self.max_batch < 1:
            raise ConfigError(
                f"got level {self.level}, workspace {self.workspace}, max_batch {self.max_batch}; "
                "expected 0..5, 0 or more, 1 or more"
            )


class Graph:
    """A network on its way into a file.

    Args:
        network: what to export.
        folder: for files that formats make of each other.
        calibration: images to quantise by; needed for int8.
        build: how to build an engine.

    Attributes:
        kept: parts of an int8 network that stayed in float32.
    """

    def __init__(
        self,
        network: Network,
        folder: Path,
        calibration: Calibration | None = None,
        build: BuildOptions | None = None,
    ) -> None:
        self.network, self.folder, self.build = network, folder, build or BuildOptions()
        self.calibration, self.kept = calibration, list[str]()

    @property
    def info(self) -> ModelInfo:
        """What the network is."""
        return self.network.info

    def example(self) -> Tensor:
        """Return images to trace by. Of a dynamic batch there are two: a batch of one would be taken for fixed."""
        batch = max(self.info.batch, 2) if "batch" in self.info.dynamic else self.info.batch
        return torch.rand(batch, 3, *self.info.size, generator=torch.Generator().manual_seed(0))

    @cached_property
    def program(self) -> ExportedProgram:
        """The network as torch captured it.

        Raises:
            ExportError: it cannot be captured, or not with what shall be dynamic.
        """
        info, axes = self.info, {}
        if "batch" in info.dynamic:
            axes[0] = Dim("batch")
        if "size" in info.dynamic:
            axes |= {2: info.stride * Dim("rows", min=2), 3: info.stride * Dim("columns", min=2)}
        try:
            with _quiet(), torch.no_grad():
                return torch.export.export(self.network.module, (self.example(),), dynamic_shapes=(axes,), strict=False)
        except Exception as error:
            raise ExportError(_why(info, error)) from error

    @cached_property
    def onnx_file(self) -> Path:
        """The network in ONNX, in its precision; float32 for int8.

        Raises:
            UnsupportedError: what writes ONNX is not installed.
            ExportError: an operation has no translation.
        """
        try:
            import onnx
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UnsupportedError(
                f"ONNX needs packages that are missing ({error}); pip install 'visionattn[onnx]'"
            ) from error
        path = self.folder / "graph.onnx"
        try:
            with _quiet():
                made = torch.onnx.export(
                    self.program,
                    dynamo=True,
                    opset_version=OPSET,
                    custom_translation_table=onnx_translation(),
                    verbose=False,
                )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f"{self.info.model}: cannot be written as ONNX: {_root(error)}") from error
        assert made is not None
        model = made.model_proto
        _name(model, self.info)
        onnx.save(model, str(path))
        describe(path, self.info.updated(opset=OPSET))
        return path

    @cached_property
    def int8_file(self) -> Path:
        """The network in ONNX, quantised by ONNX Runtime with ranges that have an offset."""
        return self._quantized("int8.onnx", symmetric=False)

    @cached_property
    def symmetric_int8_file(self) -> Path:
        """The same with ranges around zero, as TensorRT wants them."""
        return self._quantized("symmetric.onnx", symmetric=True)

    def _quantized(self, name: str, symmetric: bool) -> Path:
        assert self.calibration is not None
        path = self.folder / name
        self.kept = quantize_onnx(self.onnx_file, path, self.calibration, self.info, symmetric)
        describe(path, self.info.updated(opset=OPSET))
        return path


def describe(path: Path, info: ModelInfo) -> None:
    """Write a network's description into an ONNX file, in place of what stood there."""
    import onnx

    model = onnx.load(str(path))
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, as_text(info.metadata()))
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _name(model: "ModelProto", info: ModelInfo) -> None:
    """Give inputs, outputs and dynamic axes names that people know, and leave out torch's notes on every value."""
    graph = model.graph
    renamed = {graph.input[0].name: "images"}
    renamed |= {output.name: f"output{index}" for index, output in enumerate(graph.output)}
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output):
        value.name = renamed[value.name]
    del graph.value_info[:]
    axes = {0: "batch", 2: "height", 3: "width"}
    for value in (*graph.input, *graph.output):
        known = axes if info.task != "detect" or value.name == "images" else {0: "batch", 2: "anchors"}
        for axis, dimension in enumerate(value.type.tensor_type.shape.dim):
            if dimension.dim_param:
                dimension.dim_param = known.get(axis, f"axis{axis}") + (
                    "" if value.name == "images" else _end(axis, value)
                )


def _end(axis: int, value: Any) -> str:
    return "" if axis == 0 or len(value.type.tensor_type.shape.dim) == 3 else f"_{value.name}"


def _root(error: BaseException) -> str:
    """Return the first line of what lies at the bottom of an error of torch, which comes in many wrappings."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _why(info: ModelInfo, error: Exception) -> str:
    hint = ""
    if "size" in info.dynamic and info.task != "detect":
        hint = (
            "; a flat vision transformer of timm takes any size with --model-kwargs dynamic_img_size=true, "
            "vit_lat and lat models always do"
        )
    return f"{info.model}: cannot be captured with dynamic {', '.join(info.dynamic) or 'nothing'}: {_root(error)}{hint}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's remarks on its own progress to itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
