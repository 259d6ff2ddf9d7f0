"""ONNX, run by ONNX Runtime."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionattn.deployment.formats.base import Format
from visionattn.deployment.graph import Graph
from visionattn.deployment.info import ModelInfo, read_info
from visionattn.deployment.session import Place, Session, torch_device
from visionattn.errors import ConfigError, UnsupportedError, WeightsError

_CPU = "CPUExecutionProvider"


def write(graph: Graph, path: Path) -> None:
    """Write the graph as one ``.onnx`` file."""
    shutil.copyfile(graph.int8_file if graph.info.precision == "int8" else graph.onnx_file, path)


def open_session(path: Path, place: Place) -> Session:
    """Load a ``.onnx`` file."""
    runtime = import_runtime()
    provider = _provider(place, runtime.get_available_providers())
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    # Threads that wait by spinning take the CPU from what prepares the next image.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if place.threads:
        options.intra_op_num_threads = place.threads
    try:
        session = runtime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # the runtime's errors have no common class
        raise WeightsError(f"{path} is damaged or no ONNX model for this runtime: {error}") from error
    info = read_info(session.get_modelmeta().custom_metadata_map, str(path))
    used, wanted = session.get_providers()[0], provider[0] if isinstance(provider, tuple) else provider
    if used != wanted:
        raise UnsupportedError(
            f"{wanted} does not start here, ONNX Runtime would use {used}; check its libraries, or give cpu"
        )
    return OnnxSession(session, info, used)


def import_runtime() -> Any:
    """Return the module onnxruntime."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UnsupportedError("onnxruntime is not installed; pip install 'visionattn[onnx]'") from error
    return onnxruntime


class OnnxSession(Session):
    """A model in ONNX Runtime. Tensors pass through the host's memory."""

    def __init__(self, session: Any, info: ModelInfo, provider: str) -> None:
        super().__init__(info, f"onnxruntime {provider.removesuffix('ExecutionProvider')}")
        self._session = session
        entry = session.get_inputs()[0]
        self._name, self._half = entry.name, entry.type == "tensor(float16)"

    def run(self, images: Tensor) -> list[Tensor]:
        array = images.numpy()
        outputs = self._session.run(None, {self._name: array.astype("float16") if self._half else array})
        return [torch.from_numpy(output).float() for output in outputs]


def _provider(place: Place, available: list[str]) -> Any:
    if place.provider:
        if place.provider not in available:
            raise ConfigError(f"provider {place.provider!r} is not in this onnxruntime; it has {', '.join(available)}")
        return place.provider
    if not place.device:
        return ("CUDAExecutionProvider", {"use_tf32": "0"}) if "CUDAExecutionProvider" in available else _CPU
    device = torch_device(place.device)
    if device == "cpu":
        return _CPU
    if device.startswith("cuda") and "CUDAExecutionProvider" in available:
        return ("CUDAExecutionProvider", {"device_id": device.partition(":")[2], "use_tf32": "0"})
    raise UnsupportedError(
        f"device {place.device!r}: this onnxruntime has {', '.join(available)}; install onnxruntime-gpu, or give cpu"
    )


FORMAT = Format(".onnx", write, open_session)
