"""Many trainings at once as a user runs them: a report, nothing done twice, a model that fails."""

import csv
import json

import cv2
import pytest
import yaml

from tests.detection.test_head import TINY
from visionattn.data.scenes import make_scenes
from visionattn.detection import load_detector

EPOCHS = 2


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "digits-scenes"
    make_scenes(folder, size=64, counts={"train": 8, "val": 4})
    return folder


@pytest.fixture
def place(scenes, tmp_path):
    """A recipe, two models that can be trained, and one that cannot."""
    options = {"epochs": EPOCHS, "batch": 4, "imgsz": 64, "device": "cpu", "workers": 0, "loader": "device"}
    recipe = {"task": "detect", "model": "yolo-lat-n", "data": str(scenes / "data.yaml"), **options}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe | {"ultralytics": {"plots": False, "val": False}}))
    text = TINY.format(reg_max=1, end2end="false")
    (tmp_path / "thin.yaml").write_text(text)
    (tmp_path / "wide.yaml").write_text(text.replace("[32, ", "[48, "))
    (tmp_path / "wrong.yaml").write_text(text.replace("LAT", "LATT"))
    return tmp_path


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_two_at_once_then_nothing_new_and_a_failure_is_a_row(tool, place, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else the tool sets it, for good
    arguments = ("--config", "r.yaml", "--model", "thin.yaml", "--model", "wide.yaml", "--model", "wrong.yaml")
    arguments = (*arguments, "--jobs", 2, "--output", "out/league.json")
    done = tool("benchmark_detectors", place, *arguments)
    assert done.returncode == 2, done.stderr
    assert "error: 1 of 3 trainings failed, see out/league.md; mend what it says and give the same " in done.stderr
    report = json.loads((place / "out" / "league.json").read_text())
    assert report["recipe"]["epochs"] == EPOCHS
    assert "torch" in report["environment"]["versions"]
    thin, wide, wrong = sorted(report["runs"], key=lambda run: run["model"])
    for run in (thin, wide):
        folder = place / "runs" / "detect" / f"r-{run['model'][:-5]}-seed0"
        assert run["scores"] == json.loads((folder / "metrics.json").read_text())
        network = load_detector(folder / "weights" / "best.pt").model.fuse(verbose=False)
        assert run["parameters"] == sum(parameter.numel() for parameter in network.parameters())
        with (folder / "results.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        losses = [sum(float(row[key]) for key in row if key.startswith("train/")) for row in rows]
        assert [epoch for epoch, _ in run["losses"]] == [1, 2]
        assert [loss for _, loss in run["losses"]] == pytest.approx(losses, abs=1e-3)
        assert not run["reason"]
        assert run["device"] == report["environment"]["device"]
    assert wide["parameters"] > thin["parameters"]
    assert (wrong["scores"], wrong["parameters"]) == ({}, None)
    assert "LATT" in wrong["reason"]
    assert "r-wrong-seed0.log" in wrong["reason"]
    for name in ("thin", "wide", "wrong"):
        assert name in "".join(path.read_text() for path in (place / "out").glob("*.md"))
    assert cv2.imread(str(place / "out" / "league-losses.png")).std() > 1, "no blank picture"

    before = files(place / "runs" / "detect")
    again = tool("benchmark_detectors", place, *arguments)
    assert again.returncode == 2, again.stderr
    assert files(place / "runs" / "detect") == before
    after = json.loads((place / "out" / "league.json").read_text())
    assert sorted(after["runs"], key=lambda run: run["model"]) == [thin, wide, wrong]
