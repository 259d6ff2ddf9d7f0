"""Which blocks are to keep softmax attention: those whose conversion costs most, measured one at a time."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.conversion.align import tokens_of
from visionattn.conversion.calibrate import Images, batches
from visionattn.errors import ConfigError

Keep = int | Sequence[int] | Literal["auto"]


@torch.no_grad()
def sensitivity(student: nn.Module, teacher: nn.Module, images: Images) -> dict[str, float]:
    """Put one attention of the student at a time into the teacher, and measure what it does to the final tokens.

    Args:
        student: converted, with all attentions in question.
        teacher: what it was converted from; it is as it was afterwards.
        images: a few hundred, or a few dozen for a first look: a tensor (B, 3, H, W), or batches.

    Returns:
        For the path of each attention, one less the cosine of the final tokens to the teacher's, both less the
        teacher's mean token.
    """
    layers: dict[str, Any] = student.attention_layers  # type: ignore[assignment]
    device = next(teacher.parameters()).device
    grid = getattr(student, "attention_grid", None)
    losses = dict.fromkeys(layers, 0.0)
    count, middle = 0, torch.zeros(0)
    for batch in batches(images):
        batch = batch.to(device)
        if grid is not None:
            grid.read(student.patch_embed, (batch,))
        expected = tokens_of(teacher, batch).float()
        middle = middle if middle.numel() else expected.flatten(0, -2).mean(0)
        for path in layers:
            owner, _, name = path.rpartition(".")
            block, old = teacher.get_submodule(owner), teacher.get_submodule(path)
            setattr(block, name, student.get_submodule(path))
            try:
                found = tokens_of(teacher, batch).float()
            finally:
                setattr(block, name, old)
            losses[path] += _loss(found, expected, middle) * len(batch)
        count += len(batch)
    return {path: loss / count for path, loss in losses.items()}


def most_sensitive(losses: dict[str, float], count: int) -> list[int]:
    """Return the indices of the attentions whose conversion costs most, in the order of the model."""
    order = sorted(range(len(losses)), key=list(losses.values()).__getitem__, reverse=True)
    return sorted(order[:count])


def kept_blocks(keep: Keep, count: int) -> set[int]:
    """Return the indices of the blocks that are named to keep softmax attention, counted from 0.

    Raises:
        ConfigError: there is no such block, or none is left to convert.
    """
    if isinstance(keep, str) or (isinstance(keep, int) and keep):
        raise ConfigError(f"keep_softmax={keep!r}; give a list of blocks, such as [8, 9], 0 for none, or 'auto'")
    chosen = [] if isinstance(keep, int) else list(keep)
    found = {index + count if index < 0 else index for index in chosen}
    if not all(0 <= index < count for index in found):
        raise ConfigError(f"keep_softmax={chosen}: the model has {count} blocks, 0 to {count - 1}")
    if len(found) == count:
        raise ConfigError(f"keep_softmax={chosen} keeps all {count} blocks; leave some to convert")
    return found


def _loss(found: Tensor, expected: Tensor, middle: Tensor) -> float:
    return 1 - F.cosine_similarity(found - middle, expected - middle, dim=-1).mean().item()
