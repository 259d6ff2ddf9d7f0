"""Run Ultralytics' own command line with our blocks and the names of our models and weights known.

visionattn yolo train model=yolo-lat-n.yaml data=data.yaml epochs=100
visionattn yolo predict model=yolo-lat-n-aquarium source=pictures/

visionattn yolo help prints Ultralytics' own help.
"""

import typer

from visionattn.cli import Command

app = typer.Typer(add_completion=False)


@app.command(cls=Command, help=__doc__, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def main(context: typer.Context) -> None:
    from visionattn.detection import yolo_command

    yolo_command(context.args)
