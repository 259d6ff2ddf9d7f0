import logging
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import ExifTags, Image

from tests.data.conftest import SetMaker, save_image, truncate
from visionattn.data import check_data, find_problems, label_path, load_detection_data, load_image, write_data_yaml
from visionattn.data.labels import read_labels
from visionattn.errors import DataError
from visionattn.pictures import image_size

BOX = "0 0.5 0.5 0.2 0.4\n"
GOOD = {"train/a": BOX, "val/b": BOX}


def test_yaml_is_read_relative_to_its_own_folder(make_set: SetMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_set(GOOD, "path: .\ntrain: images/train\nval: [images/val]\nnames: {0: cat, 1: dog}\n")
    monkeypatch.chdir("/")
    data = load_detection_data(str(file))
    assert data.names == {0: "cat", 1: "dog"}
    assert data.images == {s: [file.parent / f"images/{s}/{n}.png"] for s, n in (("train", "a"), ("val", "b"))}
    assert data.name == file.parent.name


def test_images_are_sorted_and_other_files_left_out(make_set: SetMaker) -> None:
    file = make_set({"train/b": BOX, "train/deep/a": BOX, "val/b": BOX})
    save_image(file.parent / "images/train/A.JPG")
    for other in ("notes.txt", ".hidden.png"):
        (file.parent / "images/train" / other).write_text("no image")
    names = [
        str(path.relative_to(file.parent / "images/train")) for path in load_detection_data(str(file)).images["train"]
    ]
    assert names == ["A.JPG", "b.png", "deep/a.png"]


def test_list_of_images(make_set: SetMaker) -> None:
    file = make_set(GOOD, "train: train.txt\nval: images/val\nnames: [cat, dog]\n")
    root = file.parent
    save_image(root / "elsewhere/images/c.png")
    (root / "train.txt").write_text(f"./images/train/a.png\n\n{root}/elsewhere/images/c.png\n")
    assert load_detection_data(str(file)).images["train"] == [
        root / "elsewhere/images/c.png",
        root / "images/train/a.png",
    ]


def test_roboflow_paths(make_set: SetMaker) -> None:
    file = make_set(GOOD, "train: ../images/train\nval: ../images/val\nnames: [cat, dog]\n")
    assert load_detection_data(str(file)).images["train"] == [file.parent / "images/train/a.png"]


def test_number_of_classes_alone(make_set: SetMaker) -> None:
    file = make_set(GOOD, "train: images/train\nval: images/val\nnc: 2\n")
    assert load_detection_data(str(file)).names == {0: "class_0", 1: "class_1"}


def test_download_key_is_never_run(make_set: SetMaker) -> None:
    file = make_set(GOOD)
    ran = file.parent / "ran"
    file.write_text(f"{file.read_text()}download: |\n  open({str(ran)!r}, 'w')\n")
    load_detection_data(str(file))
    assert not ran.exists()


SPLITS = "train: images/train\nval: images/val\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "expected a mapping"),
        ("train: [\n", "not valid YAML"),
        ("val: images/val\nnames: [cat]\n", "got train: None"),
        ("train: 3\nval: images/val\nnames: [cat]\n", "got train: 3"),
        (SPLITS, "names: None"),
        (SPLITS + "nc: two\n", "nc: 'two'"),
        (SPLITS + "names: []\n", r"names: \[\]"),
        (SPLITS + "names: {1: cat, 2: dog}\n", r"class indices \[1, 2\], expected 0..1"),
        (SPLITS + "names: [cat]\nnc: 2\n", "nc is 2 but there are 1 names"),
        ("train: images/no\nval: images/val\nnames: [cat]\n", "/images/no does not exist"),
        ("path: /nowhere\n" + SPLITS + "names: [cat]\n", "/nowhere/images/train does not exist"),
        ("train: empty\nval: images/val\nnames: [cat]\n", "no images in /.*/empty"),
        ("train: images/train/a.png\nval: images/val\nnames: [cat]\n", "expected a text file"),
    ],
)
def test_bad_yaml(make_set: SetMaker, text: str, message: str) -> None:
    file = make_set(GOOD, text)
    (file.parent / "empty").mkdir()
    with pytest.raises(DataError, match=message) as error:
        load_detection_data(str(file))
    assert str(file.parent) in str(error.value)


