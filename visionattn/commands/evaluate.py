"""Score weights on a data set: COCO average precision for a detector, top-1 and top-5 for a classifier.

visionattn evaluate --weights runs/detect/digits/weights/best.pt --data digits-scenes --output scores.json
visionattn evaluate --weights yolo-lat-n-aquarium-fp16.onnx --data data.yaml --split test --threads 4
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from visionattn.cli import IMGSZ_HELP, PROVIDER_HELP, THREADS_HELP, Command, size_of
from visionattn.engine.coco import Backend
from visionattn.errors import ConfigError

if TYPE_CHECKING:
    from visionattn.engine.evaluate import ClassificationReport, DetectionReport

app = typer.Typer(add_completion=False)

COLUMNS = {
    "detect": {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "AP S", "ap_medium": "AP M", "ap_large": "AP L"},
    "classify": {"top1": "top-1", "top5": "top-5"},
}


@app.command(cls=Command, help=__doc__)
def main(
    weights: Annotated[Path, typer.Option(help="a .pt detector, a .safetensors classifier, or an exported file")],
    data: Annotated[str, typer.Option(help="an embedded set, a data.yaml, or a folder of class folders")],
    split: Annotated[str, typer.Option(help="split of the data to score")] = "val",
    imgsz: Annotated[str, typer.Option(help=IMGSZ_HELP)] = "",
    batch: Annotated[int, typer.Option(help="images at a time")] = 16,
    device: Annotated[str, typer.Option(help="cpu, 0, ...; the best there is if left out")] = "",
    backend: Annotated[Backend, typer.Option(help="scorer of boxes; both give the same figures")] = "pycocotools",
    output: Annotated[Path | None, typer.Option(help="write the scores and how they came about as JSON")] = None,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="leave out broken images")] = False,
    trust_weights: Annotated[
        bool, typer.Option("--trust-weights", help="load a file that may run any code; for files of your own")
    ] = False,
    threads: Annotated[int, typer.Option(help=THREADS_HELP)] = 0,
    provider: Annotated[str, typer.Option(help=PROVIDER_HELP)] = "",
) -> None:
    from visionattn.engine.evaluate import evaluate

    if output and output.is_dir():
        raise ConfigError(f"--output {output} is a folder; give the name of a file, e.g. {output / 'scores.json'}")
    report = evaluate(
        weights,
        data,
        split,
        size_of(imgsz),
        batch,
        device,
        trust_weights,
        backend=backend,
        skip_broken=skip_broken,
        threads=threads,
        provider=provider,
    )
    show(report)
    if output:
        report.write(output)
        print(f"written: {output}")


def show(report: "DetectionReport | ClassificationReport") -> None:
    """Print the scores as two tables: over all, and by class."""
    from visionattn.deployment.info import size_text

    console = Console()
    columns = COLUMNS[report.task]
    print(f"{report.weights} on {report.data} {report.split}: {report.images} images at {size_text(report.imgsz)} px")
    total = Table(*columns.values())
    total.add_row(*(number(report.metrics[key]) for key in columns))
    classes = Table("class", next(iter(columns.values())))
    for name, value in report.metrics["per_class"].items():
        classes.add_row(name, number(value))
    console.print(total, classes)


def number(value: float | None) -> str:
    """Format a share; a dash where there was nothing to find."""
    return "-" if value is None else f"{value:.4f}"
