"""Engines of TensorRT-RTX."""

from pathlib import Path

from visionattn.deployment.formats.base import Format
from visionattn.deployment.formats.engines import TENSORRT_RTX, open_engine, write_engine
from visionattn.deployment.graph import Graph
from visionattn.deployment.session import Place, Session


def write(graph: Graph, path: Path) -> None:
    """Build and write an engine."""
    write_engine(TENSORRT_RTX, graph, path)


def open_session(path: Path, place: Place) -> Session:
    """Load an engine."""
    return open_engine(TENSORRT_RTX, path, place)


FORMAT = Format(".rtx.engine", write, open_session, of_hardware=True, embeds_nms=False)
