"""From which resolution on a converted model is faster than the one that it was converted from."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.conversion.align import tokens_of
from visionattn.conversion.report import Speed
from visionattn.errors import ConfigError
from visionattn.profiling.clock import Graphed, on, peak_memory, time_in_turns


@torch.inference_mode()
def measure_crossover(
    student: nn.Module,
    teacher: nn.Module,
    sizes: Sequence[tuple[int, int]],
    *,
    batch: int = 1,
    rounds: int = 10,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> list[Speed]:
    """Time both models in turns at several sizes of image, where they are.

    On a GPU each is replayed as a CUDA graph, so that neither pays for launches from Python. Softmax attention is that
    of ``scaled_dot_product_attention``, which takes its fastest kernel.

    Args:
        student: the converted model.
        teacher: the one with softmax attention; both take images of any size, or of the sizes asked.
        sizes: (H, W) in pixels.
        batch: images of a call.
        rounds: timings of each; the median counts.
        dtype: of weights and images. Both models are cast to it and stay so.
        compiled: compile both by ``torch.compile`` first.

    Raises:
        ConfigError: a model does not take a size.
    """
    device = next(teacher.parameters()).device
    models = [model.eval().to(dtype) for model in (teacher, student)]
    speeds = []
    for height, width in sizes:
        torch.compiler.reset()
        images = torch.randn(batch, 3, height, width, device=device, dtype=dtype)
        try:
            tokens = tokens_of(models[0], images).shape[1]
        except Exception as error:  # a model refuses what it likes
            raise ConfigError(
                f"size {height}x{width}: the model does not take it ({error}); sides are multiples of its patches, and "
                "timm's models take any with dynamic_img_size=True"
            ) from error
        with on(device):
            memory = [peak_memory(partial(tokens_of, model, images), device) for model in models]
            calls = [_call(model, images, compiled) for model in models]
            times = time_in_turns(calls, device, rounds)
        form = ("compiled " if compiled else "") + ("graph" if device.type == "cuda" else "eager")
        speeds.append(Speed((height, width), tokens, times[0].median, times[1].median, memory[0], memory[1], form))
    return speeds


def blocks_within(milliseconds: float, speed: Speed, count: int) -> int:
    """Return how many of ``count`` blocks may keep softmax attention in a time, from the times of none and of all.

    Raises:
        ConfigError: even without any the model takes longer.
    """
    if speed.converted > milliseconds:
        raise ConfigError(
            f"budget of {milliseconds} ms: with no softmax block it takes {speed.converted:.3g} ms at "
            f"{speed.size[0]}x{speed.size[1]} pixels; give more, or a smaller size"
        )
    each = (speed.softmax - speed.converted) / count
    return count - 1 if each <= 0 else min(count - 1, int((milliseconds - speed.converted) / each))


def _call(model: nn.Module, images: Tensor, compiled: bool) -> Callable[[int], Any]:
    """Return what is timed: a call of the model, replayed as a graph on a GPU."""

    def forward(x: Tensor) -> Tensor:
        return tokens_of(model, x)

    run = torch.compile(forward) if compiled else forward
    return Graphed(run, [(images,)]) if images.is_cuda else lambda _: run(images)
