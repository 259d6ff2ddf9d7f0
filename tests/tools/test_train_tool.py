"""The training tool as a user runs it: killed, resumed, refused, and on several processes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.engine.conftest import COUNTS, classify_config, make_class_folders

TOOL = Path(__file__).parents[2] / "tools" / "train.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
EPOCHS = 6


@pytest.fixture
def config(tmp_path):
    made = classify_config(make_class_folders(tmp_path / "data"), tmp_path / "runs", epochs=EPOCHS)
    path = tmp_path / "levels.yaml"
    path.write_text(yaml.safe_dump(made.model_dump(mode="json") | {"name": ""}))
    return path


def run(tmp_path, *arguments, launcher=(sys.executable,)):
    command = [*launcher, TOOL, *arguments]
    return subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)


def epochs(folder):
    with (folder / "results.csv").open(newline="") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


def test_killed_resumed_and_run_again(tool, config, tmp_path):
    folder = tmp_path / "runs/classify/levels"
    command = [sys.executable, TOOL, "--config", config]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while not (folder / "weights/last.pt").exists():
        assert process.poll() is None, "ended without a checkpoint"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "metrics.json").exists(), "the kill came too late to test anything"

    again = tool("train", tmp_path, "--config", config)
    assert again.returncode == 2
    assert "is in use; go on with --resume" in again.stderr

    resumed = run(tmp_path, "--config", config, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert epochs(folder) == list(range(1, EPOCHS + 1))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"run      {folder}\n" in resumed.stdout
    assert f"weights  {folder}/weights/best.safetensors\n" in resumed.stdout
    assert f"top1     {metrics['top1']:.4g}\n" in resumed.stdout
    assert f"epoch {EPOCHS}/{EPOCHS}" in resumed.stderr, "a progress bar for each epoch"

    finished = tool("train", tmp_path, "--config", config, "--resume")
    assert (finished.returncode, finished.stdout) == (0, resumed.stdout)
    assert "epoch" not in finished.stderr


@pytest.mark.slow
def test_interrupted(config, tmp_path):
    command, log = [sys.executable, TOOL, "--config", config], tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=ENVIRONMENT,
            stderr=file,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )
    while not (tmp_path / "runs/classify/levels/weights/last.pt").exists():
        assert process.poll() is None, "ended without a checkpoint"
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) != 0
    assert not (tmp_path / "runs/classify/levels/metrics.json").exists(), "the interrupt came too late to test anything"
    printed = log.read_text()
    assert "go on with the same command and --resume" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "model=test_vitt"], "nearest: test_vit"),
        (["--set", "timm.optimizer.betta=1"], "betta"),
        (["--set", "epoch=3"], "unknown key epoch"),
        (["--set", "data=nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line_exit_code_2_and_nothing_written(tool, config, tmp_path, arguments, message):
    done = tool("train", tmp_path, "--config", config, *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "runs").exists()


def test_two_processes(config, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run(tmp_path, "--config", config, "--set", "batch=2", "--set", "epochs=2", launcher=torchrun)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/classify/levels"
    assert epochs(folder) == [1, 2]
    assert done.stdout.count("weights  ") == 1, "one process reports"
    right = json.loads((folder / "metrics.json").read_text())["top1"] * 2 * COUNTS["val"]
    assert right == pytest.approx(round(right), abs=1e-4), "each of ten images counts once, in steps of four"
