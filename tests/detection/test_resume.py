"""A training that is killed goes on from its last whole epoch and ends with the epochs it was asked for."""

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.detection.conftest import FAST
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
