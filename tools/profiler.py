"""Measure mechanisms.

python tools/profiler.py fidelity
python tools/profiler.py fidelity --quick
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from visionattn.cli import run
from visionattn.data.files import write_text
from visionattn.engine.run import write_json
from visionattn.errors import ConfigError
from visionattn.profiling import measure_fidelity
from visionattn.profiling.protocols import Result
from visionattn.profiling.tables import Grid, fidelity_grids
from visionattn.record import environment

app = typer.Typer(add_completion=False, help=__doc__)


@app.callback()
def main() -> None:
    """Keep the names of commands, also while there is one."""


@app.command()
def fidelity(
    output: Annotated[
        Path | None,
        typer.Option(
            help="file of the report as JSON, its tables beside it in Markdown; results/fidelity.json if left out, "
            "nothing if --quick"
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="fewer seeds, sizes and settings: seconds, not minutes")
    ] = False,
) -> None:
    """How true mechanisms are to the kernels that they have or estimate, and to softmax attention.

    Exit code 1 if a known figure is not recovered.
    """
    path = output or (None if quick else Path("results/fidelity.json"))
    check_output(path)
    report = measure_fidelity(quick)
    publish("Fidelity", report, fidelity_grids(report), path)
    missed = [figure.name for figure in report.figures if not figure.ok]
    if missed:
        print(f"{len(missed)} of {len(report.figures)} known figures are not recovered: {'; '.join(missed)}")
        raise typer.Exit(1)
    print(f"all {len(report.figures)} known figures are recovered")


def check_output(path: Path | None) -> None:
    """Refuse what cannot be written before anything is measured."""
    if path and path.is_dir():
        raise ConfigError(f"--output {path} is a folder; give the name of a file, e.g. {path / 'report.json'}")
    if path and path.suffix != ".json":
        raise ConfigError(f"--output {path} is no .json file; tables are written beside it, as {path.stem}.md")


def publish(title: str, report: Result, grids: Iterable[Grid], path: Path | None) -> None:
    """Print tables; write the report and what it depends on as JSON, and the tables beside it. The folder is made."""
    grids = list(grids)
    Console().print(*(grid.rich() for grid in grids))
    if not path:
        return
    record = environment()
    head = [f"# {title}", "", f"`{record['command']}` on {record['device']}, at commit {record['commit']}.", ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, json.loads(report.model_dump_json()) | {"environment": record})
    write_text(path.with_suffix(".md"), "\n".join([*head, *(grid.markdown() for grid in grids)]))
    print(f"written: {path}, {path.with_suffix('.md')}")


if __name__ == "__main__":
    run(app)
