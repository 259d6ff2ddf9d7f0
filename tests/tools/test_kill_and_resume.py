"""The tool that kills trainings, with a few kills."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_three_kills_lose_nothing(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.kill_and_resume", "--kills", "3", "--epochs", "8", "--output", report]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for task, found in json.loads(report.read_text())["tasks"].items():
        moments = [kill["moment"] for kill in found["kills"]]
        assert sorted(moments) == ["checkpoint", "end", "epoch"], task
        assert done.stdout.count(f"{task} kill") == 3
