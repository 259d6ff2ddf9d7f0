"""Options for a mechanism, in the form that a host wants: a class."""

import copyreg
import inspect
from functools import cache
from typing import Any

from visionattn.attention.base import Attention
from visionattn.attention.registry import ATTENTION
from visionattn.errors import ConfigError, suggest


def attention_layer(name: str, **options: Any) -> type[Attention]:
    """Return a mechanism with some of its options set, a class that timm takes as ``attn_layer``.

    ::

        timm.create_model("vit_tiny_patch16_224", attn_layer=visionattn.attention_layer("slay", poly="exact"))

    Args:
        name: in :data:`~visionattn.attention.ATTENTION`.
        **options: keyword arguments of the mechanism's class.

    Raises:
        UnknownNameError: no such mechanism.
        ConfigError: no such option, or a value that cannot be hashed.
    """
    known = [*_options(ATTENTION[name])]
    for option in options:
        if option not in known:
            raise ConfigError(f"{name} has no option {option!r}; {suggest(option, known)}")
    return _layer(name, tuple(sorted(options.items()))) if options else ATTENTION[name]


def _options(cls: type[Attention]) -> set[str]:
    """Keyword-only arguments of the constructors, besides those that the host gives."""
    found = {
        parameter.name
        for base in cls.__mro__
        if issubclass(base, Attention)
        for parameter in inspect.signature(base.__init__).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    return found - {"device", "dtype", "projections"}


class _Configured(type):
    """The class of classes that :func:`attention_layer` makes: pickled by name and options, as they have no module."""

    name: str
    options: tuple[tuple[str, Any], ...]


@cache
def _layer(name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    base = ATTENTION[name]

    def construct(self: Attention, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **(dict(options) | kwargs))

    body = {"__init__": construct, "__module__": base.__module__, "__doc__": base.__doc__}
    layer = _Configured(base.__name__, (base,), body)
    layer.name, layer.options = name, options
    return layer


copyreg.pickle(_Configured, lambda layer: (_layer, (layer.name, layer.options)))
