"""What a result depends on besides its input: versions, device, commit, command."""

import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    *("visionattn", "torch", "torchvision", "timm", "ultralytics", "accelerate", "albumentations", "numpy", "triton"),
    *("opencv-python", "opencv-python-headless", "pycocotools", "faster-coco-eval"),
    *("onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_cu13_libs"),
)


def environment() -> dict[str, Any]:
    """Return date, command, commit, device, driver of the GPU, CUDA of torch, platform and versions."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "commit": _commit(),
        "device": ", ".join(gpus) or f"{os.cpu_count()} CPU cores, {_processor()}",
        "driver": _driver() if gpus else None,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def _command() -> str:
    """Return the command line of this process as one would type it again."""
    if Path(sys.argv[0]).parent.name == "visionattn" or Path(sys.argv[0]).stem == "visionattn":
        return shlex.join(["visionattn", *sys.argv[1:]])
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def _processor() -> str:
    with suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return next(names, platform.machine())
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    """Return the version of NVIDIA's driver, or None where its tool does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
        return lines[0] if lines else None
    return None


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _commit() -> str | None:
    """Return the commit that this package is checked out at, marked if files differ from it, or None.

    A copy that is not at that commit by itself, on a borrowed machine say, is told it by ``VISIONATTN_COMMIT``.
    """
    root = Path(__file__).parents[1]
    told = os.environ.get("VISIONATTN_COMMIT")
    if told or not (root / ".git").exists():
        return told
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a folder of someone else's
        return None
