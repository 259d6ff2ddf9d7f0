"""Transformer blocks: residual layouts around an attention and an MLP, with the constructor of timm's block."""

import inspect
from functools import partial
from typing import Any

from visionattn.blocks.hyperlink import HyperLinkBlock, MemoryLobe
from visionattn.blocks.moe import MoEMlp, balance_loss
from visionattn.blocks.prenorm import PreNormBlock
from visionattn.errors import ConfigError, UnknownNameError, suggest

BLOCKS: dict[str, Any] = {part.__name__: part for part in (PreNormBlock, HyperLinkBlock, MoEMlp)}
"""What timm takes as ``block_fn`` or ``mlp_layer``, by name."""


def block_layer(name: str, **options: Any) -> Any:
    """Return a block of :data:`BLOCKS` with some of its options set, in a form that timm takes.

    Raises:
        UnknownNameError: no such block.
        ConfigError: no such option.
    """
    if name not in BLOCKS:
        raise UnknownNameError(f"unknown block {name!r}; {suggest(name, BLOCKS)}")
    parameters = inspect.signature(BLOCKS[name]).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise ConfigError(f"{name} has no option {option!r}; {suggest(option, known)}")
    return partial(BLOCKS[name], **options) if options else BLOCKS[name]


__all__ = ["BLOCKS", "HyperLinkBlock", "MemoryLobe", "MoEMlp", "PreNormBlock", "balance_loss", "block_layer"]
