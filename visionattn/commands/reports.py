"""What commands that measure share: a report is written as JSON with tables beside it, and its rows as they come."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from visionattn.atomic import write_json, write_text
from visionattn.errors import ConfigError, VisionAttnError
from visionattn.profiling.protocols import Keep, Result, keep_nothing
from visionattn.profiling.tables import Grid
from visionattn.record import environment


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
