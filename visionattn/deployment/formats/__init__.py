"""The formats, one module each. A new one is a file here and a line in :data:`FORMATS`."""

from pathlib import Path

from visionattn.deployment.formats import onnx, openvino, pt2, tensorrt, tensorrt_rtx, torchscript
from visionattn.deployment.formats.base import Format
from visionattn.errors import WeightsError

FORMATS: dict[str, Format] = {
    "onnx": onnx.FORMAT,
    "openvino": openvino.FORMAT,
    "tensorrt": tensorrt.FORMAT,
    "tensorrt-rtx": tensorrt_rtx.FORMAT,
    "torchscript": torchscript.FORMAT,
    "pt2": pt2.FORMAT,
}


def format_of(path: Path) -> Format:
    """Return the format that a file name ends like.

    Raises:
        WeightsError: like none.
    """
    endings = {form.suffix: form for form in FORMATS.values()}
    for suffix in sorted(endings, key=len, reverse=True):
        if path.name.endswith(suffix):
            return endings[suffix]
    if path.suffix == ".xml":
        return FORMATS["openvino"]
    raise WeightsError(
        f"{path}: got suffix {path.suffix!r}, expected .pt (a detector) or .safetensors (a classifier), "
        f"or {', '.join(sorted(endings))} (exported)"
    )


__all__ = ["FORMATS", "Format", "format_of"]
