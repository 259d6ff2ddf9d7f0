"""What a result depends on, written down."""

import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from visionattn import record


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the package lie in a folder of its own."""
    monkeypatch.setattr(record, "__file__", str(tmp_path / "visionattn" / "record.py"))
    monkeypatch.delenv("VISIONATTN_COMMIT", raising=False)
    return tmp_path


def test_versions_of_what_exports_and_runs() -> None:
    versions = record.environment()["versions"]
    for package in ("torch", "onnx", "onnxruntime", "openvino", "nncf"):
        assert versions[package] == version(package)


def test_a_copy_without_its_repository_is_told_its_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert record.environment()["commit"] is None
    monkeypatch.setenv("VISIONATTN_COMMIT", "abc")
    assert record.environment()["commit"] == "abc"


def test_the_commit_of_a_checkout_is_marked_if_files_differ(checkout: Path) -> None:
    (checkout / "file").write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "file"], [*who, "commit", "-qm", "1"]):
        subprocess.run(["git", "-C", str(checkout), *command], check=True)
    done = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    commit = done.stdout.strip()
    assert record.environment()["commit"] == commit
    (checkout / "file").write_text("2")
    assert record.environment()["commit"] == f"{commit}-dirty"
