"""Classification sets: a folder for each split, in it a folder of images for each class."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visionattn.data.embedded import EMBEDDED, embedded_path
from visionattn.data.files import check_each, image_fault, leads_back, list_images, listing
from visionattn.errors import DataError, suggest

_log = logging.getLogger("visionattn")


@dataclass(frozen=True)
class ClassificationData:
    """A classification set.

    Attributes:
        name: name of the set, for reports.
        names: class names, sorted; the position is the class index.
        folders: split -> folder of class folders.
    """

    name: str
    names: list[str]
    folders: dict[str, Path]

    def samples(self, split: str) -> list[tuple[Path, int]]:
        """Return (image path, class index) of all images of a split, in order."""
        return [
            (image, index) for index, name in enumerate(self.names) for image in list_images(self.folders[split] / name)
        ]


def load_classification_data(source: str, splits: Sequence[str] = ("train", "val")) -> ClassificationData:
    """Read which classes a classification set has; the images are not opened.

    Args:
        source: name of an embedded set, or a folder with ``<split>/<class>/<image>``.
        splits: splits that must be there.

    Raises:
        DataError: a folder is missing, splits have different classes, or a class has no images.
    """
    root = embedded_path(source) if source in EMBEDDED else Path(source).absolute()
    if not root.is_dir():
        accepted = "expected a folder of <split>/<class>/<image>, or the name of an embedded set"
        raise DataError(
            f"classification data {source}: there is no folder {root}; {accepted} ({suggest(source, EMBEDDED)})"
        )
    folders = {split: root / split for split in splits}
    classes = {split: _class_names(folder, root) for split, folder in folders.items()}
    names = sorted(set().union(*classes.values()))
    for split, found in classes.items():
        lacking = [name for name in names if name not in found]
        if lacking:
            raise DataError(f"{root}: {split} lacks the class folders {', '.join(lacking)}, which other splits have")
    data = ClassificationData(source if source in EMBEDDED else root.name, names, folders)
    for split in splits:
        filled = {index for _, index in data.samples(split)}
        empty = [str(folders[split] / name) for index, name in enumerate(names) if index not in filled]
        if empty:
            raise DataError(
                f"{root}: no images in these class folders:\n{listing(empty)}\nfill them or remove the class"
            )
    return data


def check_images(data: ClassificationData, splits: Sequence[str], skip_broken: bool) -> list[Path]:
    """Decode every image of ``splits``.

    Args:
        data: the set.
        splits: splits to check.
        skip_broken: warn of each broken image instead of raising.

    Returns:
        The broken images, to be left out.

    Raises:
        DataError: images are broken and ``skip_broken`` is off, or a split has no usable image.
    """
    images = {split: [path for path, _ in data.samples(split)] for split in splits}
    faults = check_each(image_fault, [path for split in splits for path in images[split]], f"checking {data.name}")
    lines = [f"{path}: {fault}" for path, fault in faults]
    if lines and not skip_broken:
        raise DataError(
            f"{data.name}: {len(lines)} broken images:\n{listing(lines)}\n"
            "replace or remove them, or go on without them (skip_broken)"
        )
    broken = [path for path, _ in faults]
    for split, paths in images.items():
        if set(paths) <= set(broken):
            raise DataError(f"{data.name}: every image of {split} is broken:\n{listing(lines)}")
    for line in lines:
        _log.warning("left out: %s", line)
    return broken


def _class_names(folder: Path, root: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"{root}: the folder {folder} is missing; expected one folder of class folders a split")
    found = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    for entry in found:
        if leads_back(entry):
            raise DataError(f"{entry} is a link to a folder that contains it; remove it, or it would be a class")
    names = [entry.name for entry in found]
    if not names:
        raise DataError(f"{folder}: no class folders; expected {folder}/<class>/<image>")
    return sorted(names)
