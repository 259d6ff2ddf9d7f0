"""Images are listed where the user put them: links are followed once, and what is left out is named."""

import logging
from pathlib import Path

import pytest

from tests.data.conftest import SetMaker, save_image
from visionattn.data import label_path, load_classification_data, load_detection_data
from visionattn.data.files import list_images
from visionattn.data.labels import read_labels
from visionattn.errors import DataError

BOX = "0 0.5 0.5 0.2 0.4\n"


def names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in list_images(folder)]


@pytest.mark.parametrize("target", [".", "..", "../..", "deep"])
def test_a_link_to_a_folder_that_is_listed_anyway_is_not_followed(
    tmp_path: Path, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "set" / "train"
    save_image(folder / "a.png")
    save_image(folder / "deep" / "b.png")
    (folder / "self").symlink_to(target)
    assert names(folder) == ["a.png", "deep/b.png"]
    assert f"{folder / 'self'} is not followed" in caplog.text


def test_links_to_each_other_are_followed_once(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        save_image(tmp_path / "set" / name / f"{name}.png")
        (tmp_path / "set" / name / "other").symlink_to(f"../{other}")
    assert names(tmp_path / "set") == ["a/a.png", "b/b.png"]
    assert names(tmp_path / "set" / "a") == ["a.png", "other/b.png"]


def test_labels_are_sought_where_the_list_of_images_stands(make_set: SetMaker) -> None:
    file = make_set({"train/a": BOX, "val/b": BOX}, "train: [images/train, images/more]\nval: images/val\nnames: [x]\n")
    root = file.parent
    save_image(root / "pool" / "c.png")
    (root / "images" / "more").symlink_to("../pool")
    (root / "labels" / "more").mkdir()
    (root / "labels" / "more" / "c.txt").write_text(BOX)
    images = load_detection_data(str(file)).images["train"]
    assert images == [root / "images/more/c.png", root / "images/train/a.png"]
    assert all(len(read_labels(label_path(image), 1)) == 1 for image in images)


def test_a_set_behind_a_link_keeps_its_own_labels(make_set: SetMaker, tmp_path: Path) -> None:
    file = make_set({"train/a": BOX, "val/b": BOX})
    link = tmp_path / "link"
    link.symlink_to(file.parent / "images")
    (tmp_path / "d.yaml").write_text("train: link/../images/train\nval: link/val\nnames: [x]\n")
    images = load_detection_data(str(tmp_path / "d.yaml")).images
    assert images == {"train": [file.parent / "images/train/a.png"], "val": [link / "val/b.png"]}


def test_a_list_that_names_what_is_no_image(make_set: SetMaker) -> None:
    file = make_set({"train/a": BOX, "val/b": BOX}, "train: t.txt\nval: images/val\nnames: [x]\n")
    (file.parent / "t.txt").write_text("images/train/a.png\nimages/train/c.gif\n")
    with pytest.raises(DataError, match=r"t\.txt: 1 of 2 lines name no image:\n  .*c\.gif\n"):
        load_detection_data(str(file))


def test_pictures_of_other_formats_in_a_folder_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "b.gif")
    (tmp_path / "notes.txt").touch()
    with caplog.at_level(logging.WARNING):
        assert names(tmp_path) == ["a.png"]
    assert "1 pictures of formats that are not read are left out, such as b.gif" in caplog.text


def test_a_class_folder_that_leads_back_is_no_class(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in "ab":
            save_image(tmp_path / split / name / "1.png")
        (tmp_path / split / "self").symlink_to(".")
    with pytest.raises(DataError, match=r"train/self is a link to a folder that contains it; remove it"):
        load_classification_data(str(tmp_path))


@pytest.mark.parametrize("text", ["[yes, no]", "{0: on, 1: cat}", "[~, cat]", "[2020-01-01, cat]", "[[a], cat]"])
def test_a_class_name_that_yaml_takes_for_something_else(make_set: SetMaker, text: str) -> None:
    file = make_set({"train/a": BOX, "val/b": BOX}, f"train: images/train\nval: images/val\nnames: {text}\n")
    with pytest.raises(DataError, match=r"got the class name .*, which is no text; YAML takes yes, no, .* in quotes"):
        load_detection_data(str(file))


def test_keypoints_are_not_taken_for_polygons(make_set: SetMaker) -> None:
    file = make_set({"train/a": BOX, "val/b": BOX})
    file.write_text(file.read_text() + "kpt_shape: [4, 2]\n")
    with pytest.raises(DataError, match="kpt_shape says that labels have keypoints"):
        load_detection_data(str(file))


def test_lines_that_are_one_in_single_precision_are_one(tmp_path: Path) -> None:
    polygons = "0 0.1 0.1 0.3 0.1 0.3 0.3\n0 0.1 0.1 0.1 0.3 0.3 0.3\n"  # two of the same box are two objects
    (tmp_path / "a.txt").write_text(f"{BOX}0 0.5000000001 0.5 0.2 0.4\n")
    (tmp_path / "b.txt").write_text(polygons + polygons)
    assert len(read_labels(tmp_path / "a.txt", 1)) == 1
    assert len(read_labels(tmp_path / "b.txt", 1)) == 2


def test_labels_beside_images_of_a_folder_named_images(make_set: SetMaker) -> None:
    file = make_set({"train/a": None, "val/b": BOX})
    (file.parent / "images/train/a.txt").write_text(BOX)
    from visionattn.data import check_data

    with pytest.raises(
        DataError, match=r"labels lie beside the images of a folder named images; move them to .*labels"
    ):
        check_data(load_detection_data(str(file)), ("train",), skip_broken=False)
