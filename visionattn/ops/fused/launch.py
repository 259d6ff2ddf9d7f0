"""Launches of kernels that cost the CPU little: what all calls of one kind have in common is worked out once."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from triton.runtime import driver

from visionattn.errors import UnsupportedError
from visionattn.ops.fused.buffers import Memory, View
from visionattn.ops.packing import Projection

SPARE = 2**16
"""Flags that are kept ready on a device for launches recorded in CUDA graphs."""

PLAIN = (Tensor, torch.nn.Parameter, type(None))

_room: dict[int, int] = {}
_flags: dict[tuple[int, int], Tensor] = {}
_spare: dict[int, tuple[Tensor, int]] = {}


class Option:
    """One way to launch a kernel.

    Args:
        grid: number of programs on each axis.
        arguments: what follows the tensors in the kernel's parameters, in their order.
        warps: of a program.
    """

    def __init__(self, grid: Sequence[int], arguments: Sequence[Any], warps: int) -> None:
        self.grid, self.arguments, self.warps = (*grid, 1, 1)[:3], tuple(arguments), warps


class Launch:
    """A kernel for inputs of one shape, type and alignment, compiled at its first call.

    Triton's own launcher works out at each call how a kernel is compiled for the arguments. Here this is done at the
    first call, and later ones hand the arguments to the compiled kernel.

    Args:
        kernel: of Triton; its parameters are tensors (or None) first.
        options: ways to launch it, the fastest first. The first is taken whose program fits into the shared memory of
            the GPU.
    """

    def __init__(self, kernel: Any, options: Sequence[Option]) -> None:
        self.kernel, self.options = kernel, options
        self.option = options[0]
        self.run: Callable[..., None] | None = None

    def __call__(self, *memory: Memory | None) -> None:
        """Launch on the current stream of the memory's device, which must be the current device."""
        if self.run is not None:
            self.run(*memory, *self.option.arguments)
            return
        tensors = [x.tensor() if isinstance(x, View) else x for x in memory]
        if not tensors[0].is_cuda:  # type: ignore[union-attr]
            self.kernel[self.option.grid](*tensors, *self.option.arguments, num_warps=self.option.warps)
            return
        self.option, compiled = self._fitting(tensors)
        self.run = compiled[self.option.grid]
        self.run(*tensors, *self.option.arguments)

    def _fitting(self, tensors: Sequence[Tensor | None]) -> tuple[Option, Any]:
        """Return the first option whose program the GPU can hold, and the kernel compiled for it."""
        room = shared_memory(tensors[0].device)  # type: ignore[union-attr]
        needs = []
        for option in self.options:
            compiled = self.kernel.warmup(*tensors, *option.arguments, grid=option.grid, num_warps=option.warps)
            if compiled.metadata.shared <= room:
                return option, compiled
            needs.append(compiled.metadata.shared)
        raise UnsupportedError(
            f"no fused kernel: a program needs {min(needs)} bytes of shared memory, and the GPU has {room}; choose "
            "kernels('eager')"
        )


def shared_memory(device: torch.device) -> int:
    """Return how many bytes of shared memory a program may have."""
    index = device.index or 0
    if index not in _room:
        properties: Any = torch.cuda.get_device_properties(index)
        _room[index] = int(properties.shared_memory_per_block_optin)
    return _room[index]


def plain(inputs: Projection, *others: Tensor | None) -> bool:
    """Say whether a kernel may be launched at once: nothing traces the call or stands in for the tensors."""
    return not (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or any(type(x) not in PLAIN for x in (inputs.x, inputs.k, inputs.v, *others))
    )


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of x the current one, on whose stream Triton launches."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def aligned(*memory: Memory | None) -> int:
    """Return what begins at a multiple of 16 bytes, as bits: Triton compiles for that."""
    bits = 0
    for x in memory:
        bits = 2 * bits + (x is not None and x.data_ptr() % 16 == 0)
    return bits


def lowered(x: Tensor, heads: int) -> Tensor | None:
    """Return two flags a head, lowered, on the device of x; None for no heads.

    Kernels lower them again when they are done, so those of a stream serve all its launches, one after another. A
    launch that is recorded in a CUDA graph has flags of its own, since the graph may be replayed on another stream.
    """
    count = 2 * heads
    if not count:
        return None
    if not x.is_cuda:
        return x.new_zeros(count, dtype=torch.int32)
    index = x.device.index
    if torch.cuda.is_current_stream_capturing():
        slab, taken = _spare.get(index, (None, 0))
        if slab is None or taken + count > len(slab):
            return x.new_zeros(count, dtype=torch.int32)
        _spare[index] = slab, taken + count
        return slab[taken : taken + count]
    key = index, driver.active.get_current_stream(index)
    flags = _flags.get(key)
    if flags is None or len(flags) < count:
        flags = _flags[key] = x.new_zeros(max(count, 4096), dtype=torch.int32)
    if index not in _spare or _spare[index][1] > SPARE // 2:
        _spare[index] = x.new_zeros(SPARE, dtype=torch.int32), 0
    return flags
