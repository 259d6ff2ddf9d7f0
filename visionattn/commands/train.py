"""Train a detector or a classifier.

visionattn train --config classify/digits
visionattn train --config detect/digits --set epochs=10 --set name=short
visionattn train --config my.yaml --resume
torchrun --nproc-per-node 2 -m visionattn train --config classify/cifar10
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from visionattn.cli import Command

app = typer.Typer(add_completion=False)


@app.command(cls=Command, help=__doc__)
def main(
    config: Annotated[Path, typer.Option(help="YAML file, or the name of a packaged one, such as detect/digits.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key: key.sub=value; repeatable.", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was stopped; begin it if it was not begun.")
    ] = False,
    trust: Annotated[
        bool, typer.Option("--trust-weights", help="Load .pt weights even if they may run code; for your own files.")
    ] = False,
) -> None:
    from visionattn.config import load_config
    from visionattn.engine.run import is_main_process
    from visionattn.engine.train import train

    try:
        result = train(load_config(config, overrides or ()), resume, trust)
    except KeyboardInterrupt:
        if is_main_process():
            print("stopped; go on with the same command and --resume", file=sys.stderr)
        raise
    if is_main_process():
        print(f"run      {result.folder}")
        print(f"weights  {result.weights}")
        for name, value in result.metrics.items():
            if isinstance(value, int | float):
                print(f"{name:8} {value:.4g}")
