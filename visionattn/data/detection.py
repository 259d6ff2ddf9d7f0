"""Detection sets in Ultralytics' form: read, checked, and handed on with absolute paths."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from visionattn.atomic import write_text
from visionattn.data.embedded import EMBEDDED, embedded_path
from visionattn.data.files import IMAGE_SUFFIXES, check_each, image_fault, list_images, listing
from visionattn.data.labels import label_path, read_labels
from visionattn.data.scenes import make_scenes
from visionattn.errors import DataError, suggest
from visionattn.pictures import image_size

LEAST_SIDE = 10
"""Smallest side of an image in pixels; Ultralytics leaves out smaller ones."""

HostCheck = Callable[[Path, Path, int], str]
"""Takes an image, its label file and the number of classes; returns why a library would leave the image out, or ""."""

_log = logging.getLogger("visionattn")


@dataclass(frozen=True)
class DetectionData:
    """A detection set; the labels of an image are at :func:`label_path`.

    Attributes:
        name: name of the set, for reports.
        names: class index -> class name, from 0 without gaps.
        images: split -> absolute image paths, sorted.
    """

    name: str
    names: dict[int, str]
    images: dict[str, list[Path]]


@dataclass(frozen=True)
class Problem:
    """An image that cannot be used, and why."""

    image: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.image}: {self.reason}"


def load_detection_data(source: str, splits: Sequence[str] = ("train", "val")) -> DetectionData:
    """Read which classes and images a detection set has; the files themselves are not opened.

    Args:
        source: name of an embedded set, or the path of a ``data.yaml`` in Ultralytics' form. Relative paths in it count
            from the yaml's own folder, and a ``download`` key is ignored.
        splits: splits that must be there.

    Raises:
        DataError: the yaml is missing or invalid, or a split, its folder or its images are missing.
    """
    file = embedded_path(source) / "data.yaml" if source in EMBEDDED else Path(source).absolute()
    if not file.is_file():
        scenes = [name for name, make in EMBEDDED.items() if make is make_scenes]
        accepted = "expected the path of a data.yaml, or the name of an embedded set of scenes"
        raise DataError(f"detection data {source}: there is no file {file}; {accepted} ({suggest(source, scenes)})")
    raw = _read_yaml(file)
    if raw.get("kpt_shape"):
        raise DataError(
            f"{file}: kpt_shape says that labels have keypoints, which would be taken for polygons; remove it, and "
            "all but the first five numbers of each label"
        )
    root = file.parent / str(raw.get("path") or "")
    images = {split: _split_images(raw, split, root, file) for split in splits}
    folder_named = source not in EMBEDDED and file.stem in ("data", "dataset")
    name = source if source in EMBEDDED else file.parent.name if folder_named else file.stem
    return DetectionData(name, _class_names(raw, file), images)


def find_problems(data: DetectionData, splits: Sequence[str], host: HostCheck | None = None) -> list[Problem]:
    """Decode every image and parse every label file of ``splits``; a missing label file is no problem.

    ``host`` is asked as well, of images and label files without a fault; it gets them and the number of classes.
    """
    images = list(dict.fromkeys(image for split in splits for image in data.images[split]))
    found = check_each(partial(_fault, classes=len(data.names), host=host), images, f"checking {data.name}")
    return [Problem(image, reason) for image, reason in found]


def check_data(
    data: DetectionData, splits: Sequence[str], skip_broken: bool, host: HostCheck | None = None
) -> DetectionData:
    """Check images and labels.

    Args:
        data: the set.
        splits: splits to check.
        skip_broken: go on without broken images, with a warning for each.
        host: a further check, as for :func:`find_problems`: of the library that is to train on them.

    Returns:
        The set, without broken images.

    Raises:
        DataError: images or labels are broken and ``skip_broken`` is off, or a split has no usable image or no labels.
    """
    for split in splits:
        if not any(label_path(image).is_file() for image in data.images[split]):
            wanted, beside = label_path(data.images[split][0]), data.images[split][0].with_suffix(".txt")
            why = f"no image of {split} has a label file; the first one would be {wanted}"
            if beside.is_file():
                why += f"; labels lie beside the images of a folder named images; move them to {wanted.parent}"
            raise DataError(f"{data.name}: {why}")
    problems = find_problems(data, splits, host)
    if problems and not skip_broken:
        raise DataError(
            f"{data.name}: {len(problems)} broken images or label files:\n{listing(problems)}\n"
            "mend or remove them, or go on without them (skip_broken)"
        )
    for problem in problems:
        _log.warning("left out: %s", problem)
    broken = {problem.image for problem in problems}
    images = {split: [path for path in data.images[split] if path not in broken] for split in splits}
    for split, kept in images.items():
        if not kept:
            raise DataError(f"{data.name}: every image of {split} is broken:\n{listing(problems)}")
    return replace(data, images={**data.images, **images})


def write_data_yaml(data: DetectionData, folder: Path) -> Path:
    """Write ``data.yaml`` and a ``<split>.txt`` of absolute image paths each below ``folder``, for Ultralytics.

    Returns:
        Path of the ``data.yaml``.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    lists = {split: folder / f"{split}.txt" for split in data.images}
    for split, file in lists.items():
        write_text(file, "".join(f"{image}\n" for image in data.images[split]))
    content = {"path": str(folder), **{split: str(file) for split, file in lists.items()}, "names": data.names}
    write_text(folder / "data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return folder / "data.yaml"


def _fault(image: Path, classes: int, host: HostCheck | None) -> str:
    fault = image_fault(image)
    if fault:
        return fault
    try:
        width, height = image_size(image)
        read_labels(label_path(image), classes)
    except DataError as error:
        return str(error)
    if min(width, height) < LEAST_SIDE:
        return f"{width} x {height} pixels, expected {LEAST_SIDE} or more on each side"
    return host(image, label_path(image), classes) if host else ""


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise DataError(f"{file}: got {type(raw).__name__}, expected a mapping with train, val and names")
    return raw


def _class_names(raw: dict[str, Any], file: Path) -> dict[int, str]:
    names, count = raw.get("names"), raw.get("nc")
    if names is None and type(count) is int and count > 0:
        return {index: f"class_{index}" for index in range(count)}
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise DataError(
            f"{file}: got names: {raw.get('names')!r}, nc: {count!r}; expected names: a list or mapping of class names"
        )
    unfit = [name for name in names.values() if type(name) not in (str, int, float)]
    if unfit:
        raise DataError(
            f"{file}: got the class name {unfit[0]!r}, which is no text; YAML takes yes, no, on, off, null and dates "
            "for something else unless they are in quotes"
        )
    if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
        raise DataError(f"{file}: got class indices {list(names)}, expected 0..{len(names) - 1} without gaps")
    if count is not None and count != len(names):
        raise DataError(f"{file}: nc is {count!r} but there are {len(names)} names; correct one or leave out nc")
    if len(set(map(str, names.values()))) < len(names):
        raise DataError(f"{file}: two classes have the same name in {list(names.values())}; give each its own")
    return {index: str(name) for index, name in sorted((int(key), value) for key, value in names.items())}


def _split_images(raw: dict[str, Any], split: str, root: Path, file: Path) -> list[Path]:
    entry = raw.get(split)
    entries: list[Any] = entry if isinstance(entry, list) else [entry]
    if not entries or not all(isinstance(part, str) and part for part in entries):
        raise DataError(f"{file}: got {split}: {entry!r}, expected a folder, a .txt list of images, or a list of those")
    images: set[Path] = set()
    for part in entries:
        place = _resolve(root, part)
        if not place.exists():
            raise DataError(f"{file}: {split}: {place} does not exist; correct path or {split}")
        found = list_images(place) if place.is_dir() else _listed(place)
        if not found:
            raise DataError(
                f"{file}: {split}: no images in {place}; suffixes known: {' '.join(sorted(IMAGE_SUFFIXES))}"
            )
        images.update(found)
    return sorted(images)


def _resolve(root: Path, part: str) -> Path:
    """Return where an entry is, by the name that the user gave: labels are sought beside it, not where links lead."""
    place = _plain(root / part)
    if not place.exists() and part.startswith("../"):  # Roboflow writes ../train/images for train/images
        within = _plain(root / part[3:])
        return within if within.exists() else place
    return place


def _plain(path: Path) -> Path:
    """Take ``..`` out of an absolute path, unless a link before it makes that another place."""
    plain = Path(os.path.normpath(path))
    return plain if not path.exists() or (plain.exists() and plain.samefile(path)) else path


def _listed(file: Path) -> list[Path]:
    """Return the images that a text file lists, one a line; relative paths count from the file's folder."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: expected a text file of image paths, one a line ({error})") from error
    paths = [_plain(file.parent / line.strip()) for line in lines if line.strip()]
    others = [path for path in paths if path.suffix.lower() not in IMAGE_SUFFIXES]
    if others:
        raise DataError(
            f"{file}: {len(others)} of {len(paths)} lines name no image:\n{listing(others)}\n"
            f"correct or remove them; suffixes known: {' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return paths
