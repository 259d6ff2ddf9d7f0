"""A detector trained on batches made on the device, as a configuration says: to the end, and after a kill."""

import csv

import pytest

from tests.detection.test_head import tiny
from visionattn.config import DetectConfig, parse_config
from visionattn.data.scenes import make_scenes
from visionattn.detection import trainer
from visionattn.detection.trainer import DeviceTrainer
from visionattn.engine.detect import scoring_device
from visionattn.engine.train import train

EPOCHS = 4


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits-scenes")
    make_scenes(folder, size=64, counts={"train": 10, "val": 4})
    return folder / "data.yaml"


@pytest.fixture
def config(scenes, tmp_path):
    options = {"close_mosaic": 1, "degrees": 10.0, "val": False, "plots": True}
    raw = {"epochs": EPOCHS, "batch": 4, "imgsz": 64, "device": "cpu", "workers": 0, "ultralytics": options}
    raw |= {"task": "detect", "model": str(tiny(tmp_path)), "data": str(scenes), "loader": "device", "name": "first"}
    made = parse_config(raw | {"output": str(tmp_path / "runs")})
    assert isinstance(made, DetectConfig)
    return made


@pytest.fixture
def seen(monkeypatch):
    """What trainings saw: epoch, files, brightness and boxes of each batch."""
    found = []
    stock = DeviceTrainer.preprocess_batch

    def look(self, batch):
        found.append((self.epoch, batch["im_file"], int(batch["img"].sum()), float(batch["bboxes"].sum())))
        return stock(self, batch)

    monkeypatch.setattr(DeviceTrainer, "preprocess_batch", look)
    return found


def epochs_logged(folder):
    with (folder / "results.csv").open(newline="") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


def test_a_resumed_training_sees_what_it_would_have_seen(config, seen, monkeypatch):
    whole = train(config)
    assert epochs_logged(whole.folder) == list(range(1, EPOCHS + 1))
    assert 0 <= whole.metrics["ap"] <= 1
    assert (whole.folder / "train_batch0.jpg").is_file()
    expected = seen.copy()
    assert len(expected) == 3 * EPOCHS
    assert len({(*files, *sums) for _, files, *sums in expected}) == len(expected), "no batch was seen twice"
    seen.clear()

    quiet = config.ultralytics | {"plots": False}
    second = config.model_copy(update={"name": "second", "ultralytics": quiet})
    monkeypatch.setattr(trainer, "SAVE_EVERY", 0.0)
    with monkeypatch.context() as patch:
        stock = DeviceTrainer.save_metrics

        def die(self, metrics):
            if self.epoch == 2:
                raise KeyboardInterrupt
            stock(self, metrics)

        patch.setattr(DeviceTrainer, "save_metrics", die)
        with pytest.raises(KeyboardInterrupt):
            train(second)
    assert len(seen) == 9
    resumed = train(second, resume=True)
    assert epochs_logged(resumed.folder) == list(range(1, EPOCHS + 1))
    assert seen[:9] == expected[:9]
    assert seen[9:] == expected[6:], "the third epoch again, and the last, without mosaics"


@pytest.mark.parametrize(
    ("trained_on", "scored_on"),
    [("", ""), ("cpu", "cpu"), ("1", "1"), ("1,0", "1"), ("cuda:1, cuda:0", "cuda:1"), ("-1", ""), ("-1,-1", "")],
)
def test_weights_of_several_gpus_are_scored_on_the_first(trained_on: str, scored_on: str) -> None:
    assert scoring_device(trained_on) == scored_on
