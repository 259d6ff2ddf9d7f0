"""The one switch between fused kernels and eager formulas."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from visionattn.errors import ConfigError, suggest

Path = Literal["auto", "fused", "eager"]
PATHS: tuple[Path, ...] = ("auto", "fused", "eager")

_chosen: list[Path] = []

listeners: list[Callable[[bool, str], None]] = []
"""Who is told of each choice: whether a kernel is taken, and why not."""


def tell(fused: bool, reason: str) -> None:
    """Tell all listeners of a choice."""
    for listener in listeners:
        listener(fused, reason)


def path() -> Path:
    """Return the path chosen by :func:`kernels`, or else by the variable ``VISIONATTN_KERNELS``, or else ``auto``."""
    return _chosen[-1] if _chosen else _checked(os.environ.get("VISIONATTN_KERNELS", "auto"))


@contextmanager
def kernels(path: Path) -> Iterator[None]:
    """Choose how attention is computed, in all threads, within a ``with`` block.

    A backward pass that computes a forward pass anew (activation checkpointing) belongs in the same block.

    Args:
        path: ``auto``: by fused kernels where there are some for the mechanism, the device and the inputs, by eager
            formulas elsewhere. ``fused``: by fused kernels, or not at all. ``eager``: by eager formulas.

    Raises:
        ConfigError: no such path.
    """
    _chosen.append(_checked(path))
    try:
        yield
    finally:
        _chosen.pop()


def _checked(name: str) -> Path:
    if name not in PATHS:
        raise ConfigError(f"kernels: got {name!r}; {suggest(name, PATHS)}")
    return name
