"""What a user sees when something is wrong: what was got, what is accepted, what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class VisionAttnError(Exception):
    """Base of every error meant for a user; the command line prints it and exits with code 2."""


class ConfigError(VisionAttnError, ValueError):
    """A configuration or an option has an unknown key or an unacceptable value."""


class DataError(VisionAttnError):
    """A data set is missing, incomplete or damaged."""


class WeightsError(VisionAttnError):
    """Weights are missing, damaged, not ours, unsafe to load, or do not fit."""


class SourceError(VisionAttnError):
    """An image, a folder, a video or a camera cannot be opened."""


class UnknownNameError(VisionAttnError, LookupError):
    """A name is not registered."""


class UnsupportedError(VisionAttnError):
    """A mechanism does not offer what was asked of it."""


class HardwareError(UnsupportedError):
    """A file needs other hardware than there is."""


class ExportError(VisionAttnError):
    """A network cannot be written in a format, or the file cannot be used."""


class ParityError(ExportError):
    """An exported file does not compute what the weights compute."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``accepted: a, b, c; nearest: b`` for the end of an error message about an unknown ``name``."""
    names = sorted(known)
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    nearest = f"; nearest: {', '.join(close)}" if close else ""
    return f"accepted: {', '.join(names)}{nearest}"
