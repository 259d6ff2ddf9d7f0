"""The formats, one module each. A new one is a file here and a line in :data:`FORMATS`."""

from visionattn.export.formats import onnx, openvino, pt2, tensorrt, tensorrt_rtx, torchscript
from visionattn.export.formats.base import Format

FORMATS: dict[str, Format] = {
    "onnx": onnx.FORMAT,
    "openvino": openvino.FORMAT,
    "tensorrt": tensorrt.FORMAT,
    "tensorrt-rtx": tensorrt_rtx.FORMAT,
    "torchscript": torchscript.FORMAT,
    "pt2": pt2.FORMAT,
}

__all__ = ["FORMATS", "Format"]
