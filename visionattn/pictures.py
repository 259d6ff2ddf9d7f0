"""The one reader of pictures: checks, training, scoring, calibration and prediction see the same pixels."""

import importlib
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from visionattn.errors import DataError

FORMATS = frozenset(("AVIF", "BMP", "DIB", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "TIFF", "WEBP"))
"""Formats that are read, whatever the suffix of a file says: those of the suffixes that data sets may have."""

MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"))
"""PIL's modes that have a plain meaning as eight bits of red, green and blue; an alpha channel is dropped."""

LEAST_WHITE = 4096
"""Where the brightest of 16-bit pixels is darker, they hold 12 bits or fewer; their upper 8 bits are nearly black."""


def load_image(path: Path) -> NDArray[np.uint8]:
    """Read a picture, turned upright by its EXIF orientation; of a file with several pictures the first one.

    Of 16 bits the upper eight are taken.

    Returns:
        BGR array of shape (H, W, 3).

    Raises:
        DataError: the file is missing, damaged, cut short, or its pixels have no plain meaning in 8 bits.
    """
    try:
        with _opened(path) as image:
            deep = _has_16_bits(image)
            image.load()  # tells if it is cut short, and forgets how its bits lay
            pixels = _upper_bits(path) if deep else _eight_bits(image)
    except DataError:
        raise
    except Exception as error:  # decoders raise what they like
        raise _unreadable(path, error) from error
    return np.ascontiguousarray(pixels)


def pixels_of(picture: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of an opened picture of PIL as :func:`load_image` would, turned upright; it is left as it is.

    Returns:
        BGR array of shape (H, W, 3).

    Raises:
        DataError: its pixels have no plain meaning in 8 bits.
    """
    if picture.mode not in MODES:
        raise DataError(
            f"got a picture of PIL's mode {picture.mode}, which has no plain meaning in 8 bits; convert it to RGB"
        )
    return np.ascontiguousarray(_eight_bits(picture.copy()))


def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height) in pixels of the upright picture, from the file's header alone where that tells it.

    Raises:
        DataError: the file is missing or no picture.
    """
    try:
        with _opened(path) as image:
            width, height = image.size
            sideways = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            exact = image.format in ("JPEG", "MPO", "PNG", "WEBP")
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    if sideways and not exact:  # whether a decoder turns it by itself differs from format to format
        height, width = load_image(path).shape[:2]
        return width, height
    return (height, width) if sideways else (width, height)


def _opened(path: Path) -> Image.Image:
    """Open a file and refuse what is not to be decoded."""
    try:
        image = Image.open(path)
    except UnidentifiedImageError:
        if path.suffix.lower() not in (".heic", ".heif"):
            raise
        _learn_heif(path)
        image = Image.open(path)
    if image.format not in FORMATS:
        raise _unfit(path, f"its content is {image.format}, whatever its name says")
    if image.mode not in MODES and not _has_16_bits(image):
        raise _unfit(path, f"its pixels are of PIL's mode {image.mode}, which has no plain meaning in 8 bits")
    return image


def _learn_heif(path: Path) -> None:
    try:
        importlib.import_module("pi_heif").register_heif_opener()
    except ImportError as error:
        raise DataError(
            f"{path}: HEIC is read by pi-heif, which is not installed; pip install pi-heif, or convert it to JPEG"
        ) from error


def _has_16_bits(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or any(";16" in str(tile) for tile in getattr(image, "tile", ()))


def _eight_bits(image: Image.Image) -> NDArray[np.uint8]:
    ImageOps.exif_transpose(image, in_place=True)
    return cv2.cvtColor(np.asarray(image if image.mode == "RGB" else image.convert("RGB")), cv2.COLOR_RGB2BGR)


def _upper_bits(path: Path) -> NDArray[np.uint8]:
    """Read 16 bits a channel, which PIL cannot for colours."""
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if pixels is None or pixels.dtype != np.uint16:
        raise _unfit(path, "its 16-bit pixels cannot be read as whole numbers from 0 to 65535")
    if 0 < pixels.max() < LEAST_WHITE:
        raise _unfit(path, f"the brightest of its 16-bit pixels is {pixels.max()} of 65535, nearly black in 8 bits")
    return (pixels >> 8).astype(np.uint8)


def _unfit(path: Path, why: str) -> DataError:
    return DataError(f"{path}: {why}; convert it to an 8-bit PNG or JPEG")


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = "in no format that is known" if isinstance(error, UnidentifiedImageError) else error
    return DataError(f"{path}: cannot be read as an image ({reason}); replace or remove the file")
