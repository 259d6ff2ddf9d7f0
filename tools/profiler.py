"""Measure mechanisms, exports and models: the same as ``visionattn profile``."""

from visionattn.cli import run
from visionattn.commands.profile import app

if __name__ == "__main__":
    run(app)
