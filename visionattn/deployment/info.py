"""What an exported file tells of itself."""

import ast
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from visionattn.choices import NMS, Dynamic, Precision, Task
from visionattn.errors import WeightsError

KEY = "visionattn"
"""Under it the whole description stands in a file's metadata, as JSON."""


_FOREIGN_HEADS = ("RTDETRDecoder",)
"""Heads for the task detect whose boxes are in another form than Detect's."""


class ModelInfo(BaseModel):
    """Description of a network, kept inside every file that holds one.

    Attributes:
        task: ``detect``, ``classify`` or ``features``.
        names: class index -> class name; empty for features.
        size: (H, W) of the input in pixels; the largest tried if the size is dynamic.
        batch: images of a batch; any number if the batch is dynamic.
        stride: sides of the input are multiples of it.
        precision: of the arithmetic; inputs and outputs are float32 whatever it is.
        dynamic: which of ``batch`` and ``size`` a caller may choose.
        max_batch: of an engine with a dynamic batch, the largest; larger ones are split.
        max_size: of an engine with a dynamic size, the largest (H, W).
        nms: of a detector: ``none`` (raw predictions), ``embedded`` (boxes, overlapping ones suppressed in the graph),
            ``free`` (boxes of an NMS-free head) or ``peaks`` (of both its branches).
        conf: of an embedded suppression: boxes of a lower score are not in the output.
        iou: of an embedded suppression: so are boxes of a class that overlap a better one by more.
        max_det: of an embedded suppression: most boxes of an image.
        preprocessing: of a classifier or backbone: arguments of ``timm.data.create_transform``.
        model: weights or name that it was made of.
        opset: of ONNX, if it went that way.
        environment: date, command, commit, device, versions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Task
    names: dict[int, str]
    size: tuple[int, int]
    batch: int = 1
    stride: int = Field(ge=1)
    precision: Precision = "fp32"
    dynamic: tuple[Dynamic, ...] = ()
    max_batch: int | None = None
    max_size: tuple[int, int] | None = None
    nms: NMS = "none"
    conf: float | None = None
    iou: float | None = None
    max_det: int | None = None
    preprocessing: dict[str, Any] | None = None
    model: str = ""
    opset: int | None = None
    environment: dict[str, Any] = Field(default_factory=dict)

    def updated(self, **changes: Any) -> "ModelInfo":
        """Return a copy with some attributes changed."""
        return self.model_copy(update=changes)

    def metadata(self) -> dict[str, Any]:
        """Return what is written into a file: the whole by :data:`KEY`, a detector's also as Ultralytics reads it."""
        own = {KEY: self.model_dump_json()}
        if self.task != "detect":
            return own
        boxes = self.nms != "none"
        return own | {
            "task": self.task,
            "stride": self.stride,
            "batch": self.batch,
            "imgsz": list(self.size),
            "names": self.names,
            "channels": 3,
            "end2end": boxes,
            "args": {"batch": self.batch, "dynamic": "size" in self.dynamic, "nms": self.nms == "embedded"},
        }


def read_info(metadata: Mapping[str, Any], path: str) -> ModelInfo:
    """Return the description in a file's metadata: ours, or that of a detector which Ultralytics exported.

    Raises:
        WeightsError: there is neither.
    """
    try:
        if isinstance(metadata, Mapping) and metadata.get(KEY):
            return ModelInfo.model_validate_json(metadata[KEY])
        return _of_ultralytics({key: _literal(value) for key, value in metadata.items()})
    except (ValidationError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path} does not say what it is: got metadata {sorted(metadata)}; give a file of tools/export.py, or a "
            f"detector that Ultralytics exported ({type(error).__name__}: {error})"
        ) from error


def _of_ultralytics(found: dict[str, Any]) -> ModelInfo:
    arguments, side = found["args"], found["imgsz"]
    if found["task"] != "detect":
        raise ValueError("a detector is expected")
    if found.get("head", "Detect") in _FOREIGN_HEADS:
        raise ValueError(f"its head is {found['head']}, whose boxes are in another form")
    return ModelInfo(
        task="detect",
        names=found["names"],
        size=tuple(side) if isinstance(side, list | tuple) else (side, side),
        batch=found["batch"],
        stride=found["stride"],
        precision="fp16"
        if arguments.get("half") or arguments.get("quantize") == 16
        else "int8"
        if arguments.get("int8")
        else "fp32",
        dynamic=("batch", "size") if arguments.get("dynamic") else (),
        nms="free" if found.get("end2end") else "embedded" if arguments.get("nms") else "none",
        conf=arguments.get("conf", 0.25) if arguments.get("nms") else None,
        iou=arguments.get("iou", 0.7) if arguments.get("nms") else None,
        max_det=arguments.get("max_det", 300) if arguments.get("nms") else None,
        model=str(found.get("description", "")),
    )


def _literal(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def size_text(size: tuple[int, int]) -> str:
    """Write a size (H, W): ``320`` or ``480x640``."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def as_text(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return metadata whose values are text, as Ultralytics writes and reads it in ONNX files."""
    return {key: value if isinstance(value, str) else str(value) for key, value in metadata.items()}


def as_json(metadata: Mapping[str, Any]) -> str:
    """Return metadata as one JSON text, as Ultralytics writes and reads it before an engine."""
    return json.dumps(metadata)
