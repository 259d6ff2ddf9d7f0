"""Files of a data set: images are found and checked here."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from visionattn.errors import DataError
from visionattn.pictures import load_image

_log = logging.getLogger("visionattn")

IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".dng", ".heic", ".heif", ".jp2", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp")
)
"""Suffixes that Ultralytics takes for images."""

LISTED = 10
"""How many damaged files an error lists before it only counts the rest."""


def list_images(folder: Path) -> list[Path]:
    """Return the images below ``folder``, sorted; hidden files are left out.

    Links to folders elsewhere are followed, and an image is named as it is found. A link to a folder that is listed by
    itself, or that contains the link, is not followed: its images would be there twice, or without end.
    """
    found: list[Path] = []
    others: list[str] = []
    _walk(folder, os.path.realpath(folder), (), found, others)
    if others:
        pictures = [name for name in others if Path(name).suffix.lower() in Image.registered_extensions()]
        if pictures:
            _log.warning(
                "%s: %d pictures of formats that are not read are left out, such as %s; convert them to PNG or JPEG",
                *(folder, len(pictures), pictures[0]),
            )
    return sorted(found)


def leads_back(path: Path) -> bool:
    """Whether a folder is a link to a folder that contains the link."""
    return path.is_symlink() and _contains(os.path.realpath(path), os.path.realpath(path.parent))


def _walk(folder: Path, root: str, chain: tuple[str, ...], found: list[Path], others: list[str]) -> None:
    """Collect images and names of other files below a folder that was reached through the real folders of ``chain``."""
    chain = (*chain, os.path.realpath(folder))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            real = os.path.realpath(path)
            if entry.is_symlink() and (_contains(root, real) or any(_contains(real, above) for above in chain)):
                _log.warning("%s is not followed: it links to %s, which is listed already", path, real)
            else:
                _walk(path, root, chain, found, others)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            found.append(path)
        else:
            others.append(entry.name)


def _contains(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(outer.rstrip(os.sep) + os.sep)


def image_fault(path: Path) -> str:
    """Decode an image whole and return what is wrong with it, or an empty string."""
    try:
        load_image(path)
    except DataError as error:
        return f"unreadable image: {str(error).removeprefix(f'{path}: ')}"
    return ""


def check_each(check: Callable[[Path], str], paths: Sequence[Path], title: str) -> list[tuple[Path, str]]:
    """Run ``check`` over files in threads, under a progress bar; return (path, fault) of those with a fault."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        faults = tqdm(pool.map(check, paths), total=len(paths), desc=title, leave=False)
        return [(path, fault) for path, fault in zip(paths, faults, strict=True) if fault]


def listing(problems: Iterable[Any]) -> str:
    """Return one indented line for each of the first problems and a count of the others."""
    lines = [f"  {problem}" for problem in problems]
    more = [f"  ... and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n".join(lines[:LISTED] + more)
