"""What a training was done on, in few words: enough to tell later whether the data is still the same."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from visionattn.data.classification import ClassificationData
from visionattn.data.detection import DetectionData
from visionattn.data.labels import label_path


class Summary(BaseModel):
    """What a training is done on.

    Attributes:
        names: of the classes, in the order of their indices.
        counts: split -> number of images, without those left out.
        digests: split -> digest of the images' names, sizes in bytes and labels.
    """

    model_config = ConfigDict(frozen=True)

    names: list[str]
    counts: dict[str, int]
    digests: dict[str, str]

    def differences(self, now: "Summary") -> list[str]:
        """Say in words what is another way ``now``."""
        found = [] if self.names == now.names else [f"the classes were {self.names}, now they are {now.names}"]
        for split, count in self.counts.items():
            if now.counts.get(split) != count:
                found.append(f"{split} had {count} images, now it has {now.counts.get(split)}")
            elif now.digests.get(split) != self.digests[split]:
                found.append(f"other images or labels are in {split}")
        return found


def summarize_detection(data: DetectionData, splits: Iterable[str]) -> Summary:
    """Summarize splits of a detection set that was checked."""
    records = {split: [(image, _bytes_of(label_path(image))) for image in data.images[split]] for split in splits}
    return _summary(list(data.names.values()), records)


def summarize_classification(data: ClassificationData, samples: Mapping[str, Sequence[tuple[Path, int]]]) -> Summary:
    """Summarize the samples of splits that are trained on."""
    records = {split: [(image, str(index).encode()) for image, index in pairs] for split, pairs in samples.items()}
    return _summary(data.names, records)


def _summary(names: list[str], records: Mapping[str, Sequence[tuple[Path, bytes]]]) -> Summary:
    return Summary(
        names=names,
        counts={split: len(pairs) for split, pairs in records.items()},
        digests={split: _digest(pairs) for split, pairs in records.items()},
    )


def _digest(records: Sequence[tuple[Path, bytes]]) -> str:
    """Digest images and labels; images are named from the folder that all are in, so that a moved set is the same."""
    root = os.path.commonpath([image.parent for image, _ in records])
    digest = hashlib.sha256()
    for image, label in records:
        name = os.path.relpath(image, root)
        digest.update(f"{name}\0{image.stat().st_size}\0{len(label)}\0".encode(errors="surrogateescape") + label)
    return digest.hexdigest()


def _bytes_of(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""
