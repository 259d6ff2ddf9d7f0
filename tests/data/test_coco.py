import json
import os
from pathlib import Path

import pytest
from PIL import Image
from pycocotools.coco import COCO

from tests.data.conftest import SetMaker, save_image
from visionattn.data import coco_ground_truth, load_detection_data, write_coco
from visionattn.errors import DataError


def test_boxes_in_pixels_by_hand(make_set: SetMaker) -> None:
    file = make_set({"val/a": "1 0.5 0.5 0.2 0.4\n0 0.25 0.5 0.5 1\n", "val/b": None, "train/c": ""})
    truth = coco_ground_truth(load_detection_data(str(file)), "val")  # images are 40 x 30 pixels
    images = file.parent / "images/val"
    assert truth["images"] == [
        {"id": 1, "file_name": str(images / "a.png"), "width": 40, "height": 30},
        {"id": 2, "file_name": str(images / "b.png"), "width": 40, "height": 30},
    ]
    assert truth["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert [a["bbox"] for a in truth["annotations"]] == [pytest.approx([16, 9, 8, 12]), pytest.approx([0, 0, 20, 30])]
    assert [a["area"] for a in truth["annotations"]] == pytest.approx([96, 600])
    assert [(a["id"], a["image_id"], a["category_id"], a["iscrowd"]) for a in truth["annotations"]] == [
        (1, 1, 2, 0),
        (2, 1, 1, 0),
    ]


def test_turned_photo_has_the_size_it_is_seen_in(make_set: SetMaker) -> None:
    file = make_set({"val/a": "0 0.5 0.5 0.5 0.5\n", "train/c": ""})
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    save_image(file.parent / "images/val/a.jpg", (40, 20), exif=exif)
    (file.parent / "images/val/a.png").unlink()
    truth = coco_ground_truth(load_detection_data(str(file)), "val")
    assert (truth["images"][0]["width"], truth["images"][0]["height"]) == (20, 40)
    assert truth["annotations"][0]["bbox"] == pytest.approx([5, 10, 10, 20])


def test_malformed_label_is_an_error(make_set: SetMaker) -> None:
    data = load_detection_data(str(make_set({"val/a": "0 0.5\n", "train/c": ""})))
    with pytest.raises(DataError, match=r"labels/val/a\.txt:1"):
        coco_ground_truth(data, "val")


def test_written_file_loads_in_pycocotools(scenes: Path, tmp_path: Path) -> None:
    truth = coco_ground_truth(load_detection_data(str(scenes / "data.yaml")), "val")
    write_coco(truth, tmp_path / "val.json")
    loaded = COCO(tmp_path / "val.json")
    assert len(loaded.imgs) == 12
    assert loaded.dataset == truth
    assert [path.name for path in tmp_path.iterdir()] == ["val.json"]


@pytest.mark.skipif("VISIONATTN_DATA" not in os.environ, reason="VISIONATTN_DATA is not set")
@pytest.mark.parametrize("name", ["bccd", "aquarium_416"])
def test_agrees_with_published_annotations(name: str) -> None:
    root = Path(os.environ["VISIONATTN_DATA"]) / name
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    truth = coco_ground_truth(load_detection_data(str(root / "data.yaml")), "val")
    published = json.loads((root / "annotations" / "val.json").read_text())
    assert [c["name"] for c in truth["categories"]] == [c["name"] for c in published["categories"]]

    def boxes(form: dict) -> list:
        file = {image["id"]: Path(image["file_name"]).name for image in form["images"]}
        found = [(file[a["image_id"]], a["category_id"], *(round(v) for v in a["bbox"])) for a in form["annotations"]]
        return sorted(found)

    assert len(truth["images"]) == len(published["images"])
    ours, theirs = boxes(truth), boxes(published)
    assert len(ours) == len(theirs)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    edges = [(a, b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one[2:], other[2:], strict=True)]
    assert sum(abs(a - b) > 1 for a, b in edges) <= 0.01 * len(edges)


def test_two_pictures_of_one_name_and_a_class_without_objects(make_set) -> None:
    file = make_set({"val/a/1": "1 0.5 0.5 0.2 0.2\n", "val/b/1": None, "train/1": "0 0.5 0.5 0.2 0.2\n"})
    truth = coco_ground_truth(load_detection_data(str(file)), "val")
    assert len({image["file_name"] for image in truth["images"]}) == 2
    assert [annotation["image_id"] for annotation in truth["annotations"]] == [1]
    assert [category["name"] for category in truth["categories"]] == ["cat", "dog"]
