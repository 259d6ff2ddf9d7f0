"""TensorRT and TensorRT-RTX: engines built of ONNX by one way for both, since their Python interfaces agree.

Networks are strongly typed: precision is that of the ONNX graph, as TensorRT 11 demands and 10 offers. An engine
belongs to the package and version that built it, and to a GPU or a family of GPUs.
"""

import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionattn.deployment.graph import OPSET, Graph
from visionattn.deployment.info import ModelInfo, as_json, read_info
from visionattn.deployment.session import Place, Session, torch_device
from visionattn.errors import ConfigError, ExportError, HardwareError, UnsupportedError, WeightsError


@dataclass(frozen=True)
class Runtime:
    """One of the two packages.

    Attributes:
        name: what a user calls it.
        modules: where it may be imported from, the first that is there.
        install: what to install.
        gpus: what its engines run on.
        refused: major compute capabilities that they do not run on, though the package is there.
    """

    name: str
    modules: tuple[str, ...]
    install: str
    gpus: str
    refused: tuple[int, ...] = ()

    def load(self) -> Any:
        """Import the package.

        Raises:
            UnsupportedError: it is not installed, or its libraries are not found.
        """
        for module in self.modules:
            try:
                return importlib.import_module(module)
            except ImportError:
                continue
        raise UnsupportedError(f"{self.name} is not installed; {self.install}. Its engines run on {self.gpus}")


TENSORRT = Runtime(
    "TensorRT",
    ("tensorrt",),
    "pip install 'tensorrt>=10' (it fetches its libraries from NVIDIA's index)",
    "NVIDIA GPUs of compute capability 7.5 and newer, the kind that they were built on",
)
TENSORRT_RTX = Runtime(
    "TensorRT-RTX",
    ("tensorrt_rtx", "tensorrt_rtx_bindings"),
    "pip install 'visionattn[tensorrt-rtx]'",
    "GeForce RTX and RTX PRO GPUs: compute capability 7.5, 8.0, 8.6, 8.9 and 12.x, not 9.0 (H100, H200)",
    (9, 10),
)


@dataclass(frozen=True)
class Built:
    """An engine, and the layers of the network that it was built of."""

    plan: bytes
    layers: int


def build(runtime: Runtime, graph: Graph) -> Built:
    """Parse the graph's ONNX and build an engine of it; no GPU is needed for TensorRT-RTX.

    Raises:
        UnsupportedError: the package is not installed.
        ExportError: the parser or the builder refuses the graph.
    """
    options, trt = graph.build, runtime.load()
    logger = _Log(trt)
    builder = trt.Builder(logger.made)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, logger.made)
    if not parser.parse(source_of(graph).read_bytes()):
        faults = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise ExportError(f"{runtime.name} cannot read the graph of {graph.info.model}: {faults}")
    config = builder.create_builder_config()
    config.builder_optimization_level = options.level
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 is what it says
    if options.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace * 2**30))
    if graph.info.dynamic:
        config.add_optimization_profile(_profile(builder, network.get_input(0).name, graph.info))
    cache = _timing_cache(config, options.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"{runtime.name} cannot build {graph.info.model}: {logger.last or 'it says no reason'}")
    if cache is not None and options.timing_cache:
        partial = options.timing_cache.with_name(f"{options.timing_cache.name}.{os.getpid()}.partial")
        partial.write_bytes(bytes(cache.serialize()))
        partial.replace(options.timing_cache)
    return Built(bytes(plan), network.num_layers)


def source_of(graph: Graph) -> Path:
    """Return the ONNX file that an engine is built of."""
    return graph.symmetric_int8_file if graph.info.precision == "int8" else graph.onnx_file


def write_engine(runtime: Runtime, graph: Graph, path: Path) -> None:
    """Write an engine behind its description: four bytes of length, JSON, then the engine, as Ultralytics does."""
    built = build(runtime, graph)
    info = graph.info.updated(opset=OPSET)
    header = as_json(
        info.metadata() | {"runtime": runtime.name, "runtime_version": runtime.load().__version__}
    ).encode()
    path.write_bytes(len(header).to_bytes(4, "little") + header + built.plan)


