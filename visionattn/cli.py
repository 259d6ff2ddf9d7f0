"""The command line ``visionattn``: its commands by name, each imported when it is called, and what they share.

Help and completion must not wait for PyTorch, so nothing is imported here but the parser and our errors.
"""

import importlib
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

from visionattn.errors import ConfigError, VisionAttnError

COMMANDS = {
    "train": "Train a detector or a classifier from a configuration.",
    "evaluate": "Score weights or an exported file on a data set: COCO AP, or top-1 and top-5.",
    "predict": "Find objects in pictures, a video or a camera's stream, or classify them.",
    "export": "Write ONNX, OpenVINO, TensorRT, TorchScript or .pt2 files, verified against the weights.",
    "convert": "Turn a pretrained vision transformer linear, without labels.",
    "profile": "Measure how fast and how exact models, exported files and attentions are.",
    "yolo": "Run Ultralytics' own command line with our blocks and models known.",
}
"""What the command line can do, in one line each; the file of a command has its name, in :mod:`visionattn.commands`."""

IMGSZ_HELP = "side of the network input in pixels, or H,W; as trained or exported if left out"
THREADS_HELP = "threads of the CPU; 0 leaves it to the runtime"
PROVIDER_HELP = "execution provider of ONNX Runtime, or device of OpenVINO; by --device if left out"


class Command(TyperCommand):
    """A command that makes our models and attentions known to timm before it runs, but not before it shows its help."""

    def invoke(self, ctx: Any) -> Any:
        """Run the function of the command."""
        importlib.import_module("visionattn.backbones")
        return super().invoke(ctx)


class _Commands(TyperGroup):
    """The commands of :data:`COMMANDS`: known by their lines until one is called."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"commands": {name: TyperCommand(name, help=COMMANDS[name]) for name in COMMANDS}})

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the command that the first argument names."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and command_of(str(name)), rest


def command_of(name: str) -> Any:
    """Return a command of :data:`COMMANDS` with its options; its file is imported."""
    return typer.main.get_command(importlib.import_module(f"visionattn.commands.{name}").app)


app = typer.Typer(cls=_Commands, no_args_is_help=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"visionattn {version('visionattn')}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Linear attention that is practical for vision: train, score, run and ship detectors and classifiers.

    visionattn train --config detect/digits
    visionattn predict --source clip.mp4

    visionattn COMMAND --help has the options of a command, and examples.
    """


def main() -> None:
    """Entry point ``visionattn``, and of ``python -m visionattn``."""
    _told(lambda: app(prog_name="visionattn"))


def run(app: typer.Typer) -> None:
    """Run a typer app; an error meant for the user is printed in one piece and exits with code 2.

    So is one of the operating system, which names the file: no space, no permission, a folder where a file should be.
    """
    _told(app)


def _told(command: Callable[[], object]) -> None:
    try:
        command()
    except (VisionAttnError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def size_of(text: str) -> tuple[int, int] | None:
    """Read an image size: ``320``, or ``480,640`` for (H, W); empty is None.

    Raises:
        ConfigError: it is neither.
    """
    sides = text.replace("x", ",").split(",")
    if not text:
        return None
    if len(sides) > 2 or not all(side.strip().isdigit() and int(side) for side in sides):
        raise ConfigError(f"got size {text!r}; give a side in pixels such as 320, or height and width such as 480,640")
    return int(sides[0]), int(sides[-1])
