"""Rows of two reports are matched by their names, and their measurements divided."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from visionattn.errors import ConfigError
from visionattn.profiling import compare_reports

TOOL = Path(__file__).parents[2] / "tools" / "profiler.py"


def row(mechanism: str, time: float | None, **more: Any) -> dict[str, Any]:
    spread = None if time is None else {"median": time, "p5": time / 2, "p95": time * 2}
    return {"mechanism": mechanism, "size": [32, 64], "tokens": 8, "time": spread, "reason": None} | more


def write(path: Path, rows: Any, **more: Any) -> Path:
    path.write_text(json.dumps({"rounds": 5, "rows": rows} | more))
    return path


@pytest.fixture
def reports(tmp_path: Path) -> tuple[Path, Path]:
    a = [row("relu", 2.0, peak_memory=100, ok=True), row("elu", 4.0), row("gone", 1.0)]
    b = [row("new", 1.0), row("elu", None, reason="failed"), row("relu", 3.0, peak_memory=50, ok=False)]
    first = {"device": "one", "date": "x", "versions": {"torch": "1", "numpy": "2"}}
    second = {"device": "two", "date": "y", "versions": {"torch": "2", "numpy": "2"}}
    return write(tmp_path / "a.json", a, environment=first), write(tmp_path / "b.json", b, environment=second)


def test_ratios(reports: tuple[Path, Path]) -> None:
    found = compare_reports(*reports)
    assert found.names == ("mechanism", "size", "tokens")
    assert set(found.pairs) == {"time", "peak_memory"}
    relu, elu = found.pairs["time"]
    assert (relu.row, relu.a, relu.b, relu.ratio) == (("relu", "32 x 64", "8"), 2, 3, 1.5)
    assert (elu.a, elu.b, elu.ratio) == (4, None, None)
    assert found.pairs["peak_memory"][0].ratio == 0.5
    assert found.only_a == [("gone", "32 x 64", "8")]
    assert found.only_b == [("new", "32 x 64", "8")]
    assert found.differences == [("environment.device", "one", "two"), ("environment.versions.torch", "1", "2")]


def test_only_one_measurement(reports: tuple[Path, Path]) -> None:
    assert set(compare_reports(*reports, only=["time"]).pairs) == {"time"}
    with pytest.raises(ConfigError, match=r"'times'.*accepted: peak_memory, time"):
        compare_reports(*reports, only=["times"])


def test_unlike_files_are_refused(reports: tuple[Path, Path], tmp_path: Path) -> None:
    other = write(tmp_path / "other.json", [{"model": "yolo", "forward": 1.0}])
    with pytest.raises(ConfigError, match=r"by mechanism, size, tokens; .*other.json by model"):
        compare_reports(reports[0], other)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": []}', '{"rows": [1]}'])
def test_a_file_without_rows(reports: tuple[Path, Path], tmp_path: Path, text: str) -> None:
    empty = tmp_path / "empty.json"
    empty.write_text(text)
    with pytest.raises(ConfigError, match=r"empty\.json.*give a report"):
        compare_reports(reports[0], empty)


def test_no_file_and_rows_of_one_name(reports: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json"):
        compare_reports(reports[0], tmp_path / "absent.json")
    twice = write(tmp_path / "twice.json", [row("relu", 1.0), row("relu", 2.0)])
    with pytest.raises(ConfigError, match="two rows relu 32 x 64 8"):
        compare_reports(reports[0], twice)


def test_the_command(reports: tuple[Path, Path]) -> None:
    spec = importlib.util.spec_from_file_location("profiler_of_comparisons", TOOL)
    assert spec is not None
    assert spec.loader is not None
    profiler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(profiler)
    done = CliRunner().invoke(profiler.app, ["compare", *map(str, reports), "--only", "time"])
    assert done.exit_code == 0, done.output
    for words in ("1.5", "Only in A", "Only in B", "gone", "new", "What differs", "one", "two"):
        assert words in done.output
