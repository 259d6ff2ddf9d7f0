"""Find objects in pictures, videos and streams, or classify them: the same as ``visionattn predict``."""

from visionattn.cli import run
from visionattn.commands.predict import app

if __name__ == "__main__":
    run(app)
