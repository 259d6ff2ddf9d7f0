"""Measure mechanisms, exports and models.

python tools/profiler.py fidelity
python tools/profiler.py parity
python tools/profiler.py engines
python tools/profiler.py model --weights weights/yolo-lat-n-aquarium.pt --weights yolo26n.yaml --runtime onnxruntime
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from visionattn.attention import ATTENTION
from visionattn.cli import run, size_of
from visionattn.data import calibration_images
from visionattn.data.files import write_text
from visionattn.engine.run import write_json
from visionattn.errors import ConfigError, suggest
from visionattn.export.quantize import Calibration
from visionattn.profiling import RUNTIMES, measure_engines, measure_fidelity, measure_latency, measure_parity
from visionattn.profiling.latency import Runtime
from visionattn.profiling.protocols import Result
from visionattn.profiling.tables import Grid, engine_grid, fidelity_grids, latency_grids, parity_grids
from visionattn.record import environment

WEIGHTS = Path("weights/yolo-lat-n-aquarium.pt")

app = typer.Typer(add_completion=False, help=__doc__)


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


@app.command()
def parity(
    weights: Annotated[Path, typer.Option(help="a trained yolo-lat-n, whose attention is exchanged")] = WEIGHTS,
    mechanism: Annotated[list[str] | None, typer.Option(help="repeatable; all if left out")] = None,
    workers: Annotated[int, typer.Option(help="processes at a time, each of several GB")] = 1,
    output: Annotated[Path, typer.Option(help="file of the report as JSON")] = Path("results/export/parity.json"),
) -> None:
    """Errors of exported graphs against torch: every mechanism in a ViT and a YOLO-LAT, fp32 and stretched fp16."""
    check_output(output)
    report = measure_parity(weights, mechanism or list(ATTENTION), workers=workers)
    publish("Exported graphs against torch", report, parity_grids(report), output)


@app.command()
def engines(
    output: Annotated[Path, typer.Option(help="file of the report as JSON")] = Path("results/export/engines.json"),
) -> None:
    """Engines that TensorRT-RTX builds without a GPU: a ViT with every mechanism, and YOLO-LATs."""
    check_output(output)
    report = measure_engines()
    publish("Engines", report, [engine_grid(report)], output)


@app.command()
def model(
    weights: Annotated[list[str], typer.Option(help="weights, a name or a yaml; repeatable")],
    imgsz: Annotated[list[str] | None, typer.Option(help="side, or H,W; repeatable; 320 and 640 if left out")] = None,
    runtime: Annotated[list[str] | None, typer.Option(help=f"repeatable; of {', '.join(RUNTIMES)}")] = None,
    batch: Annotated[int, typer.Option(help="images of a batch")] = 1,
    rounds: Annotated[int, typer.Option(help="timings of each")] = 60,
    threads: Annotated[int, typer.Option(help="of the CPU; one a core if left out")] = 0,
    calibrate: Annotated[str, typer.Option(help="data that int8 is calibrated by")] = "",
    output: Annotated[Path | None, typer.Option(help="file of the report as JSON, tables beside it")] = None,
) -> None:
    """Latency of models on the CPU, in several runtimes in turns: the bare network, and from picture to result."""
    check_output(output)
    chosen = [known_runtime(name) for name in runtime or RUNTIMES if calibrate or runtime or "int8" not in name]
    calibration = Calibration(calibration_images(calibrate, 32), tolerance=math.inf) if calibrate else None
    sizes = [size_of(text) or (320, 320) for text in imgsz or ("320", "640")]
    report = measure_latency(weights, sizes, chosen, batch, rounds, threads, calibration)
    publish("Latency", report, latency_grids(report), output)


def known_runtime(name: str) -> Runtime:
    """Return the name of a runtime, or raise a ConfigError."""
    for runtime in RUNTIMES:
        if runtime == name:
            return runtime
    raise ConfigError(f"--runtime {name!r}; {suggest(name, RUNTIMES)}")


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
