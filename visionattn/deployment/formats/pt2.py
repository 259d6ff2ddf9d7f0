"""torch's exported program, ``.pt2``: for ``torch.export.load``, and for compilation by inductor."""

import io
from pathlib import Path

import torch
from torch.export.passes import move_to_device_pass

from visionattn.deployment.formats.base import Format
from visionattn.deployment.graph import Graph
from visionattn.deployment.info import KEY, read_info
from visionattn.deployment.session import Place, Session, TorchSession, torch_device
from visionattn.errors import WeightsError


def write(graph: Graph, path: Path) -> None:
    """Write the captured program."""
    content = io.BytesIO()  # torch's own writer of files ends the process when the disk is full
    torch.export.save(graph.program, content, extra_files={KEY: graph.info.model_dump_json()})
    path.write_bytes(content.getvalue())


def open_session(path: Path, place: Place) -> Session:
    """Load a ``.pt2`` file."""
    extra = {KEY: ""}
    try:
        program = torch.export.load(str(path), extra_files=extra)
    except Exception as error:  # zip, JSON and schema errors alike
        raise WeightsError(f"{path} is damaged or no exported program: {error}") from error
    info = read_info({KEY: extra[KEY]} if extra[KEY] else {}, str(path))
    # Constants that the program makes as it runs name their device, which moving its module would not change.
    moved = move_to_device_pass(program, torch_device(place.device))
    return TorchSession(moved.module(), info, place)


FORMAT = Format(".pt2", write, open_session, precisions=("fp32", "fp16"), of_onnx=False, runs_code=True)
