"""Run timm's own model tests on every model of ours, and on a stock vision transformer with each attention.

python -m tests.timm_suite --output results/timm_suite.json
python -m tests.timm_suite --names lat_nano --names vit_stock_slay

The tests are those of the installed timm. They are not in its wheel, so pip fetches its source distribution once, into
the cache folder. timm picks models for its tests by the patterns and module names that it knows; ours are added to the
one list that needs them, and how many tests each model must at least get is checked, since a selection that shrinks
fails no test. Exit code 1 and a list of faults if anything did not pass.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import timm
import typer
from platformdirs import user_cache_dir
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import vit_tiny_patch16_224

from visionattn.atomic import write_json
from visionattn.attention import ATTENTION
from visionattn.cli import run as run_app
from visionattn.engine.run import environment
from visionattn.errors import UnknownNameError, VisionAttnError, suggest

FLAT, HIERARCHICAL = 10, 11
"""Tests that timm 1.0.31 has for a model whose name begins with ``vit_``, and for a model with maps at four strides."""

STOCK = {f"vit_stock_{attention}": attention for attention in ATTENTION}
"""A stock ViT-Ti of three blocks, enough for every test, with each attention."""

FILTERS = "FEAT_INTER_FILTERS = ["
"""Where timm's tests list the modules whose models have ``forward_intermediates``."""

app = typer.Typer(add_completion=False)
default_cfgs = generate_default_cfgs({name: {"fixed_input_size": True} for name in STOCK})


def register_stock() -> None:
    for name, attention in STOCK.items():

        def create(pretrained: bool = False, attention: str = attention, **options: Any) -> Any:
            return vit_tiny_patch16_224(pretrained, **{"attn_layer": attention, "depth": 3} | options)

        create.__name__ = name
        register_model(create)


def expected_tests() -> dict[str, int]:
    """All names, with the least number of tests of each."""
    flat = dict.fromkeys([*timm.list_models(module="vit_lat"), *STOCK], FLAT)
    return flat | dict.fromkeys(timm.list_models(module="lat"), HIERARCHICAL)


class FetchError(VisionAttnError):
    """timm's source distribution cannot be had."""


def fetch_tests() -> Path:
    """Return the folder of the installed timm's tests, fetched on first use.

    Raises:
        FetchError: pip cannot download the source distribution.
    """
    cache = Path(os.environ.get("VISIONATTN_CACHE") or user_cache_dir("visionattn"))
    folder = cache / f"timm-{timm.__version__}-tests"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            command += [f"timm=={timm.__version__}", "--dest", scratch]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise FetchError(f"pip cannot download the source of timm {timm.__version__}: {done.stderr.strip()}")
            with tarfile.open(next(Path(scratch).glob("timm-*.tar.gz"))) as archive:
                archive.extractall(scratch, filter="data")
            (Path(scratch) / f"timm-{timm.__version__}" / "tests").replace(folder)
    return folder


class Selection:
    """A pytest plugin that keeps the tests of some models and remembers how they ended."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.model_of: dict[str, str] = {}
        self.outcome_of: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            callspec = getattr(item, "callspec", None)
            name = str(callspec.params.get("model_name")).partition(".")[0] if callspec else ""
            if name in self.names:
                self.model_of[item.nodeid] = name
        items[:] = [item for item in items if item.nodeid in self.model_of]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.outcome_of[report.nodeid] = report.outcome

    def by_model(self) -> dict[str, dict[str, Any]]:
        """Per model: number of tests, number of passes, and the names of the others."""
        found: dict[str, dict[str, Any]] = {}
        for name in self.names:
            found[name] = {"tests": 0, "passed": 0, "failed": [], "skipped": []}
        for test, name in self.model_of.items():
            outcome = self.outcome_of.get(test, "failed")
            found[name]["tests"] += 1
            if outcome == "passed":
                found[name]["passed"] += 1
            else:
                found[name][outcome].append(function_of(test))
        return found

    def by_test(self) -> dict[str, int]:
        """How many models pass each test."""
        return dict(sorted(Counter(function_of(t) for t, end in self.outcome_of.items() if end == "passed").items()))


def function_of(test: str) -> str:
    return test.rpartition("::")[2].partition("[")[0]


def run_suite(names: list[str]) -> Selection:
    """Run timm's tests of these models in this process."""
    selection = Selection(names)
    with tempfile.TemporaryDirectory() as scratch:
        suite = Path(scratch) / "timm_tests"
        shutil.copytree(fetch_tests(), suite)
        (suite / "pytest.ini").write_text("[pytest]\n")
        tests = suite / "test_models.py"
        text = tests.read_text(encoding="utf-8")
        if text.count(FILTERS) != 1:
            raise FetchError(f"the tests of timm {timm.__version__} have no {FILTERS!r}; adapt tests/timm_suite.py")
        modules = ", ".join(map(repr, ("vit_lat", "lat", __name__.rpartition(".")[2])))
        tests.write_text(text.replace(FILTERS, f"{FILTERS}{modules}, "), encoding="utf-8")
        options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "-c", str(suite / "pytest.ini")]
        pytest.main([*options, str(tests)], plugins=[selection])
    return selection


def faults_of(models: dict[str, dict[str, Any]], expected: dict[str, int]) -> Iterator[str]:
    for name, found in models.items():
        if found["tests"] < expected[name]:
            yield f"{name}: {found['tests']} tests, expected at least {expected[name]}"
        for outcome in ("failed", "skipped"):
            if found[outcome]:
                yield f"{name}: {outcome} {', '.join(found[outcome])}"


@app.command()
def main(
    names: Annotated[list[str] | None, typer.Option(help="models to test; all if none is given")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Run timm's model tests on our models."""
    register_stock()
    expected = expected_tests()
    for name in names or []:
        if name not in expected:
            raise UnknownNameError(f"--names: got {name!r}; {suggest(name, expected)}")
    begin = time.monotonic()
    selection = run_suite(names or list(expected))
    models = selection.by_model()
    faults = list(faults_of(models, expected))
    if output is not None:
        seconds = round(time.monotonic() - begin)
        content = {"models": models, "passes": selection.by_test(), "faults": faults, "seconds": seconds}
        write_json(output, content | {"environment": environment()})
    for fault in faults:
        print(f"fault: {fault}")
    if faults:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_app(app)
