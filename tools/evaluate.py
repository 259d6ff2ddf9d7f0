"""Score weights on a data set: the same as ``visionattn evaluate``."""

from visionattn.cli import run
from visionattn.commands.evaluate import app

if __name__ == "__main__":
    run(app)
