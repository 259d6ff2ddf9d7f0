"""The report is whole, and so is the one that is published."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from visionattn.attention import ATTENTION
from visionattn.commands import profile
from visionattn.errors import ConfigError
from visionattn.profiling import FidelityReport, fidelity
from visionattn.profiling.fidelity import describe
from visionattn.profiling.protocols import Spread, plain
from visionattn.profiling.sweep import best, sweep_slay
from visionattn.profiling.tables import Grid, fidelity_grids

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "profiler.py"


@pytest.fixture(scope="module")
def published() -> FidelityReport:
    return read(ROOT / "results" / "fidelity.json")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple["subprocess.CompletedProcess[str]", Path]:
    folder = tmp_path_factory.mktemp("fidelity")
    command = [sys.executable, TOOL, "fidelity", "--quick", "--output", "new/quick.json"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True), folder


def read(path: Path) -> FidelityReport:
    content = json.loads(path.read_text())
    environment = content.pop("environment")
    assert {"date", "command", "commit", "device", "platform", "versions"} <= set(environment)
    return FidelityReport.model_validate(content)


def test_command_line(quick: tuple["subprocess.CompletedProcess[str]", Path]) -> None:
    done, folder = quick
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in (
        "│ uniform ",
        "│ x^2 ",
        "│ performer",
        "known figures are recovered",
        "written: new/quick.json, new/quick.md",
    ):
        assert words in done.stdout
    assert sorted(p.name for p in (folder / "new").iterdir()) == ["quick.json", "quick.md"]
    assert [p.name for p in folder.iterdir()] == ["new"]
    report = read(folder / "new" / "quick.json")
    assert report.quick
    check(report)


def test_published_report(published: FidelityReport) -> None:
    assert not published.quick
    assert published.seeds >= 4
    check(published)


def test_published_tables_are_those_of_the_report(published: FidelityReport) -> None:
    text = (ROOT / "results" / "fidelity.md").read_text()
    assert all(grid.markdown() in text for grid in fidelity_grids(published))
    assert text.count("\n## ") == len(fidelity_grids(published))


def test_grid() -> None:
    grid = Grid("Title", ("a", "b"), [("1", "2")])
    assert grid.markdown() == "## Title\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    assert (grid.rich().title, grid.rich().row_count) == ("Title", 1)


def check(report: FidelityReport) -> None:
    assert len(report.figures) > 50
    assert [figure.name for figure in report.figures if not figure.ok] == []
    assert {row.mechanism for row in report.precision} == {*ATTENTION, "x^2"}
    for row in report.precision:
        assert row.error["float64"].mean < 1e-12, row.mechanism
        assert row.error["float32"].mean < 1e-5, row.mechanism
        assert max(row.error["float16"].mean, row.error["bfloat16"].mean) < 1e-2, row.mechanism
    for table in report.tables:
        assert [row.mechanism for row in table.rows[:2]] == ["uniform", "x^2"]
        assert table.targets[-1] == "softmax"
        for row in table.rows:
            assert set(row.agreement) == set(table.targets)
            assert all(math.isfinite(a.error.mean) and a.error.std > 0 for a in row.agreement.values())
            assert all(abs(a.cosine.mean) <= 1 for a in row.agreement.values())
    sizes = {row.features for table in report.tables for row in table.rows if row.mechanism == "slay"}
    assert {128, 256, 512, 2048} <= sizes
    for choice in report.sweep:
        assert choice.size == choice.nodes * choice.features * choice.anchors
        assert choice.size <= (choice.budget or math.inf)
    assert {choice.budget for choice in report.sweep} == {64, 256, 1024, None}


@pytest.mark.parametrize(("name", "reason"), [("", "is a folder"), ("report.md", "is no .json file")])
def test_outputs_are_refused_before_anything_is_measured(tmp_path: Path, name: str, reason: str) -> None:
    done = CliRunner().invoke(profile.app, ["fidelity", "--output", str(tmp_path / name)])
    assert isinstance(done.exception, ConfigError)
    assert reason in str(done.exception)
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_missed_figure_is_named_and_the_exit_code_is_1(
    published: FidelityReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = published.figures[0].model_copy(update={"measured": 7.0})
    report = published.model_copy(update={"figures": [wrong, *published.figures[1:]], "tables": published.tables[:1]})
    monkeypatch.setattr("visionattn.profiling.measure_fidelity", lambda quick: report)
    done = CliRunner().invoke(profile.app, ["fidelity", "--output", str(tmp_path / "report.json")])
    assert done.exit_code == 1
    assert f"1 of {len(report.figures)} known figures are not recovered: {wrong.name}" in done.stdout.replace("\n", " ")
    assert [figure.ok for figure in read(tmp_path / "report.json").figures].count(False) == 1
    assert (tmp_path / "report.md").read_text().count("| MISSED |") == 1


def test_table_tells_near_from_far() -> None:
    entries = [("uniform", {}), ("softmax", {}), ("performer", {"features": 4})]
    table = fidelity.table(plain(8, 32), [("softmax", {})], entries, 3)
    uniform, softmax, performer = (row.agreement["softmax"] for row in table.rows)
    assert softmax.error.mean < 1e-12
    assert softmax.cosine.mean == pytest.approx(1)
    assert 0.3 < uniform.error.mean < 1
    assert performer.error.mean > 0.3
    assert [row.features for row in table.rows] == [1, None, 4]


def test_a_mechanism_without_queries_is_compared_on_what_it_reads() -> None:
    """At a bandwidth of D^(1/4), Gaussian kernel attention to vectors of one length is softmax attention."""
    table = fidelity.table(plain(8, 32), [("softmax", {}), ("gka", {})], [("gka", {})], 2)
    assert table.rows[0].agreement["gka"].error.mean < 1e-12


def test_precision_grows_with_the_type() -> None:
    (row,) = [row for row in fidelity.precision(plain(8, 32), 2) if row.mechanism == "ela_hadamard"]
    errors = [row.error[dtype].mean for dtype in ("float64", "float32", "float16", "bfloat16")]
    assert errors == sorted(errors)
    assert errors[0] < 1e-14
    assert errors[1] > 1e-9


def test_sweep_finds_that_the_exact_map_wins_where_its_features_fit() -> None:
    choices = sweep_slay(plain(8, 64), (0.5,), 2, most=256)
    for c in best(choices):
        fitting = [o.error.mean for o in choices if o.poly == c.poly and o.size <= (c.budget or math.inf)]
        assert c.error.mean == min(fitting)
    chosen = {(c.budget, c.poly) for c in best(choices)}
    assert {(64, "anchor"), (256, "anchor"), (None, "exact")} <= chosen
    assert not {budget for budget, poly in chosen if poly == "exact"} & {64}  # D (D + 1) / 2 for each of two draws
    exact = min((c for c in choices if c.poly == "exact"), key=lambda c: c.error.mean)
    anchor = min((c for c in choices if c.poly == "anchor"), key=lambda c: c.error.mean)
    assert exact.error.mean < anchor.error.mean < anchor.uniform
    assert exact.size == 36 * exact.nodes * exact.features


def test_spread() -> None:
    assert Spread.of([1.0, 3.0]).model_dump() == {"mean": 2, "std": 1.4142}
    assert Spread.of([5.0]) == Spread(mean=5, std=0)
    assert Spread(mean=0.123456789, std=0).mean == 0.12346


def test_published_numbers_are_those_of_the_report(published: FidelityReport) -> None:
    text = (ROOT / "results" / "README.md").read_text()
    settings = ((2, 16, 8), (1, 16, 16), (1, 32, 32))
    for protocol in dict.fromkeys(choice.protocol for choice in published.settings):
        found = {
            (c.nodes, c.features, c.anchors): c
            for c in published.settings
            if c.protocol == protocol and c.epsilon == 0.5
        }
        first = found[settings[0]]
        errors = [first.uniform, first.square, *(found[setting].error.mean for setting in settings)]
        assert f"| {protocol} | {' | '.join(f'{error:.3f}' for error in errors)} |" in text
    for dim in (16, 64):
        (table,) = [
            t for t in published.tables if t.protocol.startswith(f"plain, head width {dim},") and len(t.targets) == 1
        ]
        rows = {describe(row.mechanism, row.options): row.agreement["softmax"].error.mean for row in table.rows}
        performer, uniform = rows["performer features=256 draws=orthogonal"], rows["uniform"]
        assert f"{performer:.2f} with heads of {dim} (uniform attention: {uniform:.2f})" in " ".join(text.split())