def test_missing_yaml(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*nothing\.yaml.*path of a data\.yaml"):
        load_detection_data(str(tmp_path / "nothing.yaml"))
    with pytest.raises(DataError, match="nearest: digits-scenes"):
        load_detection_data("digit-scenes")
    with pytest.raises(DataError, match="no file"):
        load_detection_data(str(tmp_path))


def test_split_not_asked_for_may_be_missing(make_set: SetMaker) -> None:
    file = make_set(GOOD, "val: images/val\nnames: [cat, dog]\n")
    assert list(load_detection_data(str(file), ["val"]).images) == ["val"]


def test_label_path_replaces_the_last_images_folder() -> None:
    assert label_path(Path("/images/set/images/train/a.b.jpg")) == Path("/images/set/labels/train/a.b.txt")
    assert label_path(Path("/set/pictures/a.jpg")) == Path("/set/pictures/a.txt")


MALFORMED = {
    "0 0.5 0.5 0.2": "got 4 numbers, expected 5",
    "0 0.5 0.5 0.2 0.2 0.9": "got 6 numbers",
    "0 0.1 0.1 0.2 0.2 0.3 0.3 0.4": "got 8 numbers",
    "0 0.5 0.5 0.2 wide": "not all fields are numbers",
    "cat 0.5 0.5 0.2 0.2": "not all fields are numbers",
    "0 0.5 0.5 nan 0.2": "outside 0..1",
    "2 0.5 0.5 0.2 0.2": r"got class 2, expected an integer in 0\.\.1",
    "-1 0.5 0.5 0.2 0.2": "got class -1",
    "0.5 0.5 0.5 0.2 0.2": r"got class 0\.5",
    "0 250 120 40 60": "not pixels",
    "0 -0.2 0.5 0.2 0.2": "outside 0..1",
    "0 0.1 0.1 0.2 0.2 1.3 0.3": "outside 0..1",
}
DEGENERATE = {
    "0 0.5 0.5 0 0.2": "width and height must be above 0",
    "0 0.1 0.1 0.2 0.1 0.3 0.1": "width and height must be above 0",
}


@pytest.mark.parametrize(("line", "reason"), [*MALFORMED.items(), *DEGENERATE.items()])
def test_malformed_line_is_named(make_set: SetMaker, line: str, reason: str) -> None:
    file = make_set({"train/a": f"\n{line}\n", "train/fine": BOX, "val/b": BOX})
    (problem,) = find_problems(load_detection_data(str(file)), ["train", "val"])
    assert problem.image.name == "a.png"
    with pytest.raises(DataError, match=reason):
        raise DataError(problem.reason)
    assert "labels/train/a.txt:2: " in problem.reason
    assert line in problem.reason


@pytest.mark.parametrize(
    "text",
    [
        *MALFORMED,
        BOX,
        "",
        "1 0.1 0.2 0.5 0.2 0.3 0.8\n",
        "1.0 1.005 0.5 0.2 0.2\n",
        BOX + "1 0.1 0.2 0.5 0.2 0.3 0.8\n",
    ],
)
def test_agrees_with_ultralytics(make_set: SetMaker, text: str) -> None:
    from ultralytics.data.utils import verify_image_label

    data = load_detection_data(str(make_set({"train/a": text, "val/b": BOX})))
    image = data.images["train"][0]
    _, theirs, *_, corrupt, message = verify_image_label(
        (str(image), str(label_path(image)), "", False, 2, 0, 0, False)
    )
    problems = find_problems(data, ["train"])
    assert bool(problems) == bool(corrupt), message
    if not corrupt:
        assert read_labels(label_path(image), 2) == pytest.approx(theirs, abs=1e-6)


def test_polygon_becomes_its_box(make_set: SetMaker) -> None:
    root = make_set({"train/a": "1 0.1 0.2 0.5 0.3 0.3 0.8\n"}).parent
    assert read_labels(root / "labels/train/a.txt", 2) == pytest.approx(np.array([[1, 0.3, 0.5, 0.4, 0.6]]))


def test_equal_lines_count_once(make_set: SetMaker) -> None:
    root = make_set({"train/a": BOX + "1 0.2 0.2 0.1 0.1\n" + BOX}).parent
    assert read_labels(root / "labels/train/a.txt", 2)[:, 0].tolist() == [0, 1]


def test_label_file_that_is_no_text(make_set: SetMaker) -> None:
    file = make_set(GOOD)
    (file.parent / "labels/train/a.txt").write_bytes(b"\xff\xfe\x00\x81")
    (problem,) = find_problems(load_detection_data(str(file)), ["train"])
    assert "not readable as text" in problem.reason


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp"])
def test_truncated_image_is_found(make_set: SetMaker, suffix: str) -> None:
    file = make_set(GOOD)
    truncate(save_image(file.parent / f"images/train/half{suffix}", (200, 200)))
    (problem,) = find_problems(load_detection_data(str(file)), ["train"])
    assert problem.image.name == f"half{suffix}"
    assert "unreadable image" in problem.reason


def test_empty_alien_and_tiny_images_are_found(make_set: SetMaker) -> None:
    file = make_set(GOOD)
    images = file.parent / "images/train"
    (images / "empty.jpg").touch()
    (images / "text.png").write_text("this is text")
    save_image(images / "tiny.png", (40, 9))
    problems = {p.image.name: p.reason for p in find_problems(load_detection_data(str(file)), ["train"])}
    assert set(problems) == {"empty.jpg", "text.png", "tiny.png"}
    assert problems["tiny.png"] == "40 x 9 pixels, expected 10 or more on each side"


def test_listed_image_that_is_missing(make_set: SetMaker) -> None:
    file = make_set(GOOD, "train: train.txt\nval: images/val\nnames: [cat, dog]\n")
    (file.parent / "train.txt").write_text("images/train/a.png\nimages/train/gone.png\n")
    (problem,) = find_problems(load_detection_data(str(file)), ["train"])
    assert problem.image.name == "gone.png"


def test_check_passes_a_good_set_unchanged(make_set: SetMaker) -> None:
    data = load_detection_data(str(make_set({"train/a": BOX, "train/no_objects": None, "val/b": ""})))
    assert check_data(data, ["train", "val"], skip_broken=False) == data


def test_check_lists_ten_problems_and_the_way_on(make_set: SetMaker) -> None:
    data = load_detection_data(str(make_set({f"train/{i:02d}": "9 9\n" for i in range(13)} | GOOD)))
    with pytest.raises(DataError) as error:
        check_data(data, ["train", "val"], skip_broken=False)
    message = str(error.value)
    assert "13 broken" in message
    assert message.count("got 2 numbers") == 10
    assert "and 3 more" in message
    assert "skip_broken" in message


def test_skip_broken_leaves_them_out_with_a_warning(make_set: SetMaker, caplog: pytest.LogCaptureFixture) -> None:
    data = load_detection_data(str(make_set(GOOD | {"train/broken": "9 9\n"})))
    with caplog.at_level(logging.WARNING, logger="visionattn"):
        kept = check_data(data, ["train"], skip_broken=True)
    assert [path.name for path in kept.images["train"]] == ["a.png"]
    assert kept.images["val"] == data.images["val"]
    assert "broken.png" in caplog.text
    assert len(caplog.records) == 1


def test_split_that_becomes_empty(make_set: SetMaker) -> None:
    data = load_detection_data(str(make_set(GOOD | {"val/b": "9 9\n"})))
    with pytest.raises(DataError, match=r"every image of val is broken:\n.*b\.png"):
        check_data(data, ["train", "val"], skip_broken=True)


def test_split_without_any_label_file(make_set: SetMaker) -> None:
    data = load_detection_data(str(make_set({"train/a": None, "val/b": BOX})))
    with pytest.raises(DataError, match=r"no image of train has a label file.*labels/train/a\.txt"):
        check_data(data, ["train", "val"], skip_broken=True)


def test_written_yaml_is_read_by_ultralytics(make_set: SetMaker, tmp_path: Path) -> None:
    from ultralytics.data.utils import check_det_dataset

    data = load_detection_data(str(make_set(GOOD)))
    file = write_data_yaml(data, tmp_path / "run")
    theirs = check_det_dataset(str(file), autodownload=False)
    assert theirs["names"] == data.names
    for split, images in data.images.items():
        assert Path(theirs[split]).read_text().split() == [str(path) for path in images]
    again = load_detection_data(str(file))
    assert (again.names, again.images) == (data.names, data.images)
    assert sorted(path.name for path in file.parent.iterdir()) == ["data.yaml", "train.txt", "val.txt"]
    assert yaml.safe_load(file.read_text())["path"] == str(tmp_path / "run")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_measured_size_is_that_of_the_loaded_image(tmp_path, suffix, orientation):
    path = tmp_path / f"picture{suffix}"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (80, 40)).save(path, exif=exif)
    height, width = load_image(path).shape[:2]
    assert image_size(path) == (width, height)
