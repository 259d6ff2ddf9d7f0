"""What of Ultralytics is switched or replaced, in this one place, when :mod:`visionattn.detection` is imported.

Unless the user says otherwise, nothing is installed or downloaded; and whatever the user says, nothing is written
beside the pictures of a data set, and they are read by our one reader.
"""

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visionattn.errors import ConfigError
from visionattn.pictures import image_size, load_image

SWITCHES = {"YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true"}
"""Environment variables of Ultralytics, and what they are unless the user has set them."""


def settle() -> None:
    """Switch Ultralytics and replace its readers and writers of data sets, also where it was imported before us."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    from PIL import Image
    from ultralytics.data import base, dataset, utils
    from ultralytics.utils import patches

    _switch_off()
    Image.open = patches._image_open  # Ultralytics' own would install a decoder for a file that is no picture
    base.imread = _read
    base.BaseDataset.npy_files = _NoFiles()
    base.BaseDataset.check_cache_disk = _refuse_disk
    utils.check_image = _check
    dataset.YOLODataset._load_or_scan_cache = _scan
    dataset.save_dataset_cache_file = _mark


def why_left_out(image: Path, label: Path, classes: int) -> str:
    """Return why Ultralytics would leave an image out of a training, or an empty string."""
    from ultralytics.data.utils import verify_image_label

    found = verify_image_label((str(image), str(label), "", False, classes, 0, 0, False))
    return "" if found[0] else f"Ultralytics would leave it out: {found[-1].rpartition('image/label: ')[2]}"


def _switch_off() -> None:
    """Let what was read from the environment at import be as it is now."""
    import ultralytics.utils as package
    from ultralytics.data import utils
    from ultralytics.utils import checks, downloads, events

    def on(name: str) -> bool:
        return os.environ[name].strip().lower() in ("1", "true", "yes", "on", "y", "t")

    for module in (package, checks):
        module.AUTOINSTALL = on("YOLO_AUTOINSTALL")
    if on("YOLO_OFFLINE"):
        for module in (package, checks, events):
            module.ONLINE = False
        downloads.is_url = _no_url
        for module in (downloads, utils):
            module.safe_download = _no_download


def _no_url(url: Any, check: bool = False) -> bool:
    """Take the place of Ultralytics' ``is_url``; asked whether a file can be had from there, say that it cannot."""
    return False if check else str(url).startswith(("http://", "https://"))


def _no_download(url: Any, *_: Any, **__: Any) -> Path:
    raise ConnectionError(f"{url} is not downloaded; get it yourself, or set YOLO_OFFLINE=false in the environment")


class _NoFile:
    """Stands for the file ``NAME.npy`` beside a picture, which may be anything of the user's: it is never there.

    Being pickled by its name, it also brings :func:`settle` into a loader's process that does not inherit it.
    """

    def exists(self) -> bool:
        return False


class _NoFiles:
    """In the place of a data set's list of these files."""

    def __get__(self, owner: Any, _: Any = None) -> list[_NoFile]:
        return owner.__dict__["npy_files"] if owner is not None else []

    def __set__(self, owner: Any, files: list[Path]) -> None:
        owner.__dict__["npy_files"] = [_NoFile()] * len(files)


def _refuse_disk(*_: Any) -> bool:
    raise ConfigError("cache: disk writes NAME.npy beside each picture of the data set; take cache: ram, or none")


def _read(filename: Any, flags: int = cv2.IMREAD_COLOR) -> NDArray[np.uint8] | None:
    """Read a picture for a training as for everything else."""
    from ultralytics.utils import patches

    return load_image(Path(filename)) if flags == cv2.IMREAD_COLOR else patches.imread(filename, flags)


def _check(file: Any) -> tuple[str, tuple[int, int]]:
    """Return no message and the (height, width) of a picture; Ultralytics' own check rewrites some JPEGs in place."""
    width, height = image_size(Path(file))
    if min(width, height) < 10:
        raise ValueError(f"image size {(height, width)} <10 pixels")
    return "", (height, width)


def _scan(files: Any, cache: Path, _: str) -> tuple[dict[str, Any], bool]:
    """Read labels from their files, whatever cache of them lies in the data set: it is a pickle, and may run code."""
    handed = list(files.im_files)
    found = files.cache_labels(cache)
    kept = {label["im_file"] for label in found["labels"]}
    files.left_out = [file for file in handed if file not in kept]
    return found, False


def _mark(prefix: str, path: Path, content: dict[str, Any], version: str) -> None:
    """Write no cache, but say its version, as the caller expects."""
    content["version"] = version
