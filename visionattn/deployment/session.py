"""A network that is ready to run, whatever the runtime: tensors in, tensors out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visionattn.deployment.info import ModelInfo
from visionattn.errors import ConfigError, UnsupportedError


@dataclass(frozen=True)
class Place:
    """Where and how to run.

    Attributes:
        device: ``cpu``, ``0`` or ``cuda:0``, ``mps``; empty: the best there is.
        threads: of the CPU; 0 leaves it to the runtime.
        provider: an execution provider of ONNX Runtime, such as ``CUDAExecutionProvider``, or a device of OpenVINO,
            such as ``GPU``; empty: by ``device``.
    """

    device: str = ""
    threads: int = 0
    provider: str = ""


class Session(ABC):
    """A loaded network. Calling it takes float32 images (B, 3, H, W) and returns its outputs, float32 with B in front.

    A network of a fixed batch takes any number of images: a larger batch is split, a smaller one filled up with zeros
    and its outputs cut.

    Args:
        info: what it is.
        device: where it runs, for reports.
        place: where inputs and outputs are, as torch names it.
    """

    def __init__(self, info: ModelInfo, device: str, place: str = "cpu") -> None:
        self.info, self.device, self.place = info, device, place

    @abstractmethod
    def run(self, images: Tensor) -> list[Tensor]:
        """Run on a batch of a size that the network takes."""

    def __call__(self, images: Tensor) -> list[Tensor]:
        size = tuple(images.shape[-2:])
        if "size" not in self.info.dynamic and size != self.info.size:
            raise UnsupportedError(
                f"{self.info.model}: got images of {size} (H, W), but it takes {self.info.size} only"
            )
        images = images.to(self.place)
        if "batch" not in self.info.dynamic:
            return self._joined([self._filled(part) for part in torch.split(images, self.info.batch)])
        return self._joined([self.run(part) for part in torch.split(images, self.info.max_batch or images.shape[0])])

    def _joined(self, parts: list[list[Tensor]]) -> list[Tensor]:
        return parts[0] if len(parts) == 1 else [torch.cat(outputs) for outputs in zip(*parts, strict=True)]

    def _filled(self, images: Tensor) -> list[Tensor]:
        count = images.shape[0]
        lacking = self.info.batch - count
        if not lacking:
            return self.run(images)
        filled = torch.cat((images, images.new_zeros(lacking, *images.shape[1:])))
        return [output[:count] for output in self.run(filled)]


class TorchSession(Session):
    """A module that torch runs: weights, TorchScript or an exported program."""

    def __init__(self, module: nn.Module, info: ModelInfo, place: Place) -> None:
        device = torch_device(place.device)
        if place.provider:
            raise ConfigError(f"provider {place.provider!r} is for ONNX Runtime and OpenVINO; leave it out for torch")
        if place.threads:
            torch.set_num_threads(place.threads)
        super().__init__(info, device, device)
        self.module = module.to(device)

    @torch.inference_mode()
    def run(self, images: Tensor) -> list[Tensor]:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # float32 is what it says, also on a GPU
            outputs = self.module(images)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def torch_device(text: str) -> str:
    """Return a device as torch names it; empty stands for the best there is.

    Raises:
        ConfigError: there is no such device.
    """
    if not text:
        return "cuda:0" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{text}" if text.isdigit() else text)
    except RuntimeError as error:
        raise ConfigError(f"device {text!r} is unknown; expected cpu, mps, or a GPU's number such as 0") from error
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= there.get(device.type, 0):
        raise ConfigError(
            f"device {text!r} is not here; this machine has {there['cuda']} CUDA GPUs"
            f"{' and mps' if there['mps'] else ''}; leave it out for the best one, or give cpu"
        )
    return f"cuda:{device.index or 0}" if device.type == "cuda" else device.type
