"""Find objects in pictures, a video or a camera's stream, or classify them, and write them with the result drawn in.

visionattn predict --source clip.mp4
visionattn predict --weights runs/detect/digits/weights/best.pt --source 0 --show
"""

from pathlib import Path
from typing import Annotated

import typer

from visionattn.cli import IMGSZ_HELP, PROVIDER_HELP, THREADS_HELP, Command, size_of
from visionattn.packaged import DEFAULT_WEIGHTS

app = typer.Typer(add_completion=False)


@app.command(cls=Command, help=__doc__)
def main(
    source: Annotated[str, typer.Option(help="picture, folder, video or gif, camera such as 0, or embedded set")],
    weights: Annotated[
        str, typer.Option(help="a .pt detector, a .safetensors classifier, an exported file, or packaged weights")
    ] = DEFAULT_WEIGHTS,
    output: Annotated[
        Path | None, typer.Option(help="folder to write into; a new one in runs/predict if left out")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="also show it in a window; q or Esc ends")] = False,
    conf: Annotated[float, typer.Option(help="boxes of a lower score are left out")] = 0.25,
    imgsz: Annotated[str, typer.Option(help=IMGSZ_HELP)] = "",
    device: Annotated[str, typer.Option(help="cpu, 0, ...; the best there is if left out")] = "",
    trust_weights: Annotated[
        bool, typer.Option("--trust-weights", help="load a file that may run any code; for files of your own")
    ] = False,
    threads: Annotated[int, typer.Option(help=THREADS_HELP)] = 0,
    provider: Annotated[str, typer.Option(help=PROVIDER_HELP)] = "",
) -> None:
    from visionattn.verbs import predict

    summary = predict(
        source,
        weights,
        output,
        show=show,
        conf=conf,
        imgsz=size_of(imgsz),
        device=device,
        trust=trust_weights,
        threads=threads,
        provider=provider,
    )
    found = ", ".join(f"{count} {name}" for name, count in summary.counts.items()) or "nothing"
    print(f"found {found} in {summary.frames} frames")
    print(f"{summary.model_ms:.1f} ms a frame in the model, {summary.total_ms:.1f} ms in all, on {summary.device}")
    print("written: " + ", ".join(str(path) for path in summary.paths[:3]), end="")
    print(f" and {len(summary.paths) - 3} more" if len(summary.paths) > 3 else "")
