"""Networks of torch as fast as torch alone makes them: in half precision, channels last, compiled, as a CUDA graph."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.deployment.cudnn import join_relus
from visionattn.deployment.network import Network
from visionattn.deployment.session import Place, TorchSession
from visionattn.detection import DetectionNetwork
from visionattn.profiling.clock import Graphed
from visionattn.profiling.steps import AUTOCAST, DTYPES


class TunedSession(TorchSession):
    """A network that gets its input in its own type and memory format, and may be compiled and captured.

    Args:
        network: in float16 if it shall run in bfloat16, in float32 under autocast.
        place: where; channels come last on a GPU.
        precision: of the arithmetic: a name in DTYPES, or AUTOCAST.
        channels_last: so they do on the CPU.
    """

    def __init__(self, network: Network, place: Place, precision: str, channels_last: bool) -> None:
        super().__init__(_in_bfloat16(network.module) if precision == "bf16" else network.module, network.info, place)
        last = channels_last or self.place != "cpu"
        self.layout = torch.channels_last if last else torch.contiguous_format
        self.module.to(memory_format=self.layout)
        if self.place != "cpu":
            join_relus(self.module)
        if isinstance(self.module, DetectionNetwork):
            self.module.settle()
        self.autocast = precision == AUTOCAST
        self.type = next((dtype for name, dtype in DTYPES.items() if name == precision), torch.float32)
        self._graph: Graphed | None = None

    def laid(self, images: Tensor) -> Tensor:
        """Return images as the network takes them."""
        return images.to(self.place, self.type, memory_format=self.layout)

    def compile(self) -> None:
        """Have inductor compile the network for each size that it meets."""
        self.module = torch.compile(self.module, dynamic=False)  # type: ignore[assignment]

    def capture(self, images: Tensor) -> None:
        """Capture the network as a CUDA graph, whose input is in place of ``images``."""
        self._images, self._graph = images, Graphed(self._forward, [(images,)])

    def replay(self, number: int = 0) -> None:
        """Run the captured network on the input that lies there; the number is without effect."""
        assert self._graph is not None
        self._graph()

    def run(self, images: Tensor) -> list[Tensor]:
        if self._graph is None:
            return self._forward(self.laid(images))
        self._images.copy_(images)
        self._graph()
        outputs: list[Tensor] = self._graph.outputs[0]
        return outputs

    def _forward(self, images: Tensor) -> list[Tensor]:
        with torch.autocast(torch.device(self.place).type, torch.bfloat16, enabled=self.autocast):
            return super().run(images)


def _in_bfloat16(module: Any) -> nn.Module:
    """Turn a network of float16 into one of bfloat16, which takes such images; its float32 parts stay."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.dtype == torch.float16:
            tensor.data = tensor.data.bfloat16()
    module.half_precision = False  # images are no longer halved inside
    network: nn.Module = module
    return network
