"""What ``torch.compile`` makes of a layer: its graph has our operator. Tensors are stand-ins: no GPU is needed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from visionattn.attention import ATTENTION
from visionattn.errors import UnsupportedError
from visionattn.ops import switch

CALIBRATED = ["calibrated performer", "calibrated dark"]
POSITIVE = ["ela_hadamard", "elu", "relu", "performer", "dark", "slay", *CALIBRATED]
MOMENTS = ["ela_sum", "ela_diff", "ela_direction"]


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graph_of(layer: torch.nn.Module, x: torch.Tensor) -> list[str]:
    """Return the operators of the layer's one graph."""
    found: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(layer, backend=keep, fullgraph=True)(x)
    return found


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("path", ["auto", "fused"])
@pytest.mark.parametrize("name", POSITIVE + MOMENTS)
def test_the_graph_has_our_operator(name: str, path: switch.Path, grad: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), switch.kernels(path):
        options = {"calibrated": True} if name in CALIBRATED else {}
        layer = ATTENTION[name.split()[-1]](192, 3, projections=False, device="cuda", dtype=torch.bfloat16, **options)
        x = torch.empty(2, 1025, 576, device="cuda", dtype=torch.bfloat16, requires_grad=grad)
        operator = "visionattn.positive.default" if name in POSITIVE else "visionattn.moments.default"
        assert operator in graph_of(layer, x)


def test_the_fused_path_is_not_left_in_silence() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), switch.kernels("fused"):
        layer = ATTENTION["ela_hadamard"](320, 1, projections=False)
        x = torch.empty(2, 50, 960, device="cuda", dtype=torch.bfloat16)
        with pytest.raises((UnsupportedError, torch._dynamo.exc.TorchDynamoException), match="320 wide"):
            graph_of(layer, x)
