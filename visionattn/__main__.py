"""``python -m visionattn``: the command line."""

from visionattn.cli import main

main()
