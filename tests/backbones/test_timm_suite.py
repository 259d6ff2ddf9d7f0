"""timm's own model tests on our models, and that the script which runs them notices what is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.timm_suite import FLAT, HIERARCHICAL, STOCK, FetchError, Selection, faults_of, fetch_tests
from visionattn.attention import ATTENTION


@pytest.mark.slow
def test_every_model_passes_timms_tests(tmp_path: Path) -> None:
    try:
        fetch_tests()
    except FetchError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "tests.timm_suite", "--output", str(tmp_path / "report.json")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    models = json.loads((tmp_path / "report.json").read_text())["models"]
    ours = {f"vit_lat_{size}_patch16_224" for size in ("tiny", "small", "base")}
    pyramids = {f"lat_{size}" for size in ("nano", "tiny", "small", "base")}
    assert models.keys() == ours | pyramids | STOCK.keys()
    assert {STOCK[name] for name in STOCK} == set(ATTENTION)
    for name, found in models.items():
        assert found["passed"] == found["tests"] >= (HIERARCHICAL if name in pyramids else FLAT), name


def test_missing_failed_and_unfinished_tests_are_faults() -> None:
    selection = Selection(["one", "two"])
    selection.model_of = {"f.py::test_a[one]": "one", "f.py::test_b[one]": "one", "f.py::test_c[one]": "one"}
    selection.outcome_of = {"f.py::test_a[one]": "passed", "f.py::test_b[one]": "skipped"}
    assert list(faults_of(selection.by_model(), {"one": 4, "two": 1})) == [
        "one: 3 tests, expected at least 4",
        "one: failed test_c",
        "one: skipped test_b",
        "two: 0 tests, expected at least 1",
    ]
    assert selection.by_test() == {"test_a": 1}
