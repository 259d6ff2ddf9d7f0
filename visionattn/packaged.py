"""What ships in the package: configurations, detector yamls and small weights, found by name after installation."""

from pathlib import Path
from typing import Literal

Kind = Literal["configs", "models", "weights"]

_FOLDERS: dict[Kind, tuple[str, str]] = {
    "configs": ("configs", ".yaml"),
    "models": ("detection/models", ".yaml"),
    "weights": ("weights", ".pt"),
}

DEFAULT_WEIGHTS = "yolo-lat-n-aquarium"
"""Weights that are taken where none are named."""


def packaged(kind: Kind) -> dict[str, Path]:
    """Return the files of a kind by name, such as ``detect/digits``, ``yolo-lat-n`` or ``yolo-lat-n-aquarium``."""
    place, suffix = _FOLDERS[kind]
    package = Path(__file__).parent
    root = package / place if (package / place).is_dir() else package.parent / place  # beside it in a checkout
    found = sorted(root.rglob(f"*{suffix}"))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in found}


def find_packaged(kind: Kind, name: str | Path) -> Path | None:
    """Return the file of a name, or None if there is none; a file that exists in the working folder goes before it.

    Args:
        kind: what is looked for.
        name: a name of :func:`packaged`, with or without its suffix and with or without the kind in front, as in
            ``configs/detect/digits.yaml``.
    """
    if Path(name).suffix and Path(name).is_file():
        return Path(name)
    plain = Path(name).as_posix().removeprefix(f"{kind}/").removesuffix(_FOLDERS[kind][1])
    return packaged(kind).get(plain)
