import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.random import default_rng

import visionattn.data.scenes as scenes_module
from visionattn.data import EMBEDDED, coco_ground_truth, embedded_path, find_problems, load_detection_data
from visionattn.data.digits import load_glyphs
from visionattn.data.scenes import draw_scene, make_scenes
from visionattn.errors import DataError, UnknownNameError


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VISIONATTN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_glyphs_are_split_without_overlap() -> None:
    (train, train_digits), (val, val_digits) = load_glyphs("train"), load_glyphs("val")
    assert not {glyph.tobytes() for glyph in train} & {glyph.tobytes() for glyph in val}
    assert len(train) + len(val) == 1797
    for digits in (train_digits, val_digits):
        assert np.bincount(digits).min() > 0.8 * np.bincount(digits).max()


def test_photographs_are_split_without_overlap() -> None:
    from sklearn.datasets import load_sample_images

    pieces = zip(scenes_module._photos("train"), scenes_module._photos("val"), strict=True)
    for (train, val), photo in zip(pieces, load_sample_images().images, strict=True):
        assert np.array_equal(np.hstack([train, val])[..., ::-1], photo)


def test_scenes_form_a_sound_set(scenes: Path) -> None:
    data = load_detection_data(str(scenes / "data.yaml"))
    assert {split: len(images) for split, images in data.images.items()} == {"train": 24, "val": 12}
    assert data.names == {digit: str(digit) for digit in range(10)}
    assert find_problems(data, ["train", "val"]) == []
    assert cv2.imread(str(data.images["train"][0])).shape == (160, 160, 3)


def test_scenes_hold_one_to_five_digits_apart(scenes: Path) -> None:
    truth = json.loads((scenes / "annotations/train.json").read_text())
    for image in truth["images"]:
        boxes = [a["bbox"] for a in truth["annotations"] if a["image_id"] == image["id"]]
        assert 1 <= len(boxes) <= 5
        for index, (x, y, w, h) in enumerate(boxes):
            assert 14 <= h <= 70
            assert 0 <= x <= x + w <= 160
            assert 0 <= y <= y + h <= 160
            for x2, y2, w2, h2 in boxes[:index]:
                shared = max(0, min(x + w, x2 + w2) - max(x, x2)) * max(0, min(y + h, y2 + h2) - max(y, y2))
                assert shared <= 0.1 * min(w * h, w2 * h2)


def test_annotations_agree_with_labels(scenes: Path) -> None:
    written = json.loads((scenes / "annotations/val.json").read_text())
    derived = coco_ground_truth(load_detection_data(str(scenes / "data.yaml")), "val")
    assert [i["file_name"] for i in written["images"]] == [Path(i["file_name"]).name for i in derived["images"]]
    for one, other in zip(written["annotations"], derived["annotations"], strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])


def test_boxes_are_tight_around_the_ink(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = np.full((160, 160, 3), 128.0, np.float32)
    monkeypatch.setattr(scenes_module, "_photo", lambda *_: plain)
    monkeypatch.setattr(scenes_module, "_texture", lambda *_: plain)
    photos, (glyphs, digits) = scenes_module._photos("train"), scenes_module._clear_glyphs("train")
    for seed in range(10):
        scene, objects = draw_scene(default_rng(seed), 160, photos, glyphs, digits)
        ink = np.abs(scene.astype(float) - 128).max(-1) > 30  # the noise stays below
        outside = ink.copy()
        for _, (x1, y1, x2, y2) in objects:
            outside[max(y1 - 1, 0) : y2 + 1, max(x1 - 1, 0) : x2 + 1] = False
            inside = ink[y1:y2, x1:x2]
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
        assert not outside.any()


def test_same_seed_same_bytes(scenes: Path, tmp_path: Path) -> None:
    counts = {"train": 24, "val": 12}
    make_scenes(tmp_path / "again", counts=counts)
    assert content(tmp_path / "again") == content(scenes)
    make_scenes(tmp_path / "other", counts=counts, seed=1)
    assert content(tmp_path / "other") != content(scenes)


def test_digits_can_be_told_apart(scenes: Path) -> None:
    """A nearest neighbour among glyphs of train names nearly all glyphs of val that scenes use."""
    (train, known), (val, wanted) = (scenes_module._clear_glyphs(split) for split in ("train", "val"))
    distance = ((val.reshape(len(val), 1, -1) - train.reshape(1, len(train), -1)) ** 2).sum(-1)
    assert (known[distance.argmin(1)] == wanted).mean() > 0.98


def test_unknown_name(cache: Path) -> None:
    with pytest.raises(UnknownNameError, match="nearest: digits"):
        embedded_path("digit")
    assert not cache.exists()


def test_made_once(cache: Path) -> None:
    folder = embedded_path("digits")
    assert folder.parent == cache
    (folder / "mark").touch()
    assert (embedded_path("digits") / "mark").exists()
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_failure_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("interrupted")

    monkeypatch.setitem(EMBEDDED, "digits", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        embedded_path("digits")
    assert list(cache.iterdir()) == []


def test_two_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_at_work = threading.Barrier(2, timeout=30)

    def make(folder: Path) -> None:
        (folder / "file").write_text("whole")
        both_at_work.wait()

    monkeypatch.setitem(EMBEDDED, "digits", make)
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(embedded_path("digits"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2
    assert folders[0] == folders[1]
    assert content(folders[0]) == {"file": b"whole"}
    assert list(cache.iterdir()) == [folders[0]]


SLOW_MAKER = """
import time
from visionattn.data.embedded import EMBEDDED, embedded_path

def make(folder):
    (folder / "half").touch()
    print("half", flush=True)
    time.sleep(60)

EMBEDDED["digits"] = make
embedded_path("digits")
"""


def test_killed_half_way(cache: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW_MAKER], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    with process.stdout:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    folder = embedded_path("digits")
    assert not list(folder.rglob("half"))
    assert len(list((folder / "val").iterdir())) == 10


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VISIONATTN_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set VISIONATTN_CACHE to a folder"):
        embedded_path("digits")
