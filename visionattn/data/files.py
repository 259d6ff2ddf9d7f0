"""Files of a data set: images are found, measured, checked and read here; text is written whole or not at all."""

import glob
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from visionattn.errors import DataError

IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".dng", ".heic", ".heif", ".jp2", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp")
)
"""Suffixes that Ultralytics takes for images."""

LISTED = 10
"""How many damaged files an error lists before it only counts the rest."""


def list_images(folder: Path) -> list[Path]:
    """Return the images below ``folder``, sorted; hidden files are left out."""
    # Path.glob would not follow links to folders
    found = (folder / name for name in glob.glob("**/*.*", root_dir=folder, recursive=True))  # noqa: PTH207
    return sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)


def load_image(path: Path) -> NDArray[np.uint8]:
    """Read an image, turned upright by its EXIF orientation.

    Returns:
        BGR array of shape (H, W, 3).

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        encoded = np.fromfile(path, np.uint8)
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if encoded.size else None
        if image is None:  # a format that OpenCV lacks, or a damaged file, of which PIL tells more
            with Image.open(path) as opened:
                image = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))[..., ::-1]
    except Exception as error:  # decoders raise what they like
        reason = "in no format that is known" if isinstance(error, ImportError) else error
        raise DataError(f"{path}: cannot be read as an image ({reason}); replace or remove the file") from error
    return np.ascontiguousarray(image, dtype=np.uint8)


def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height) in pixels of the upright image, from the file's header alone.

    Raises:
        DataError: the file is missing or no image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            sideways = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            exact = image.format in ("JPEG", "MPO", "PNG", "WEBP")
    except Exception as error:
        raise DataError(f"{path}: cannot be read as an image ({error}); replace or remove the file") from error
    if sideways and not exact:  # whether a decoder turns it by itself differs from format to format
        height, width = load_image(path).shape[:2]
        return width, height
    return (height, width) if sideways else (width, height)


def image_fault(path: Path) -> str:
    """Decode an image whole and return what is wrong with it, or an empty string."""
    try:
        with Image.open(path) as image:
            image.load()
    except ImportError:  # Ultralytics makes PIL look for a HEIF decoder before it gives up
        return "unreadable image: in no format that is known"
    except Exception as error:
        return f"unreadable image: {error}"
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


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text under a name beside ``path``, then move it into place."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
