"""Data sets that need no download: made on first use, kept in a cache folder."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_cache_dir

from visionattn.data.digits import make_digits
from visionattn.data.scenes import SEED, make_scenes
from visionattn.errors import DataError, UnknownNameError, suggest

EMBEDDED: dict[str, Callable[[Path], None]] = {"digits": make_digits, "digits-scenes": make_scenes}
"""Name of a set -> what makes it below a folder."""

VERSION = 1
"""Raised when a maker changes what it makes."""


def embedded_path(name: str) -> Path:
    """Return the folder of an embedded set, made on first use.

    The cache is ``$VISIONATTN_CACHE`` or the user's cache folder. The set is made under a temporary name, so a process
    that is killed, or another one that makes the same set, does no harm.

    Raises:
        UnknownNameError: there is no such set.
        DataError: the cache folder cannot be written.
    """
    if name not in EMBEDDED:
        raise UnknownNameError(f"unknown embedded data set {name!r}; {suggest(name, EMBEDDED)}")
    cache = Path(os.environ.get("VISIONATTN_CACHE") or user_cache_dir("visionattn")).absolute()
    folder = cache / f"{name}-v{VERSION}-seed{SEED}"
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _make(name, folder)
        except OSError as error:
            raise DataError(
                f"cannot write the embedded data set {name} to {cache} ({error}); "
                "set VISIONATTN_CACHE to a folder with space that you may write"
            ) from error
    return folder


def embedded_pictures(name: str) -> Path:
    """Return the folder of an embedded set's val pictures; arguments and errors are those of :func:`embedded_path`."""
    folder = embedded_path(name)
    scenes = folder / "images" / "val"
    return scenes if scenes.is_dir() else folder / "val"


def _make(name: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch) / "set"
        made.mkdir()
        EMBEDDED[name](made)
        try:
            made.replace(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first
                raise
