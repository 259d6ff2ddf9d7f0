"""Buffers of random features."""

from typing import Any

from torch import Tensor, nn

from visionattn.errors import ConfigError


def at_least_one(**option: int) -> int:
    """Return the one option, or raise ConfigError if it is below 1."""
    ((name, value),) = option.items()
    if value < 1:
        raise ConfigError(f"{name}={value}; give at least 1")
    return value


class RandomFeatures(nn.Module):
    """Buffers that a seed determines; a mixin for attention modules, which give :meth:`draw`.

    The buffers are part of the state dict. Loading one that lacks them, a checkpoint of timm say, keeps those drawn.
    """

    random = True

    def draw(self) -> dict[str, Tensor]:
        """Draw the buffers, by name, on the CPU."""
        raise NotImplementedError

    def register(self, device: Any, dtype: Any) -> None:
        """Make the buffers; to be called once, at the end of ``__init__``."""
        for name, values in self.draw().items():
            self.register_buffer(name, values.to(device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Draw the buffers anew, in place; the same seed gives the same."""
        for name, values in self.draw().items():
            self.get_buffer(name).copy_(values)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        own = {prefix + name: buffer for name, buffer in self.named_buffers(recurse=False)}
        super()._load_from_state_dict(own | state_dict, prefix, *args)
