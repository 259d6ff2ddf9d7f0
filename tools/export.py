"""Export a model, verified against its weights: the same as ``visionattn export``."""

from visionattn.cli import run
from visionattn.commands.export import app

if __name__ == "__main__":
    run(app)
