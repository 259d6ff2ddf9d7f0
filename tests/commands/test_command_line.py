"""The installed command line: fast to answer, helpful, and only what was called is imported."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import visionattn
from visionattn.cli import COMMANDS, command_of
from visionattn.commands import profile
from visionattn.deployment.formats import FORMATS
from visionattn.profiling.entrants import FORMS
from visionattn.profiling.operations import MECHANISMS, TOKENS
from visionattn.profiling.runtimes import RUNTIMES
from visionattn.profiling.steps import AUTOCAST, DTYPES

HEAVY = ("torch", "timm", "ultralytics", "cv2")


def program(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "visionattn", *arguments]
    variables = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=variables)


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_help_is_there_within_two_seconds() -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = program("--help")
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 2
    for name, line in COMMANDS.items():
        assert re.search(rf"\b{name} +{re.escape(line[:40])}", done.stdout)


@pytest.mark.parametrize("arguments", [(), *((name,) for name in COMMANDS)], ids=lambda arguments: " ".join(arguments))
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    code = f"""
import sys
sys.argv = ["visionattn", *{arguments}, "--help"]
from visionattn.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code
print(sorted(set({HEAVY}) & set(sys.modules)), sorted(name for name in sys.modules if "visionattn.commands." in name))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    called = [f"visionattn.commands.{name}" for name in arguments]
    assert done.stdout.splitlines()[-1] == f"[] {called}"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_has_examples(name: str) -> None:
    done = program(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"Usage: visionattn {name} " in done.stdout
    assert re.search(rf"^ *visionattn {name} \S+", done.stdout, re.MULTILINE)


def test_help_names_all_that_may_be_chosen() -> None:
    (formats,) = [str(param.help) for param in command_of("export").params if "--format" in param.opts]
    assert re.findall(r"[\w-]+", formats.replace(" or ", " ")) == list(FORMATS)
    assert profile.RUNTIMES_HELP.split(", ") == list(RUNTIMES)
    assert profile.FORMS_HELP.split(", ") == list(FORMS)
    assert profile.MECHANISMS_HELP.split(", ") == list(MECHANISMS)
    assert profile.TOKENS_HELP.split(", ") == [str(count) for count in TOKENS]
    (precisions,) = [
        str(param.help) for param in command_of("profile").commands["model"].params if "--precision" in param.opts
    ]
    assert re.findall(r"[\w-]+", precisions.split(" (")[0].replace(" or ", " ")) == [*DTYPES, AUTOCAST]


def test_version() -> None:
    done = program("--version")
    assert (done.returncode, done.stdout) == (0, f"visionattn {visionattn.__version__}\n")


def test_a_mistyped_command_is_named_and_the_nearest_too() -> None:
    done = program("trian")
    assert done.returncode == 2
    assert "'trian'" in done.stderr
    assert "'train'" in done.stderr


def test_an_error_is_one_line_and_code_2(tmp_path: Path) -> None:
    done = program("train", "--config", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: config file not found: {tmp_path / 'none.yaml'}; give a YAML file, or a ")
    assert "detect/digits" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "expected"), [("visionattn ev", "evaluate"), ("visionattn train --con", "--config")], ids=["name", "flag"]
)
def test_completion(words: str, expected: str) -> None:
    done = program(_VISIONATTN_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split()) - 1))
    assert done.stdout.split() == [expected], done.stderr


def test_a_command_knows_our_attentions_when_it_runs() -> None:
    code = """
import sys
sys.argv = ["visionattn"]
import visionattn, typer
from visionattn.cli import Command
assert "timm" not in sys.modules
app = typer.Typer(add_completion=False)
@app.command(cls=Command)
def main():
    from timm.models.vision_transformer import ATTN_LAYERS
    print("ela_hadamard" in ATTN_LAYERS)
app(["--help"], standalone_mode=False)
assert "timm" not in sys.modules
app([], standalone_mode=False)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True"


def test_tools_are_doors_to_the_commands() -> None:
    tools = Path(visionattn.__file__).parents[1] / "tools"
    doors = {"profiler" if name == "profile" else name: name for name in COMMANDS if name != "yolo"}
    for tool, command in doors.items():
        text = (tools / f"{tool}.py").read_text()
        assert f"from visionattn.commands.{command} import app\n" in text
        assert len(text.splitlines()) <= 7
