"""The package as it is built: ``configs/`` and ``weights/`` lie beside it here, and in it once it is installed."""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ("configs", "weights")

inside = [path for folder in FOLDERS for path in (Path(folder), *Path(folder).rglob("*")) if path.is_dir()]

setup(
    packages=[*find_packages(include=["visionattn*"]), *(f"visionattn.{'.'.join(path.parts)}" for path in inside)],
    package_dir={f"visionattn.{'.'.join(path.parts)}": str(path) for path in inside},
    package_data={
        "visionattn": ["py.typed", "detection/models/*.yaml"],
        **{f"visionattn.{'.'.join(path.parts)}": ["*.yaml", "*.pt", "*.md"] for path in inside},
    },
)
