"""The house stands: imports point down, Ultralytics has one room, and importing is silent."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import visionattn

ROOT = Path(visionattn.__file__).parent
FLOORS = [
    {"atomic", "choices", "cli", "config", "errors", "packaged", "pictures", "record"},
    {"ops"},
    {"attention"},
    {"blocks"},
    {"conversion"},
    {"backbones", "detection", "data"},
    {"engine", "deployment", "profiling", "video"},
    {"model", "verbs"},
    {"export"},
    {"commands"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SHARED = {
    ("engine", "deployment"),
    ("video", "deployment"),
    ("profiling", "deployment"),
    ("cli", "errors"),
    ("config", "errors"),
    ("config", "packaged"),
    ("pictures", "errors"),
}
MODULES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = room_of(path)
    if here == "__init__":
        return
    for name in imports(path):
        package, _, rest = name.partition(".")
        there = rest.partition(".")[0]
        if package == "visionattn" and there != here:
            assert FLOOR[there] < FLOOR[here] or (here, there) in SHARED, f"{path} imports {name}"
        if package == "ultralytics":
            assert here == "detection", f"{path} imports {name}; Ultralytics belongs in detection/"


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in MODULES} - {"__init__"} <= set(FLOOR)


def test_the_rule_sees_a_wrong_import(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from visionattn.engine import train\nimport ultralytics.nn\n")
    assert imports(wrong) == {"visionattn.engine.train", "ultralytics.nn"}


def test_importing_is_silent_and_spares_ultralytics() -> None:
    code = """
import sys, visionattn
from timm.models.vision_transformer import ATTN_LAYERS
assert "ela_hadamard" in ATTN_LAYERS
late = ("ultralytics", "supervision", "cv2", "visionattn.detection", "visionattn.engine", "visionattn.deployment")
assert not set(late) & set(sys.modules)
assert visionattn.conversion.refit
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names_are_what_their_homes_hold() -> None:
    listed = {name: home for home, names in visionattn._HOMES.items() for name in names}
    assert set(visionattn.__all__) == {*listed, "backbones", "__version__"}
    for name, home in listed.items():
        assert getattr(visionattn, name) is getattr(importlib.import_module(home), name)
    assert set(visionattn.__all__) <= set(dir(visionattn))
    with pytest.raises(AttributeError, match="no attribute 'evaluation'"):
        _ = visionattn.evaluation


def test_verbs_survive_the_import_of_every_room() -> None:
    for path in MODULES:
        if path.name == "__init__.py":
            importlib.import_module(".".join(path.parent.relative_to(ROOT.parent).parts))
    assert [name for name in visionattn.__all__ if isinstance(getattr(visionattn, name), ModuleType)] == ["backbones"]
