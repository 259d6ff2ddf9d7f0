"""The grid of the patches, for attentions in models whose blocks pass tokens alone."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from visionattn.errors import ConfigError, UnsupportedError


class Grid:
    """Reads the grid (H, W) off every image that is embedded, and hands it to every attention of the same call."""

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None

    def read(self, embedding: Any, args: tuple[Any, ...]) -> None:
        """Note the grid of the images that a patch embedding is called with."""
        height, width = args[0].shape[-2:]
        self.size = embedding.dynamic_feat_size((height, width))

    def give(self, attention: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Add the grid to the arguments of an attention's call."""
        if self.size is None:
            raise UnsupportedError("local needs the grid of the patches, but no image was embedded; call the model")
        return args, {"grid": self.size} | options


def tell_grid(model: nn.Module, attentions: Iterable[nn.Module]) -> None:
    """Let every call of the model tell its attentions the grid of its images.

    Raises:
        ConfigError: the model has no patch embedding of timm.
    """
    embedding = getattr(model, "patch_embed", None)
    if not hasattr(embedding, "dynamic_feat_size"):
        raise ConfigError(
            f"local: {type(model).__name__} has no patch embedding of timm, from which the grid of the patches is "
            "known; use local=0"
        )
    assert embedding is not None
    grid = Grid()
    model.attention_grid = grid  # type: ignore[assignment]
    embedding.register_forward_pre_hook(grid.read)
    for attention in attentions:
        attention.register_forward_pre_hook(grid.give, with_kwargs=True)
