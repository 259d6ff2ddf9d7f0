import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import classify_config
from visionattn.atomic import write_json
from visionattn.config import load_config
from visionattn.data.summary import Summary
from visionattn.engine import run as run_module
from visionattn.engine.run import RunFolder
from visionattn.errors import ConfigError
from visionattn.record import environment


@pytest.fixture
def config(tmp_path):
    return classify_config(tmp_path / "data", tmp_path / "runs")


def test_the_folder_is_output_task_name_and_opening_writes_nothing(config, tmp_path):
    assert RunFolder.open(config, resume=False).path == tmp_path / "runs/classify/run"
    assert list(tmp_path.iterdir()) == []


def test_a_relative_output_counts_from_here(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        RunFolder.open(config.model_copy(update={"output": Path("here")}), False).path == tmp_path / "here/classify/run"
    )


def test_a_folder_in_use_is_refused_unless_resumed(config):
    RunFolder.open(config, False).create(config)
    with pytest.raises(ConfigError, match=r"classify/run is in use; go on with --resume.*--set name="):
        RunFolder.open(config, resume=False)
    assert RunFolder.open(config, resume=True).path.is_dir()


def test_an_empty_folder_is_no_run(config):
    RunFolder.open(config, False).path.mkdir(parents=True)
    RunFolder.open(config, resume=False)


@pytest.mark.parametrize("name", ["", "..", "a/b", "/a"])
def test_a_name_that_leaves_the_output_is_refused(config, name):
    with pytest.raises(ConfigError, match="name: got"):
        RunFolder.open(config.model_copy(update={"name": name}), False)


def test_a_file_in_the_way_is_refused(config):
    path = RunFolder.open(config, False).path
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder.open(config, resume=True)


def test_another_configuration_does_not_resume(config):
    RunFolder.open(config, False).create(config)
    with pytest.raises(ConfigError, match=r"epochs: was 3, now 5; seed: was 0, now 1"):
        RunFolder.open(config.model_copy(update={"epochs": 5, "seed": 1}), resume=True)


def test_another_machine_resumes(config):
    RunFolder.open(config, False).create(config)
    RunFolder.open(config.model_copy(update={"device": "0", "workers": 9}), resume=True)


def test_the_written_configuration_is_the_resolved_one(config):
    run = RunFolder.open(config, False)
    run.create(config)
    assert load_config(run.path / "config.yaml") == config


def test_environment_tells_what_ran(config):
    found = environment()
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["command"].startswith("python ")
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        assert found["commit"].removesuffix("-dirty") == head.stdout.strip()


def test_no_commit_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["commit"] is None


HOLD = """
import sys, time
from pathlib import Path
from visionattn.engine.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_is_held_until_its_process_dies_however_that_is(config):
    run = RunFolder.open(config, False)
    run.create(config)
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    before = sorted(run.path.iterdir())
    with pytest.raises(ConfigError, match=rf"classify/run is being trained in by process {other.pid} on .*; wait"):
        run.held(resume=True).__enter__()
    assert sorted(run.path.iterdir()) == before
    other.kill()
    other.wait()
    with run.held(resume=True), pytest.raises(ConfigError, match=f"by process {os.getpid()} on"):
        run.held(resume=True).__enter__()
    with run.held(resume=True):
        pass


def test_two_that_begin_at_once_do_not_share_a_folder(config):
    first, second = RunFolder.open(config, False), RunFolder.open(config, False)
    with first.held(resume=False):
        first.create(config)
    with pytest.raises(ConfigError, match="is in use; go on with --resume"):
        second.held(resume=False).__enter__()


def fail(run, config, resume=False, checkpoint=False):
    with pytest.raises(OSError, match="disk full"), run.held(resume):  # noqa: PT012
        run.create(config)
        if checkpoint:
            (run.weights / "last.pt").touch()
        raise OSError("disk full")


def test_a_start_that_fails_leaves_nothing(config, tmp_path):
    fail(RunFolder.open(config, False), config)
    assert list(tmp_path.iterdir()) == []
    folder = tmp_path / "runs/classify/run"
    folder.mkdir(parents=True)
    fail(RunFolder.open(config, False), config)
    assert list(folder.iterdir()) == [], "a folder that was there stays"


def test_a_failure_after_a_checkpoint_or_of_a_resumed_run_loses_nothing(config):
    run = RunFolder.open(config, False)
    fail(run, config, checkpoint=True)
    assert (run.weights / "last.pt").is_file()
    (run.weights / "last.pt").unlink()
    fail(RunFolder.open(config, True), config, resume=True)
    assert (run.path / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["b", "a"]}, r"the classes were \['a', 'b'\], now they are \['b', 'a'\]"),
        ({"counts": {"train": 3, "val": 1}}, "train had 2 images, now it has 3"),
        ({"digests": {"train": "x", "val": "z"}}, "other images or labels are in val"),
    ],
)
def test_a_run_is_resumed_on_the_data_that_it_began_on(config, change, message):
    run = RunFolder.open(config, False)
    data = Summary(names=["a", "b"], counts={"train": 2, "val": 1}, digests={"train": "x", "val": "y"})
    run.remember(data)
    run.create(config)
    run.remember(data.model_copy(update=change))
    run.remember(data)
    (run.weights / "last.pt").touch()
    run.remember(data)
    with pytest.raises(ConfigError, match=f"was trained on other data: {message}; put the data back as it was"):
        run.remember(data.model_copy(update=change))


def test_a_run_of_before_data_was_remembered_is_resumed_with_a_warning(config, caplog):
    run = RunFolder.open(config, False)
    run.create(config)
    (run.weights / "last.pt").touch()
    run.remember(Summary(names=["a"], counts={"val": 1}, digests={"val": "y"}))
    assert "does not say what it was trained on" in caplog.text
    assert (run.path / "data.json").is_file()


def test_metrics_mark_the_end(config):
    run = RunFolder.open(config, False)
    run.create(config)
    assert run.metrics is None
    run.finished({"top1": 0.5})
    assert RunFolder.open(config, True).metrics == {"top1": 0.5}


def test_only_the_first_process_writes(config, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = RunFolder.open(config, False)
    run.create(config)
    run.finished({})
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_json(file, {"old": 1})
    written = Path.write_text

    def half(path, text, **options):
        written(path, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        run_module.write_json(file, {"new": 2})
    assert json.loads(file.read_text()) == {"old": 1}
