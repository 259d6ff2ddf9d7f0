"""The command line: what tools share, and ``visionattn yolo ...``, Ultralytics' own command with our blocks known."""

import sys

import typer

from visionattn.errors import ConfigError, VisionAttnError

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
