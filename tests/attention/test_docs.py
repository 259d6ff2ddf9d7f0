"""docs/attention.md is executed: its examples run, its recipe passes the contract tests in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from visionattn.attention import ATTENTION
from visionattn.attention.layer import _options

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "attention.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
FILES = {match[1]: block for block in BLOCKS if (match := re.match(r"# (visionattn/\S+\.py)\n", block))}


def test_every_mechanism_has_its_row() -> None:
    table = PAGE.split("## Using one")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(ATTENTION)


def test_every_option_is_named() -> None:
    named = set(re.findall(r"`(\w+)`", PAGE.split("| option | of |")[1].split("\n\n")[0]))
    assert set().union(*(_options(cls) for cls in ATTENTION.values())) <= named


def test_examples_run() -> None:
    examples = "\n".join(block for block in BLOCKS if block not in FILES.values())
    assert "attention_layer" in examples
    assert "exact_kernel" in examples
    exec(compile(examples, "docs/attention.md", "exec"), {})


def test_recipe_passes_the_contract(tmp_path: Path) -> None:
    assert set(FILES) == {
        "visionattn/ops/quartic.py",
        "visionattn/attention/quartic.py",
        "visionattn/attention/registry.py",
    }
    for folder in ("visionattn", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, block in FILES.items():
        path = tmp_path / name
        path.write_text((path.read_text() if path.exists() else "") + block)
    command = [sys.executable, "-m", "pytest", "tests/attention/test_contract.py", "-q", "-k", "contract and quartic"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) > 40
