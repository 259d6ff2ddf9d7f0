"""How our classes reach Ultralytics: its yaml parser, its restricted loader and its multi-GPU workers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from ultralytics.nn import tasks
from ultralytics.utils.callbacks.base import default_callbacks

from visionattn.attention import ATTENTION
from visionattn.ops import slay


def register(blocks: Iterable[type[nn.Module]], parts: Iterable[type[nn.Module]] = ()) -> None:
    """Make ``blocks`` usable by name in a model yaml, and loadable with everything they hold, such as ``parts``.

    Raises:
        RuntimeError: Ultralytics already has another class of that name.
    """
    blocks = list(blocks)
    for block in blocks:
        if getattr(tasks, block.__name__, block) is not block:
            raise RuntimeError(f"Ultralytics already knows another {block.__name__}; rename the block")
        setattr(tasks, block.__name__, block)
    maps = [features for _, features in slay.POLYNOMIALS.values()]  # a SlayAttention holds one
    named: Any = [(block, f"{block.__module__}.{block.__name__}") for block in blocks]  # equal classes are told apart
    torch.serialization.add_safe_globals([*named, *parts, *ATTENTION.values(), *maps])
    default_callbacks["on_pretrain_routine_start"].append(_known_in_workers)


def _known_in_workers(trainer: Any) -> None:
    """Do nothing: a multi-GPU worker unpickles this function by name, and so imports this package before it trains."""
