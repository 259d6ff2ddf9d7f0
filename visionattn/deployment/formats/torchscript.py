"""TorchScript: a trace that C++ and mobile runtimes of torch load without Python."""

import io
import json
import warnings
from pathlib import Path

import torch

from visionattn.deployment.formats.base import Format
from visionattn.deployment.graph import Graph
from visionattn.deployment.info import read_info
from visionattn.deployment.session import Place, Session, TorchSession
from visionattn.errors import WeightsError

_EXTRA = "config.txt"


def write(graph: Graph, path: Path) -> None:
    """Write a traced module; sizes are checked afterwards, since a trace may bake them in."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have .pt2
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            graph.network.module, graph.example(), check_trace=False
        )
        content = io.BytesIO()  # torch's own writer of files ends the process when the disk is full
        torch.jit.save(traced, content, _extra_files={_EXTRA: json.dumps(graph.info.metadata())})
    path.write_bytes(content.getvalue())


def open_session(path: Path, place: Place) -> Session:
    """Load a ``.torchscript`` file."""
    extra = {_EXTRA: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.jit.load(  # type: ignore[no-untyped-call]
                str(path), map_location="cpu", _extra_files=extra
            )
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"{path} is damaged or no TorchScript file: {error}") from error
    return TorchSession(module, read_info(_decoded(extra[_EXTRA]), str(path)), place)


def _decoded(text: str | bytes) -> dict[str, object]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


FORMAT = Format(
    ".torchscript", write, open_session, precisions=("fp32", "fp16"), of_onnx=False, runs_code=True, embeds_nms=False
)
