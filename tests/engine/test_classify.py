"""Classifiers train, resume as if nothing had happened, and refuse what does not fit before they write anything."""

import csv
import json
import shutil
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from tests.engine.conftest import COUNTS, classify_config
from visionattn.backbones.classifier import load_classifier
from visionattn.engine import classify, images
from visionattn.engine.images import Images
from visionattn.engine.run import RunFolder
from visionattn.engine.train import train
from visionattn.errors import ConfigError, DataError, VisionAttnError, WeightsError


def rows(folder):
    with (folder / "results.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def whole(class_folders, tmp_path_factory):
    """An uninterrupted training."""
    return train(classify_config(class_folders, tmp_path_factory.mktemp("whole")))


def test_a_run_holds_its_receipt_and_its_results(whole):
    assert files(whole.folder) == [
        ".lock",
        "config.yaml",
        "data.json",
        "environment.json",
        "metrics.json",
        "results.csv",
        "weights/best.safetensors",
        "weights/last.pt",
    ]
    assert [row["epoch"] for row in rows(whole.folder)] == ["1", "2", "3"]
    assert json.loads((whole.folder / "metrics.json").read_text()) == whole.metrics
    assert whole.weights == whole.folder / "weights/best.safetensors"


def test_the_metrics_are_those_of_the_saved_weights(whole, class_folders):
    classifier = load_classifier(whole.weights)
    assert classifier.classes == ["bright", "dark"]
    transform = create_transform(**classifier.data_config)
    right, losses = [], []
    for index, name in enumerate(classifier.classes):
        for path in (class_folders / "val" / name).iterdir():
            with torch.no_grad():
                probability = classifier.model(transform(Image.open(path))[None]).softmax(-1)[0]
            right.append(int(probability.argmax()) == index)
            losses.append(-probability[index].log().item())
    assert len(right) == 2 * COUNTS["val"]
    assert whole.metrics["top1"] == pytest.approx(np.mean(right), abs=1e-6)
    assert whole.metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert whole.metrics["top5"] == 1
    best = [float(row["top1"]) for row in rows(whole.folder)]
    assert whole.metrics["best_epoch"] == int(np.argmax(best)) + 1
    assert whole.metrics["top1"] == pytest.approx(max(best))


def test_it_learns(class_folders, tmp_path):
    result = train(classify_config(class_folders, tmp_path, epochs=6, timm={"optimizer": {"opt": "adamw", "lr": 1e-3}}))
    losses = [float(row["train_loss"]) for row in rows(result.folder)]
    assert losses[-1] < 0.8 * losses[0]
    assert result.metrics["top1"] >= 0.9


def stop_in(monkeypatch, owner, name, call, act=lambda *_: None):
    """Let the ``call``-th call of a function do ``act`` and end the process, as a kill would."""
    original, calls = getattr(owner, name), []

    def stopping(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            act(*args)
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, stopping)


def half_a_file(path, _):
    path.write_text("PK half")


MOMENTS = {
    "in the first epoch": (classify._Training, "epoch", 1),
    "in the second epoch": (classify._Training, "epoch", 2),
    "while the second checkpoint is written": (Path, "write_bytes", 2, half_a_file),
    "before the first best weights": (classify, "save_classifier", 1),
    "before the last row is written": (classify, "write_text", 3),
    "before the metrics": (RunFolder, "finished", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stopped_run_ends_as_an_uninterrupted_one(whole, class_folders, tmp_path, monkeypatch, moment):
    config = classify_config(class_folders, tmp_path)
    with monkeypatch.context() as patch:
        stop_in(patch, *MOMENTS[moment])
        with pytest.raises(KeyboardInterrupt):
            train(config)
    resumed = train(config, resume=True)
    assert rows(resumed.folder) == rows(whole.folder)
    assert files(resumed.folder) == files(whole.folder)
    assert {**resumed.metrics, "seconds": 0} == {**whole.metrics, "seconds": 0}
    expected, got = (load_classifier(result.weights).model.state_dict() for result in (whole, resumed))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_finished_run_is_left_as_it_is(whole, class_folders, monkeypatch):
    monkeypatch.setattr(classify, "_Training", None)
    config = classify_config(class_folders, whole.folder.parents[1])
    assert train(config, resume=True) == whole


def test_the_number_of_workers_changes_nothing(whole, class_folders, tmp_path):
    result = train(classify_config(class_folders, tmp_path, workers=2))
    assert rows(result.folder) == rows(whole.folder)


def test_each_epoch_has_its_own_order_and_augmentation(class_folders, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(images, "seed_of", lambda *key: seen.append(key) or 0)
    train(classify_config(class_folders, tmp_path, seed=5, epochs=2))
    assert {key[:2] for key in seen} == {(5, 0), (5, 1)}
    orders = [[index for _, e, index in seen if e == epoch] for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(16))
    assert orders[0] != orders[1]


def test_another_seed_changes_the_run(whole, class_folders, tmp_path):
    result = train(classify_config(class_folders, tmp_path, seed=1, epochs=1))
    assert rows(result.folder)[0] != rows(whole.folder)[0]


def test_a_damaged_checkpoint_is_named(class_folders, tmp_path, monkeypatch):
    config = classify_config(class_folders, tmp_path)
    stop_in(monkeypatch, classify._Training, "epoch", 2)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    last = tmp_path / "classify/run/weights/last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"last\.pt cannot be resumed .* start again"):
        train(config, resume=True)


def timm(**sections):
    return {"timm": sections}


REFUSED = {
    "model": ({"model": "test_vitt"}, r"unknown name 'test_vitt'; nearest: test_vit"),
    "model on the hub": ({"model": "hf-hub:someone/model"}, r"unknown name 'hf-hub:someone/model'"),
    "model option": (timm(model={"embed_dimm": 8}), r"timm\.model: test_vit .*embed_dimm"),
    "attention": (timm(model={"attn_layer": "ela_hadamar"}), r"attn_layer: got 'ela_hadamar'.*nearest: ela_hadamard"),
    "classes": (timm(model={"num_classes": 7}), r"timm\.model\.num_classes .*classes are those of the data"),
    "size": (timm(model={"img_size": 64}), r"timm\.model\.img_size .*imgsz"),
    "patches": (timm(model={"patch_size": 64}), r"does not take images of 32 x 32"),
    "optimizer": (timm(optimizer={"opt": "adamww"}), r"timm\.optimizer: .*adamww"),
    "optimizer option": (timm(optimizer={"opt": "adamw", "betta": 1}), r"timm\.optimizer: .*betta"),
    "scheduler": (timm(scheduler={"sched": "cosinus"}), r"timm\.scheduler: .*cosinus"),
    "scheduler option": (
        timm(scheduler={"warmup_epoch": 1}),
        r"timm\.scheduler\.warmup_epoch; .*warmup_epochs",
    ),
    "scheduler length": (timm(scheduler={"cooldown_epochs": 2}), r"ends after 5 epochs, but epochs is 3"),
    "mixup option": (timm(mixup={"mixup_alfa": 1}), r"unknown key timm\.mixup\.mixup_alfa.*nearest: mixup_alpha"),
    "mixup without mixing": (timm(mixup={"mixup_alpha": 0}), r"set prob: 0"),
    "mixup of odd batches": ({"batch": 3} | timm(mixup={"mixup_alpha": 1}), r"batch: got 3.*even"),
    "ema option": (timm(ema={"decy": 0.9}), r"unknown key timm\.ema\.decy.*nearest: decay"),
    "batch": ({"batch": 64}, r"batch: a step takes 64 images, but levels0 has 16"),
    "augmentation": ({"augment": [{"HorizontalFlop": {}}]}, r"HorizontalFlop.*HorizontalFlip"),
    "device": ({"device": "77"}, r"device: got '77'"),
    "devices": ({"device": "0,1"}, r"torchrun"),
    "precision": ({"amp": "fp16"}, r"amp: got fp16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(class_folders, tmp_path, case):
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        train(classify_config(class_folders, tmp_path / "runs", **changes))
    assert not (tmp_path / "runs").exists()


def test_splits_of_different_classes_are_refused(class_folders, tmp_path):
    data = shutil.copytree(class_folders, tmp_path / "data")
    shutil.rmtree(data / "val/dark")
    with pytest.raises(DataError, match="val lacks the class folders dark"):
        train(classify_config(data, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_broken_image_is_named_or_left_out(class_folders, tmp_path, caplog):
    data = shutil.copytree(class_folders, tmp_path / "data")
    broken = data / "train/dark/3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match=r"train/dark/3\.png.*(\n.*)*skip_broken"):
        train(classify_config(data, tmp_path / "runs", epochs=1))
    assert not (tmp_path / "runs").exists()
    train(classify_config(data, tmp_path / "runs", epochs=1, skip_broken=True))
    assert str(broken) in caplog.text


def test_a_diverged_training_stops(class_folders, tmp_path):
    config = classify_config(class_folders, tmp_path, timm=timm(optimizer={"opt": "sgd", "lr": 1e30})["timm"])
    with pytest.raises(VisionAttnError, match="diverged in epoch 1"):
        train(config)


def test_starting_from_weights(whole, class_folders, tmp_path):
    config = classify_config(class_folders, tmp_path, model=str(whole.weights), epochs=1, timm={})
    assert train(config.model_copy(update={"name": "same"})).metrics["top1"] >= 0.5
    data = shutil.copytree(class_folders, tmp_path / "data")
    for split in COUNTS:
        shutil.copytree(data / split / "dark", data / split / "black")
    other = train(config.model_copy(update={"data": str(data), "name": "other"}))
    assert load_classifier(other.weights).classes == ["black", "bright", "dark"]
    with pytest.raises(ConfigError, match=r"imgsz: got 64, but .* was trained with 32"):
        train(config.model_copy(update={"imgsz": 64, "name": "bigger"}))


class TestImages:
    @pytest.fixture
    def flipped(self, tmp_path):
        picture = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
        cv2.imwrite(str(tmp_path / "0.png"), picture)
        flips = A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)])
        return Images([(tmp_path / "0.png", 0)] * 40, lambda image: torch.tensor(np.array(image)), flips, seed=3)

    def test_colours_are_rgb(self, tmp_path):
        cv2.imwrite(str(tmp_path / "red.png"), np.full((2, 2, 3), (0, 0, 255), np.uint8))
        [(image, label)] = [Images([(tmp_path / "red.png", 4)], lambda image: image)[0]]
        assert (image.getpixel((0, 0)), label) == ((255, 0, 0), 4)

    def test_augmentation_is_a_function_of_seed_epoch_and_index(self, flipped):
        first = [flipped[i][0] for i in range(40)]
        assert all(torch.equal(flipped[i][0], first[i]) for i in reversed(range(40)))
        flipped.epoch = 1
        assert not all(torch.equal(flipped[i][0], first[i]) for i in range(40))

    def test_transforms_draw_apart_from_each_other(self, flipped):
        seen = {tuple(flipped[i][0].flatten().tolist()) for i in range(40)}
        assert len(seen) == 4, "each flip with and without the other"