def open_engine(runtime: Runtime, path: Path, place: Place) -> Session:
    """Load an engine.

    Raises:
        UnsupportedError: there is no GPU, no package, or another version or GPU than the engine was built for.
        WeightsError: the file is damaged.
    """
    metadata, plan = _split(path)
    info = read_info(metadata, str(path))
    if place.threads or place.provider:
        raise ConfigError("threads and provider are not for engines; leave them out")
    trt = runtime.load()
    if not torch.cuda.is_available():
        raise HardwareError(f"{path}: {runtime.name} engines need an NVIDIA GPU, and there is none here")
    device = torch_device(place.device)
    if not device.startswith("cuda"):
        raise UnsupportedError(f"{path}: {runtime.name} engines run on NVIDIA GPUs only; got device {place.device!r}")
    logger = _Log(trt)
    with torch.cuda.device(device):
        engine = trt.Runtime(logger.made).deserialize_cuda_engine(plan)
    if engine is None:
        found = torch.cuda.get_device_capability(device)
        capability = ".".join(map(str, found))
        refusal = HardwareError if found[0] in runtime.refused else WeightsError
        raise refusal(
            f"{path}: {runtime.name} {trt.__version__} refuses it on this GPU of compute capability {capability} "
            f"({logger.last}); it was built with {metadata.get('runtime_version')}. Its engines run on {runtime.gpus}"
        )
    return EngineSession(trt, engine, info, device, logger)


class EngineSession(Session):
    """An engine on a GPU, on torch's current stream, without copies."""

    def __init__(self, trt: Any, engine: Any, info: ModelInfo, device: str, logger: "_Log") -> None:
        super().__init__(info, f"{trt.__name__.partition('_bindings')[0]} {device}", device)
        self._engine, self._logger = engine, logger
        with torch.cuda.device(device):
            self._context = engine.create_execution_context()
        if self._context is None:
            raise ExportError(f"{info.model}: the engine cannot be made ready: {logger.last}; free memory of the GPU")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._input = next(name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT)
        self._outputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        other = [name for name in names if engine.get_tensor_dtype(name) != trt.float32]
        if other:
            raise UnsupportedError(f"{info.model}: {', '.join(other)} are not float32; export it with tools/export.py")

    def run(self, images: Tensor) -> list[Tensor]:
        images = images.contiguous()
        if not self._context.set_input_shape(self._input, tuple(images.shape)):
            raise UnsupportedError(
                f"{self.info.model}: this engine does not take {tuple(images.shape)}; build it for more"
            )
        outputs = [
            torch.empty(tuple(self._context.get_tensor_shape(name)), device=self.place) for name in self._outputs
        ]
        for name, tensor in zip([self._input, *self._outputs], [images, *outputs], strict=True):
            self._context.set_tensor_address(name, tensor.data_ptr())
        with torch.cuda.device(images.device):
            done = self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        if not done:
            raise ExportError(f"{self.info.model}: the engine failed: {self._logger.last}")
        return outputs


class _Log:
    """Keeps the last error that TensorRT tells, and prints nothing."""

    def __init__(self, trt: Any) -> None:
        self.last = ""
        outer = self

        class Log(trt.ILogger):
            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.ERROR:
                    outer.last = message

        self.made = Log()


def _strongly_typed(trt: Any) -> int:
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _profile(builder: Any, name: str, info: ModelInfo) -> Any:
    (H, W), least = info.size, 2 * info.stride
    smallest, largest = [info.batch, 3, H, W], [info.batch, 3, H, W]
    if info.max_batch:
        smallest[0], largest[0] = 1, info.max_batch
    if info.max_size:
        smallest[2:], largest[2:] = [least, least], info.max_size
    profile = builder.create_optimization_profile()
    profile.set_shape(name, smallest, [info.batch, 3, H, W], largest)
    return profile


def _timing_cache(config: Any, file: Path | None) -> Any:
    if file is None:
        return None
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    config.set_timing_cache(cache, True)
    return cache


def _split(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:4], "little")
    try:
        metadata = json.loads(content[4 : 4 + length])
    except ValueError as error:
        raise WeightsError(
            f"{path} is damaged, or an engine without a description; give one of tools/export.py"
        ) from error
    return metadata, content[4 + length :]
