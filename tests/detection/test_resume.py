"""A training that is killed goes on from its last whole epoch and ends with the epochs it was asked for."""

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.detection.conftest import FAST
from tests.detection.test_head import tiny
from visionattn.detection import YOLOLAT, build_detector, train_detector, trainer
from visionattn.detection.loading import read_checkpoint

EPOCHS = 3


def epochs_logged(folder: Path) -> list[int]:
    with (folder / "results.csv").open(newline="") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


def assert_complete(folder: Path) -> None:
    assert epochs_logged(folder) == list(range(1, EPOCHS + 1))
    for name in ("last.pt", "best.pt"):
        assert read_checkpoint(folder / "weights" / name)["epoch"] == -1, "stripped to its weights"
    assert sorted(p.name for p in (folder / "weights").iterdir()) == ["best.pt", "last.pt"]


def train(folder: Path, data: Path) -> Path:
    return train_detector(build_detector("yolo-lat-n"), folder, data=str(data), epochs=EPOCHS, **FAST)


def test_killed_after_an_epoch(tiny_data: Path, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from tests.detection.test_resume import train
train(Path({str(tmp_path)!r}), Path({str(tiny_data)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    last = tmp_path / "weights" / "last.pt"
    while not last.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = read_checkpoint(last)["epoch"] + 1
    assert 1 <= done < EPOCHS, "the kill came too late to test anything"
    best = train(tmp_path, tiny_data)
    assert_complete(tmp_path)
    assert YOLOLAT(best).names == {0: "yellow", 1: "cyan"}


def test_a_full_disk_leaves_the_old_checkpoint(tiny_data: Path, tmp_path: Path, full_disk: Any) -> None:
    train(tmp_path, tiny_data)
    before = (tmp_path / "weights" / "best.pt").read_bytes()
    for name in ("last.pt", "best.pt"):
        (tmp_path / "weights" / name).unlink()
    with full_disk(len(before) // 2), pytest.raises(OSError, match=r"weights/last\.pt"):
        train(tmp_path, tiny_data)
    assert list((tmp_path / "weights").iterdir()) == []


def test_patience_average_and_best_go_on(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed training begins with what the last checkpoint holds, not anew."""
    options: Any = {"data": str(tiny_data), "epochs": EPOCHS, "patience": 7, **FAST}
    stock = trainer.LATTrainer.save_model

    def stop_after_two(self: Any) -> bool:
        saved = stock(self)
        if self.epoch == 1:
            raise KeyboardInterrupt
        return saved

    with monkeypatch.context() as patch:
        patch.setattr(trainer.LATTrainer, "save_model", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            train_detector(build_detector("yolo-lat-p"), tmp_path, **options)
    kept = read_checkpoint(tmp_path / "weights" / "last.pt")
    seen: dict[str, Any] = {}

    def look(self: Any) -> bool:
        seen.setdefault("updates", self.ema.updates)
        seen.setdefault("patience", self.stopper.patience)
        seen.setdefault("best", self.stopper.best_fitness)
        return stock(self)

    monkeypatch.setattr(trainer.LATTrainer, "save_model", look)
    train_detector(build_detector("yolo-lat-p"), tmp_path, **options)
    assert seen["updates"] == kept["updates"] + 1 > 1, "one step of the optimizer an epoch"
    assert seen["patience"] == 7
    assert seen["best"] >= kept["best_fitness"]
    assert_complete(tmp_path)


@pytest.mark.parametrize("moment", ["strip_optimizer", "validator"])
def test_killed_in_its_last_moments(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    import ultralytics.engine.trainer as engine

    def damage_and_die(path: Path, *_: object, **__: object) -> None:
        path.write_bytes(path.read_bytes()[:1000])
        raise KeyboardInterrupt

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "strip_optimizer":
            patch.setattr(engine, "strip_optimizer", damage_and_die)
        else:
            patch.setattr(trainer.DetectionTrainer, "final_eval", die)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, tiny_data)
    train(tmp_path, tiny_data)
    assert_complete(tmp_path)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_old_one(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Path.write_bytes

    def half_of_the_second(path: Path, content: bytes) -> int:
        if (tmp_path / "weights" / "last.pt").exists():
            written(path, content[: len(content) // 2])
            raise KeyboardInterrupt
        return written(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half_of_the_second)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, tiny_data)
    assert read_checkpoint(tmp_path / "weights" / "last.pt")["epoch"] == 0
    assert epochs_logged(tmp_path) == [1, 2], "the second epoch was logged but not saved"
    train(tmp_path, tiny_data)
    assert_complete(tmp_path)


def test_a_finished_training_is_left_as_it_is(tiny_data: Path, tmp_path: Path) -> None:
    best = train(tmp_path, tiny_data)
    before = best.read_bytes()
    assert train(tmp_path, tiny_data) == best
    assert best.read_bytes() == before


def test_a_kill_between_the_two_checkpoints_keeps_the_best(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move, moved = Path.replace, []

    def die_before_the_second(path: Path, target: Path) -> Path:
        if path.name in ("last.partial.pt", "best.partial.pt"):
            if moved:
                raise KeyboardInterrupt
            moved.append(path.name)
        return move(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die_before_the_second)
        with pytest.raises(KeyboardInterrupt):
            train_detector(build_detector("yolo-lat-n"), tmp_path, data=str(tiny_data), epochs=1, **FAST)
    best = train_detector(build_detector("yolo-lat-n"), tmp_path, data=str(tiny_data), epochs=1, **FAST)
    assert read_checkpoint(best)["epoch"] == -1


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Epochs whose checkpoints were written."""
    epochs: list[int] = []
    stock = trainer.DetectionTrainer.save_model

    def note(self: trainer.LATTrainer) -> bool:
        epochs.append(self.epoch + 1)
        return stock(self)

    monkeypatch.setattr(trainer.DetectionTrainer, "save_model", note)
    return epochs


MANY = 8


def train_short_epochs(folder: Path, data: Path, val: bool = False) -> Path:
    model = str(tiny(folder.parent))
    options = {"data": str(data), "epochs": MANY, "val": val, **FAST}
    return train_detector(build_detector(model), folder, **options)


def test_short_epochs_that_are_not_scored_are_saved_now_and_then(
    tiny_data: Path, tmp_path: Path, saved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    last: list[float] = []
    stock = trainer.LATTrainer.final_eval

    def look(self: trainer.LATTrainer) -> None:
        last.append(read_checkpoint(self.last)["epoch"])
        stock(self)

    monkeypatch.setattr(trainer.LATTrainer, "final_eval", look)
    best = train_short_epochs(tmp_path / "run", tiny_data)
    assert saved == [1, MANY]
    assert last == [MANY - 1], "the weights are those of the last epoch"
    assert epochs_logged(tmp_path / "run") == list(range(1, MANY + 1))
    assert read_checkpoint(best)["epoch"] == -1


@pytest.mark.parametrize(("val", "every"), [(True, trainer.SAVE_EVERY), (False, 0.0)])
def test_scored_epochs_and_long_ones_are_all_saved(
    tiny_data: Path, tmp_path: Path, saved: list[int], monkeypatch: pytest.MonkeyPatch, val: bool, every: float
) -> None:
    monkeypatch.setattr(trainer, "SAVE_EVERY", every)
    train_short_epochs(tmp_path / "run", tiny_data, val)
    assert saved == list(range(1, MANY + 1))


def test_a_kill_between_saved_epochs(
    tiny_data: Path, tmp_path: Path, saved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 8))  # every third epoch is saved
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        stock = trainer.LATTrainer.save_model

        def die(self: trainer.LATTrainer) -> bool:
            if self.epoch + 1 == 6:
                raise KeyboardInterrupt
            return stock(self)

        patch.setattr(trainer.LATTrainer, "save_model", die)
        with pytest.raises(KeyboardInterrupt):
            train_short_epochs(tmp_path / "run", tiny_data)
    done = saved[-1]
    assert 1 < done < 5
    assert read_checkpoint(tmp_path / "run" / "weights" / "last.pt")["epoch"] + 1 == done
    assert epochs_logged(tmp_path / "run") == list(range(1, 7))
    saved.clear()
    train_short_epochs(tmp_path / "run", tiny_data)
    assert saved == [done + 1, MANY], "it went on after the last checkpoint"
    assert epochs_logged(tmp_path / "run") == list(range(1, MANY + 1))
