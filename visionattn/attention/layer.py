"""Options for a mechanism, in the form that a host wants: a class."""

import copyreg
import inspect
from functools import cache
from typing import Any

from visionattn.attention.base import Attention
from visionattn.attention.registry import ATTENTION
from visionattn.errors import ConfigError, suggest


def attention_layer(mechanism: str | type[Attention], **options: Any) -> type[Attention]:
    """Return a mechanism with some of its options set, a class that timm takes as ``attn_layer``.

    ::

        timm.create_model("vit_tiny_patch16_224", attn_layer=visionattn.attention_layer("slay", poly="exact"))

    Args:
        mechanism: a name in :data:`~visionattn.attention.ATTENTION`, or a class, which may have options set already.
        **options: keyword arguments of the mechanism's class.

    Raises:
        UnknownNameError: no such mechanism.
        ConfigError: no such option, or a value that cannot be hashed.
    """
    base: Any = ATTENTION[mechanism] if isinstance(mechanism, str) else mechanism
    known = _options(base)
    for option in options:
        if option not in known:
            raise ConfigError(f"{mechanism} has no option {option!r}; {suggest(option, known)}")
    if isinstance(base, _Configured):
        base, options = base.base, dict(base.options) | options
    try:
        return _layer(base, tuple(sorted(options.items()))) if options else base
    except TypeError as error:
        raise ConfigError(
            f"{mechanism}: got {options}; give numbers, names and functions as options ({error})"
        ) from error


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
    """The class of classes that :func:`attention_layer` makes: pickled by base and options, as they have no module."""

    base: type[Attention]
    options: tuple[tuple[str, Any], ...]


@cache
def _layer(base: type[Attention], options: tuple[tuple[str, Any], ...]) -> Any:
    def construct(cls: type, *args: Any, **kwargs: Any) -> Attention:
        return base(*args, **(dict(options) | kwargs))  # an ordinary instance: it pickles, and loads as data

    body = {"__new__": construct, "__module__": base.__module__, "__doc__": base.__doc__}
    layer = _Configured(base.__name__, (base,), body)
    layer.base, layer.options = base, options
    return layer


copyreg.pickle(_Configured, lambda layer: (_layer, (layer.base, layer.options)))
