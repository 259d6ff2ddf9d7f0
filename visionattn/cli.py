"""The command line: what tools share, and ``visionattn yolo ...``, Ultralytics' own command with our blocks known."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from rich.console import Console

from visionattn.data.files import write_text
from visionattn.engine.run import write_json
from visionattn.errors import ConfigError, VisionAttnError
from visionattn.profiling.protocols import Keep, Result, keep_nothing
from visionattn.profiling.tables import Grid
from visionattn.record import environment

IMGSZ_HELP = "side of the network input in pixels, or H,W; as trained or exported if left out"
THREADS_HELP = "threads of the CPU; 0 leaves it to the runtime"
PROVIDER_HELP = "execution provider of ONNX Runtime, or device of OpenVINO; by --device if left out"


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


def check_output(path: Path | None) -> None:
    """Refuse what cannot be written before anything is measured."""
    if path and path.is_dir():
        raise ConfigError(f"--output {path} is a folder; give the name of a file, e.g. {path / 'report.json'}")
    if path and path.suffix != ".json":
        raise ConfigError(f"--output {path} is no .json file; tables are written beside it, as {path.stem}.md")


def partial_of(path: Path) -> Path:
    """Return where rows are written until a report is whole."""
    return path.with_suffix(".partial.json")


def journal(path: Path | None) -> Keep:
    """Return what writes the rows so far, for a run that is cut short."""
    if not path:
        return keep_nothing

    def keep(rows: Sequence[Result]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [json.loads(row.model_dump_json()) for row in rows]
        write_json(partial_of(path), {"rows": kept, "environment": environment()})

    return keep


def publish(title: str, report: BaseModel, grids: Iterable[Grid], path: Path | None) -> None:
    """Write the report and what it depends on as JSON, and tables beside it; print these. The folder is made."""
    grids = list(grids)
    if path:
        record = environment()
        head = [f"# {title}", "", f"`{record['command']}` on {record['device']}, at commit {record['commit']}.", ""]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, json.loads(report.model_dump_json()) | {"environment": record})
        write_text(path.with_suffix(".md"), "\n".join([*head, *(grid.markdown() for grid in grids)]))
        partial_of(path).unlink(missing_ok=True)
    Console().print(*(grid.rich() for grid in grids))
    if path:
        print(f"written: {path}, {path.with_suffix('.md')}")


def check_measured(rows: Sequence[Any]) -> None:
    """Fail, after the report is published, if not one of its rows has figures."""
    if rows and all(row.reason for row in rows):
        raise VisionAttnError(f"nothing was measured; the first reason of {len(rows)}: {rows[0].reason}")


def main() -> None:
    """Entry point ``visionattn``: ``visionattn yolo train model=yolo-lat-n.yaml data=...``."""
    if sys.argv[1:2] != ["yolo"]:
        print(
            "usage: visionattn yolo TASK MODE key=value ...   (training, evaluation and prediction by config: tools/)"
        )
        sys.exit(2)
    from visionattn.detection import yolo_command

    _told(lambda: yolo_command(sys.argv[2:]))
