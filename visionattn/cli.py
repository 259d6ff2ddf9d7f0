"""The command line: what tools share, and ``visionattn yolo ...``, Ultralytics' own command with our blocks known."""

import sys

import typer

from visionattn.errors import VisionAttnError


def run(app: typer.Typer) -> None:
    """Run a typer app; an error meant for the user is printed in one piece and exits with code 2.

    So is one of the operating system, which names the file: no space, no permission, a folder where a file should be.
    """
    try:
        app()
    except (VisionAttnError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Entry point ``visionattn``: ``visionattn yolo train model=yolo-lat-n.yaml data=...``."""
    if sys.argv[1:2] != ["yolo"]:
        print(
            "usage: visionattn yolo TASK MODE key=value ...   (training, evaluation and prediction by config: tools/)"
        )
        sys.exit(2)
    from visionattn.detection import yolo_command

    yolo_command(sys.argv[2:])
