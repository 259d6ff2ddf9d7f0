"""What Ultralytics may do to a user's machine and data: see pictures as we do, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ultralytics.data.dataset import YOLODataset
from ultralytics.utils import DEFAULT_CFG

from tests.test_pictures import gradient
from visionattn.data import load_image
from visionattn.data.files import image_fault
from visionattn.data.labels import read_labels
from visionattn.detection import why_left_out
from visionattn.detection.device_loader import DeviceLoader
from visionattn.detection.training import checked_options
from visionattn.errors import ConfigError, DataError

KINDS = {"gray.png": "L", "alpha.png": "LA", "palette.png": "P", "inks.jpg": "CMYK", "inks.tif": "CMYK", "a.jpg": "RGB"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures in many modes, one box each, and files of the user's that are called as pictures are."""
    images, labels = tmp_path / "images" / "train", tmp_path / "labels" / "train"
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for number, (name, mode) in enumerate(KINDS.items()):
        gradient(mode).save(images / f"{number}{name}")
        (labels / f"{number}{name}").with_suffix(".txt").write_text("0 0.5 0.5 0.2 0.2\n")
        np.save(images / f"{number}{Path(name).stem}.npy", np.zeros((20, 30, 3), np.uint8))
    np.save(images / "0gray.npy", np.zeros((20, 30), np.float32))
    (images / "1alpha.npy").write_bytes(b"not even an array")
    return images


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dataset(folder: Path, side: int = 30, **options: object) -> YOLODataset:
    hyp = {"hyp": DEFAULT_CFG, **options}
    data = {"names": {0: "thing"}, "nc": 1, "channels": 3}
    return YOLODataset(img_path=str(folder), data=data, imgsz=side, augment=False, **hyp)


def test_training_sees_what_everything_else_sees_and_touches_nothing(folder: Path) -> None:
    before = contents(folder.parents[1])
    files = dataset(folder)
    assert len(files) == len(KINDS)
    seen = {name: files.load_image(index)[0] for index, name in enumerate(files.im_files)}
    for name, pixels in seen.items():
        assert np.array_equal(pixels, load_image(Path(name))), name
    loader = DeviceLoader(files, 2, torch.device("cpu"), DEFAULT_CFG.__class__(**{**vars(DEFAULT_CFG), "imgsz": 30}))
    for index, name in enumerate(files.im_files):
        assert np.array_equal(loader.images[index, :20, :30].numpy()[..., ::-1], seen[name])
    assert contents(folder.parents[1]) == before, "no cache of labels or pictures beside the data"


def test_pictures_in_memory_are_allowed_and_on_disk_are_not(folder: Path) -> None:
    before = contents(folder.parents[1])
    files = dataset(folder, cache="ram")
    assert np.array_equal(files.load_image(0)[0], load_image(Path(files.im_files[0])))
    with pytest.raises(ConfigError, match=r"cache: disk writes NAME\.npy beside each picture"):
        dataset(folder, cache="disk")
    with pytest.raises(ConfigError, match="cache: disk"):
        checked_options({"cache": "disk"}, "cpu")
    assert contents(folder.parents[1]) == before


def test_a_jpeg_with_bytes_after_its_end_is_not_rewritten(folder: Path) -> None:
    path = next(folder.glob("*a.jpg"))
    with path.open("ab") as file:
        file.write(b"of a telephone")
    before = path.read_bytes()
    assert len(dataset(folder)) == len(KINDS)
    assert path.read_bytes() == before


def test_what_training_would_leave_out_is_told_before(folder: Path) -> None:
    path = folder / "0gray.png"
    label = folder.parents[1] / "labels" / "train" / "0gray.txt"
    assert why_left_out(path, label, 1) == ""
    label.write_text("0 0.5 0.5 0.2 0.2\n0 0.1 0.1 0.2 0.2 0.3 0.4\n")
    assert why_left_out(path, label, 1) == "Ultralytics would leave it out: labels mix segment and detection rows"
    Image.fromarray(np.ones((20, 30), np.float32)).save(folder / "9.tif")
    assert "mode F" in why_left_out(folder / "9.tif", label, 1)


def test_a_picture_that_cannot_be_read_stops_a_training(folder: Path) -> None:
    files = dataset(folder)
    (folder / "0gray.png").write_bytes(b"changed")
    with pytest.raises(DataError, match=r"0gray\.png: cannot be read"):
        files.load_image(files.im_files.index(str(folder / "0gray.png")))


@pytest.mark.parametrize("first", ["visionattn.detection", "ultralytics"])
def test_nothing_is_installed_or_downloaded_unless_told(tmp_path: Path, first: str) -> None:
    code = f"""
import subprocess
real = subprocess.check_output
def spy(command, *rest, **options):
    assert "install" not in str(command), command
    return real(command, *rest, **options)
subprocess.check_output = spy
import {first}
import visionattn.detection
import ultralytics.utils, ultralytics.utils.checks as checks
from pathlib import Path
from ultralytics.utils import downloads
from visionattn.data.files import image_fault
from visionattn.data.labels import read_labels
ultralytics.utils.ONLINE = checks.ONLINE = True
Path("text.jpg").write_text("hello")
print(image_fault(Path("text.jpg")))
print(checks.check_requirements("no-such-package-of-anyone"))
try:
    downloads.safe_download("https://example.com/weights.pt")
except ConnectionError as error:
    print(error)
"""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("YOLO_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=settings)
    assert done.returncode == 0, done.stderr
    *_, fault, _, installed, refused = done.stdout.splitlines()
    assert (fault, installed) == (image_fault(tmp_path / "text.jpg"), "False")
    advice = "get it yourself, or set YOLO_OFFLINE=false in the environment"
    assert refused == f"https://example.com/weights.pt is not downloaded; {advice}"


def test_a_label_that_changed_without_a_trace_is_seen(folder: Path) -> None:
    label = folder.parents[1] / "labels" / "train" / "0gray.txt"
    stamp = label.stat()
    first = dataset(folder).labels[0]["bboxes"].tolist()
    label.write_text("0 0.3 0.5 0.2 0.2\n")
    os.utime(label, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert label.stat().st_size == stamp.st_size
    second = dataset(folder).labels[0]["bboxes"].tolist()
    assert (first[0][0], second[0][0]) == pytest.approx((0.5, 0.3))


def test_boxes_a_hair_outside_and_labels_twice_are_trained_on_as_they_are_scored(folder: Path) -> None:
    label = folder.parents[1] / "labels" / "train" / "0gray.txt"
    label.write_text("0 1.0000001 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.2\n")
    image = folder / "0gray.png"
    assert why_left_out(image, label, 1) == ""
    trained = dataset(folder).labels[0]["bboxes"]
    assert np.allclose(sorted(trained.tolist()), sorted(read_labels(label, 1)[:, 1:].tolist()))
