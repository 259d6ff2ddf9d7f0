"""torch's exported program, ``.pt2``: for ``torch.export.load``, and for compilation by inductor."""

from pathlib import Path

import torch

from visionattn.errors import WeightsError
from visionattn.export.formats.base import Format
from visionattn.export.graph import Graph
from visionattn.export.info import KEY, read_info
from visionattn.export.session import Place, Session, TorchSession


def write(graph: Graph, path: Path) -> None:
    """Write the captured program."""
    torch.export.save(graph.program, str(path), extra_files={KEY: graph.info.model_dump_json()})


def open_session(path: Path, place: Place) -> Session:
    """Load a ``.pt2`` file."""
    extra = {KEY: ""}
    try:
        program = torch.export.load(str(path), extra_files=extra)
    except Exception as error:  # zip, JSON and schema errors alike
        raise WeightsError(f"{path} is damaged or no exported program: {error}") from error
    metadata = {KEY: extra[KEY]} if extra[KEY] else {}
    return TorchSession(program.module(), read_info(metadata, str(path)), place)


FORMAT = Format(".pt2", write, open_session, precisions=("fp32", "fp16"), of_onnx=False, runs_code=True)
