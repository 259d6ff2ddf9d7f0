"""The formats, one module each. A new one is a file here and a line in :data:`FORMATS`."""

from pathlib import Path
from typing import Protocol

from visionattn.export.formats import onnx, openvino, pt2, tensorrt, tensorrt_rtx, torchscript
from visionattn.export.graph import Graph
from visionattn.export.info import Precision
from visionattn.export.session import Place, Session


class Format(Protocol):
    """What a format offers; a module of this package is one."""

    @property
    def SUFFIX(self) -> str:  # noqa: N802
        """End of the name of its files."""

    @property
    def PRECISIONS(self) -> tuple[Precision, ...]:  # noqa: N802
        """Precisions that it can hold."""

    @property
    def RUNS_CODE(self) -> bool:  # noqa: N802
        """Whether loading a file may run any code, so that only one's own may be loaded."""

    def write(self, graph: Graph, path: Path, /) -> None:
        """Write a network and its description."""

    def open_session(self, path: Path, place: Place, /) -> Session:
        """Load what :meth:`write` wrote."""


FORMATS: dict[str, Format] = {
    "onnx": onnx,
    "openvino": openvino,
    "tensorrt": tensorrt,
    "tensorrt-rtx": tensorrt_rtx,
    "torchscript": torchscript,
    "pt2": pt2,
}
