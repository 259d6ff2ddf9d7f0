"""Train a detector or a classifier: the same as ``visionattn train``."""

from visionattn.cli import run
from visionattn.commands.train import app

if __name__ == "__main__":
    run(app)
