import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import save_image, truncate
from visionattn.data import check_images, load_classification_data, load_image
from visionattn.data.digits import make_digits
from visionattn.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("train/dog/1.png", "train/cat/2.JPG", "train/cat/1.png", "val/dog/3.png", "val/cat/4.png"):
        save_image(tmp_path / "pets" / name)
    return tmp_path / "pets"


def test_classes_and_samples(root: Path) -> None:
    (root / "train/.cache").mkdir()
    (root / "train/cat/notes.txt").touch()
    data = load_classification_data(str(root))
    assert data.name == "pets"
    assert data.names == ["cat", "dog"]
    assert data.folders == {"train": root / "train", "val": root / "val"}
    assert data.samples("train") == [
        (root / "train" / n, i) for n, i in (("cat/1.png", 0), ("cat/2.JPG", 0), ("dog/1.png", 1))
    ]


def test_embedded_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONATTN_CACHE", str(tmp_path))
    data = load_classification_data("digits")
    assert data.name == "digits"
    assert data.names == list("0123456789")
    counts = {split: len(data.samples(split)) for split in ("train", "val")}
    assert sum(counts.values()) == 1797
    assert 0.18 < counts["val"] / 1797 < 0.22
    image = load_image(data.samples("val")[0][0])
    assert image.shape == (32, 32, 3)
    assert image.max() > 200
    assert image.min() == 0


def test_digits_are_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_digits(tmp_path / name)
    for path in (tmp_path / "one" / "val").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: root.rename(root.with_name("gone")), r"no folder .*pets"),
        (lambda root: (root / "val").rename(root / "valid"), r"pets/val is missing"),
        (lambda root: (root / "val/dog").rename(root / "val/wolf"), r"train lacks the class folders wolf"),
        (lambda root: (root / "val/dog/3.png").unlink(), r"no images .*\n.*val/dog"),
        (lambda root: [path.unlink() for path in (root / "val").rglob("*.png")], r"val/cat\n.*val/dog"),
    ],
)
def test_incomplete_set(root: Path, spoil, message: str) -> None:
    spoil(root)
    with pytest.raises(DataError, match=message):
        load_classification_data(str(root))


def test_folder_without_classes(tmp_path: Path) -> None:
    save_image(tmp_path / "train/loose.png")
    with pytest.raises(DataError, match="no class folders"):
        load_classification_data(str(tmp_path), ["train"])


def test_misspelt_embedded_name() -> None:
    with pytest.raises(DataError, match="nearest: digits"):
        load_classification_data("digitss")


def test_broken_images_stop_the_run(root: Path) -> None:
    data = load_classification_data(str(root))
    assert check_images(data, ["train", "val"], skip_broken=False) == []
    truncate(root / "train/cat/2.JPG")
    with pytest.raises(DataError, match=r"1 broken images:\n.*2\.JPG: unreadable image.*\n.*skip_broken"):
        check_images(data, ["train", "val"], skip_broken=False)


def test_broken_images_are_named_and_returned(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = load_classification_data(str(root))
    truncate(root / "train/cat/2.JPG")
    with caplog.at_level(logging.WARNING, logger="visionattn"):
        assert check_images(data, ["train", "val"], skip_broken=True) == [root / "train/cat/2.JPG"]
    assert "2.JPG" in caplog.text


def test_split_that_is_all_broken(root: Path) -> None:
    data = load_classification_data(str(root))
    for path in (root / "val").rglob("*.png"):
        truncate(path)
    with pytest.raises(DataError, match="every image of val is broken"):
        check_images(data, ["train", "val"], skip_broken=True)


def test_load_image_is_bgr(tmp_path: Path) -> None:
    Image.new("RGB", (4, 2), (250, 100, 20)).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert image.shape == (2, 4, 3)
    assert image.dtype == np.uint8
    assert image[0, 0].tolist() == [20, 100, 250]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [("L", 90, 90), ("RGBA", (90, 90, 90, 255), 90), ("I;16", 90 * 256, 90), ("1", 1, 255)],
)
def test_load_image_of_any_mode(tmp_path: Path, mode: str, colour, expected: int) -> None:
    Image.new(mode, (4, 2), colour).save(tmp_path / "a.png")
    assert (load_image(tmp_path / "a.png") == np.full((2, 4, 3), expected)).all()


def test_load_image_turns_photos_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save_image(tmp_path / "a.jpg", (40, 20), exif=exif)
    assert load_image(tmp_path / "a.jpg").shape == (40, 20, 3)


def test_load_image_without_opencvs_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 2), (250, 100, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(cv2, "imdecode", lambda *_: None)  # as for a format that this OpenCV was built without
    assert load_image(tmp_path / "a.png")[0, 0].tolist() == [20, 100, 250]


@pytest.mark.parametrize("content", [None, b"", b"not an image"])
def test_load_image_names_a_broken_file(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png: cannot be read as an image"):
        load_image(tmp_path / "a.png")
