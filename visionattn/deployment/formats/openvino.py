"""OpenVINO's intermediate representation, made of ONNX: a folder with the graph, its weights and its description."""

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from visionattn.deployment.formats.base import Format
from visionattn.deployment.graph import OPSET, Graph
from visionattn.deployment.info import KEY, ModelInfo, read_info
from visionattn.deployment.quantize import quantize_openvino
from visionattn.deployment.session import Place, Session
from visionattn.errors import ConfigError, UnsupportedError, WeightsError


def write(graph: Graph, path: Path) -> None:
    """Write a folder ``NAME_openvino_model`` with ``model.xml``, ``model.bin`` and ``metadata.yaml``."""
    openvino = import_openvino()
    info = graph.info.updated(opset=OPSET)
    model = openvino.convert_model(str(graph.onnx_file))
    if info.precision == "int8":
        assert graph.calibration is not None
        model, graph.kept = quantize_openvino(model, graph.calibration, info)
    model.set_rt_info(info.model_dump_json(), [KEY])
    path.mkdir()
    openvino.save_model(model, str(path / "model.xml"), compress_to_fp16=info.precision == "fp16")
    (path / "metadata.yaml").write_text(yaml.safe_dump(info.metadata(), sort_keys=False), encoding="utf-8")


def open_session(path: Path, place: Place) -> Session:
    """Load a folder, or the ``.xml`` in one."""
    openvino = import_openvino()
    file = path if path.suffix == ".xml" else next(path.glob("*.xml"), path / "model.xml")
    core = openvino.Core()
    device = place.provider or "CPU"
    if device not in (*core.available_devices, "AUTO"):
        raise ConfigError(
            f"provider {device!r} is not here; OpenVINO finds {', '.join(core.available_devices)} and AUTO"
        )
    if place.device not in ("", "cpu"):
        raise ConfigError(f"device {place.device!r} is not for OpenVINO; leave it out, or give its own --provider GPU")
    try:
        model = core.read_model(str(file))
        info = read_info(_metadata(model, file), str(path))
        # Unasked, some devices would compute in bfloat16 or float16, which is another precision than the file's.
        precision = "f16" if info.precision == "fp16" and device != "CPU" else "f32"
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        if place.threads:
            settings["INFERENCE_NUM_THREADS"] = place.threads
        compiled = core.compile_model(model, device, settings)
    except WeightsError:
        raise
    except Exception as error:  # the runtime's errors have no common class
        raise WeightsError(f"{path} is damaged or no OpenVINO model: {error}") from error
    return OpenVinoSession(compiled, info, device)


def import_openvino() -> Any:
    """Return the module openvino."""
    try:
        import openvino
    except ImportError as error:
        raise UnsupportedError("openvino is not installed; pip install 'visionattn[openvino]'") from error
    return openvino


class OpenVinoSession(Session):
    """A model in OpenVINO."""

    def __init__(self, compiled: Any, info: ModelInfo, device: str) -> None:
        super().__init__(info, f"openvino {device}")
        self._request = compiled.create_infer_request()

    def run(self, images: Tensor) -> list[Tensor]:
        outputs = self._request.infer({0: images.contiguous().numpy()}, share_inputs=True)
        return [torch.from_numpy(output.copy()).float() for output in outputs.values()]


def _metadata(model: Any, file: Path) -> dict[str, Any]:
    if model.has_rt_info([KEY]):
        return {KEY: str(model.get_rt_info([KEY]).astype(str))}
    sidecar = file.with_name("metadata.yaml")
    found = yaml.safe_load(sidecar.read_text(encoding="utf-8")) if sidecar.is_file() else {}
    return found if isinstance(found, dict) else {}


FORMAT = Format("_openvino_model", write, open_session, is_folder=True)
