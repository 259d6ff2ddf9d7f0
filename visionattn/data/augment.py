"""Augmentations of albumentations, by name, as a configuration lists them."""

import copy
import inspect
import json
import os
import warnings
from collections.abc import Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from visionattn.errors import ConfigError

if TYPE_CHECKING:
    import albumentations as A

_UNFIT = frozenset(("Lambda", "Normalize", "ToFloat", "FromFloat", "ToTensorV2", "ToTensor3D"))
"""Not storable in a checkpoint, or not returning an 8-bit image, which the trainers need."""


def build_augment(specs: list[dict[str, dict[str, Any]]]) -> list["A.BasicTransform"]:
    """Build transforms from ``[{HorizontalFlip: {p: 0.5}}, ...]``, in the order given.

    Raises:
        ConfigError: a name is unknown or unfit, or an argument is refused.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise importing it asks PyPI for news
    import albumentations as A

    known = {
        name: member
        for name, member in inspect.getmembers(A, inspect.isclass)
        if issubclass(member, A.BasicTransform) and member.__module__.startswith("albumentations.augmentations")
    }
    return [_build(spec, known) for spec in specs]


def variants(transforms: list["A.BasicTransform"]) -> Iterator[list["A.BasicTransform"]]:
    """Yield copies to try: with all that comes by chance, with nothing of it, and with each part of it alone."""
    chance = [index for index, transform in enumerate(transforms) if transform.p < 1]
    for chosen in dict.fromkeys((tuple(chance), (), *((index,) for index in chance))):
        copies = copy.deepcopy(transforms)
        for index, transform in enumerate(copies):
            transform.p = 1.0 if index not in chance or index in chosen else 0.0
        yield copies


def _build(spec: dict[str, dict[str, Any]], known: dict[str, type["A.BasicTransform"]]) -> "A.BasicTransform":
    if len(spec) != 1:
        raise ConfigError(
            f"augment: got {spec}, expected one name with its arguments, e.g. {{HorizontalFlip: {{p: 0.5}}}}"
        )
    name, arguments = next(iter(spec.items()))
    if name in _UNFIT:
        raise ConfigError(
            f"augment: {name} cannot be used: it has to be storable and to return an 8-bit image; remove it"
        )
    if name not in known:
        close = ", ".join(get_close_matches(name, known, n=3, cutoff=0.4)) or "none"
        raise ConfigError(
            f"augment: unknown transform {name!r}; nearest: {close}; all: https://albumentations.ai/explore"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # albumentations only warns of arguments it does not know
            transform = known[name](**arguments)
        json.dumps(transform.to_dict())
    except Exception as error:  # pydantic's, albumentations' and Python's own
        accepted = ", ".join(inspect.signature(known[name]).parameters)
        raise ConfigError(f"augment: {name}: {_reason(error)}; its arguments are: {accepted}") from error
    return transform


def _reason(error: Exception) -> str:
    if isinstance(error.__cause__, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.__cause__.errors())
    return str(error)
