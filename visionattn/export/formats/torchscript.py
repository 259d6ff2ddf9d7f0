"""TorchScript: a trace that C++ and mobile runtimes of torch load without Python."""

import json
import warnings
from pathlib import Path

import torch

from visionattn.errors import UnsupportedError, WeightsError
from visionattn.export.formats.base import Format
from visionattn.export.graph import Graph
from visionattn.export.info import as_json, read_info
from visionattn.export.session import Place, Session, TorchSession

_EXTRA = "config.txt"


def write(graph: Graph, path: Path) -> None:
    """Write a traced module; sizes are checked afterwards, since a trace may bake them in."""
    if graph.info.nms == "embedded":
        raise UnsupportedError("torchscript: nms=embedded needs an operation that its runtimes lack; use none or free")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have .pt2
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            graph.network.module, graph.example(), check_trace=False
        )
        torch.jit.save(traced, str(path), _extra_files={_EXTRA: as_json(graph.info.metadata())})


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


FORMAT = Format(".torchscript", write, open_session, precisions=("fp32", "fp16"), of_onnx=False)
