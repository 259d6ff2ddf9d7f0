"""Turn a pretrained vision transformer linear: the same as ``visionattn convert``."""

from visionattn.cli import run
from visionattn.commands.convert import app

if __name__ == "__main__":
    run(app)
