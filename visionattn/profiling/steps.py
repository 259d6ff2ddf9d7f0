"""What is called when models are measured: a call that may fail, inference, and a step of training."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visionattn.deployment.parity import TOLERANCE
from visionattn.deployment.session import torch_device
from visionattn.errors import ConfigError, ParityError, VisionAttnError

DType = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[DType, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

AUTOCAST = "bf16-autocast"
"""Names inference with weights of float32 under autocast to bfloat16."""

ACCEPTED = {"fp32": TOLERANCE["fp32"], "fp16": TOLERANCE["fp16"], "bf16": 8 * TOLERANCE["fp16"]}
ACCEPTED[AUTOCAST] = ACCEPTED["bf16"]
"""Largest relative error to the float32 network on the CPU; bfloat16 has three bits fewer than float16."""


class Attempt:
    """A call that ends itself, not the run: after its first failure it does nothing, and tells the reason.

    Args:
        call: given the number that :func:`~visionattn.profiling.clock.time_in_turns` gives.

    Attributes:
        reason: why it failed; empty as long as it did not.
    """

    def __init__(self, call: Callable[[int], Any]) -> None:
        self.call, self.reason = call, ""

    def __call__(self, number: int = 0) -> Any:
        """Return what the call returns, or None if it fails or has failed."""
        if self.reason:
            return None
        try:
            return self.call(number)
        except Exception as error:  # runtimes fail as they like
            self.reason = reason_of(error)
        return None


def reason_of(error: Exception) -> str:
    """Return the first line of an error, for a row of a table; what is meant for users is told whole."""
    if isinstance(error, VisionAttnError):
        return str(error)
    first = str(error).strip().partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in first:
        return f"out of memory: {first}"
    return f"{type(error).__name__}: {first}"


def device_of(text: str) -> torch.device:
    """Return the device to measure on: ``cpu`` or a CUDA GPU; empty for a GPU if there is one.

    Raises:
        ConfigError: there is no such device, or it is of another kind.
    """
    device = torch.device(torch_device(text or ("cuda" if torch.cuda.is_available() else "cpu")))
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {text!r}: speed is measured on cpu and cuda; give one of these")
    return device


def device_name(device: torch.device) -> str:
    """Return ``cpu``, or the name of a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@torch.inference_mode()
def infer(module: nn.Module, inputs: Tensor) -> Any:
    """Run a module without gradients; float32 is what it says, also in convolutions on a GPU."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return module(inputs)


class TrainingStep:
    """Forward, loss, backward and a step of SGD; of autocast in half precision, weights stay in float32.

    Gradients are dropped at the end, so that between steps only weights are in memory.

    Args:
        module: float32, on its device; it is put into training mode.
        inputs: on that device.
        loss: of the module's output, a scalar.
        dtype: of autocast; fp32 for none.

    Raises:
        ConfigError: fp16, whose gradients would need to be scaled.
    """

    def __init__(self, module: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor], dtype: DType) -> None:
        if dtype == "fp16":
            raise ConfigError("a training step in fp16 would need its loss scaled; give bf16 or fp32")
        self.module = module.train().requires_grad_(True)
        self.inputs, self.loss, self.dtype = inputs, loss, dtype
        self.optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)

    def __call__(self, number: int = 0) -> None:
        """Do a step; the number is without effect."""
        self._backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check(self) -> None:
        """Raise a ParityError if a gradient is not finite."""
        self._backward()
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                raise ParityError(f"the gradient of {name} is not finite; not timed")
        self.optimizer.zero_grad()

    def _backward(self) -> None:
        half = self.dtype != "fp32"
        with torch.autocast(self.inputs.device.type, DTYPES[self.dtype] if half else None, enabled=half):
            loss = self.loss(self.module(self.inputs))
        loss.backward()  # type: ignore[no-untyped-call]
