"""What a format is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from visionattn.choices import Precision
from visionattn.deployment.graph import Graph
from visionattn.deployment.session import Place, Session


@dataclass(frozen=True)
class Format:
    """A way to write a network into a file and to run it from there.

    Attributes:
        suffix: end of the name of its files, by which they are known again.
        write: writes a graph and its description to a path.
        open_session: loads what ``write`` wrote.
        precisions: that it can hold.
        of_onnx: its files are made of the ONNX graph.
        runs_code: loading a file may run any code, so only one's own may be loaded.
        of_hardware: its files run on some GPUs only.
        is_folder: its files are folders.
        embeds_nms: it can suppress overlapping boxes in the graph.
    """

    suffix: str
    write: Callable[[Graph, Path], None]
    open_session: Callable[[Path, Place], Session]
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8")
    of_onnx: bool = True
    runs_code: bool = False
    of_hardware: bool = False
    is_folder: bool = False
    embeds_nms: bool = True
