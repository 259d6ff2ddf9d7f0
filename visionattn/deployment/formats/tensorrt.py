"""Engines of TensorRT 10 and 11."""

from pathlib import Path

from visionattn.deployment.formats.base import Format
from visionattn.deployment.formats.engines import TENSORRT, open_engine, write_engine
from visionattn.deployment.graph import Graph
from visionattn.deployment.session import Place, Session


def write(graph: Graph, path: Path) -> None:
    """Build and write an engine."""
    write_engine(TENSORRT, graph, path)


def open_session(path: Path, place: Place) -> Session:
    """Load an engine."""
    return open_engine(TENSORRT, path, place)


FORMAT = Format(".engine", write, open_session, of_hardware=True)
