"""Small networks with outputs that vary, exports of them that tests share, and the truth: the bare modules."""

import copy
import fcntl
import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images

from visionattn.backbones.classifier import build_classifier, load_classifier, save_classifier
from visionattn.deployment.export import export
from visionattn.deployment.formats import FORMATS
from visionattn.deployment.network import Request
from visionattn.detection import build_detector, load_detector

SIZE = (64, 96)
STRIDE = 16
CLASSES = {0: "ant", 1: "bee", 2: "cat"}


def description(attention="ela_hadamard", **more):
    """A detector of two levels and one attention, small enough to be captured in a second or two."""
    backbone = [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "C3k2", [32, False, 0.5]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "LAT", [32, 16, attention]],
    ]
    head = [[[3, 5], 1, "Detect", ["nc"]]]
    scales = {"n": [1.0, 1.0, 1024]}
    return {"nc": len(CLASSES), "scale": "n", "scales": scales, "backbone": backbone, "head": head} | more


def make_detector(folder, model="", **options):
    """Write an untrained detector whose boxes and scores vary, some of them high."""
    if not model:
        model = str(folder / "tiny.yaml")
        Path(model).write_text(yaml.safe_dump(description(**options)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = build_detector(model)
        network, head = detector.model, detector.model.model[-1]
        norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1
        branches = [(head.cv2, head.cv3)]
        if getattr(head, "one2one_cv2", None) is not None:
            branches.append((head.one2one_cv2, head.one2one_cv3))
        with torch.no_grad():
            for boxes, classes in (pair for levels in branches for pair in zip(*levels, strict=True)):
                boxes[-1].weight.normal_(std=0.2)
                classes[-1].weight.normal_(std=0.5)
                classes[-1].bias.fill_(-1.5)
            network.train()(pictures(16, (64, 64)))
            network.eval()
            for norm in norms:
                norm.running_var.clamp_(min=0.05)  # lest noise of a dead channel is blown up
    if head.nc == len(CLASSES):
        network.names = CLASSES
    detector.save(folder / "tiny.pt")
    return folder / "tiny.pt"


def pictures(count, size, seed=0):
    """Pieces of photographs, as a detector takes them: (count, 3, H, W), RGB in 0..1."""
    photographs, rng = load_sample_images().images, np.random.default_rng(seed)
    pieces = []
    for index in range(count):
        photograph, step = photographs[index % 2], 1 + index % 2
        top, left = (rng.integers(0, side - step * n) for side, n in zip(photograph.shape, size, strict=False))
        pieces.append(photograph[top : top + step * size[0] : step, left : left + step * size[1] : step])
    return torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2).float().contiguous() / 255


def raw_truth(weights, images):
    """Raw predictions of the bare detector, neither fused nor cast down: float64, (B, 4 + classes, anchors)."""
    model = copy.deepcopy(load_detector(weights).model).double().eval()
    if getattr(model.model[-1], "one2one_cv2", None) is not None:
        model.model[-1].end2end = False
    with torch.no_grad():
        return model(images.double())[0]


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Make something in a folder of its own once for all workers of pytest-xdist; its result is kept by pickle."""
    base = tmp_path_factory.getbasetemp()
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"
    base.mkdir(exist_ok=True)

    def get(key, make):
        folder = base / hashlib.sha256(key.encode()).hexdigest()[:16]
        result = folder.with_suffix(".pickle")
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not result.exists():
                folder.mkdir()
                result.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(result.read_bytes())

    return get


@pytest.fixture(scope="session")
def tiny(once):
    """A detector of three classes."""
    return once("tiny", make_detector)


@pytest.fixture(scope="session")
def tiny_free(once):
    """A detector with an NMS-free head."""
    return once("tiny_free", lambda folder: make_detector(folder, end2end=True))


@pytest.fixture(scope="session")
def classifier(once):
    """An untrained classifier of 32 x 32 pixels, as its module and its file."""

    def make(folder):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built = build_classifier("test_vit", ["a", "b", "c"], 32, {"attn_layer": "ela_sum"})
        names = ("name", "kwargs", "classes", "data_config")
        parts = {name: getattr(built, name) for name in names}
        save_classifier(built.model, folder / "tiny.safetensors", **parts)
        return folder / "tiny.safetensors"

    path = once("classifier", make)
    return load_classifier(path).model, path


@pytest.fixture(scope="session")
def exported(once):
    """Export, once for the same arguments."""

    def get(weights, form, **options):
        def make(folder):
            return export(Request(str(weights), **options), form, folder / f"model{FORMATS[form].suffix}")

        return once(repr((str(weights), form, sorted(options.items()))), make)

    return get


@pytest.fixture(scope="session")
def photographs_on_disk(once):
    """Sixteen pictures to calibrate by."""

    def make(folder):
        for index, piece in enumerate(pictures(16, (96, 128), seed=5)):
            Image.fromarray((piece.permute(1, 2, 0) * 255).byte().numpy()).save(folder / f"{index:02}.png")
        return tuple(sorted(folder.iterdir()))

    return once("photographs", make)
