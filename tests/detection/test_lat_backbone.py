"""A hierarchical backbone in Ultralytics' yaml system: built, trained, kept, loaded as data, exported."""

import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import pytest
import timm
import torch
from ultralytics import YOLO

from tests.detection.conftest import FAST, fresh
from visionattn.detection import YOLOLAT, LATFeatures, load_detector
from visionattn.errors import UnknownNameError

YAML = """
nc: 2
reg_max: 1
backbone:
  - [-1, 1, LATFeatures, [lat_nano]]
  - [0, 1, Index, [64, 0]] # 1 stride 8
  - [0, 1, Index, [128, 1]] # 2 stride 16
  - [0, 1, Index, [256, 2]] # 3 stride 32
head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 2], 1, Concat, [1]]
  - [-1, 1, C3k2, [64, False, 0.5]] # 6
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 1], 1, Concat, [1]]
  - [-1, 1, C3k2, [48, False, 0.5]] # 9
  - [[9, 6, 3], 1, Detect, [nc]]
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "pyramid.yaml"
    path.write_text(YAML)
    return path


@pytest.fixture(scope="module")
def trained(recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    YOLOLAT(recipe).train(data=str(tiny_data), epochs=1, save_dir=str(folder), **FAST)
    return folder / "weights" / "best.pt"


def outputs(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)[0]


def test_maps_are_those_of_the_backbone() -> None:
    torch.manual_seed(0)
    block = LATFeatures("lat_nano").eval()
    alone = timm.create_model("lat_nano", features_only=True).eval()
    alone.load_state_dict(block.backbone.state_dict())
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(block(x), alone(x)[1:])
    sum(one.sum() for one in block(x)).backward()
    assert [n for n, p in block.named_parameters() if p.grad is None] == []  # training on several GPUs refuses these


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"lat_nan'.*nearest: lat_nano"):
        LATFeatures("lat_nan")


def test_strides_rectangles_and_copies(recipe: Path) -> None:
    model = YOLOLAT(recipe).model.eval()
    assert model.stride.tolist() == [8, 16, 32]
    again = copy.deepcopy(model)
    for height, width in ((96, 160), (64, 32)):
        x = torch.rand(2, 3, height, width)
        anchors = sum((height // s) * (width // s) for s in (8, 16, 32))
        assert outputs(model, x).shape == (2, 6, anchors)
        torch.testing.assert_close(outputs(again, x), outputs(model, x))


def test_fuse_keeps_the_output(recipe: Path) -> None:
    torch.manual_seed(0)
    model = YOLOLAT(recipe).model.double().eval()
    x = torch.rand(1, 3, 96, 64, dtype=torch.float64)
    before = outputs(model, x)
    torch.testing.assert_close(outputs(model.fuse(verbose=False), x), before, rtol=1e-6, atol=1e-6)


def test_training_reaches_the_backbone(recipe: Path, trained: Path) -> None:
    new, learned = (YOLOLAT(source).model.model[0].backbone.state_dict() for source in (recipe, trained))
    assert learned.keys() == new.keys()
    assert not new["stem_0.1.running_mean"].any()
    assert learned["stem_0.1.running_mean"].float().abs().min() > 0


def test_a_checkpoint_loads_as_data(trained: Path) -> None:
    x = torch.rand(1, 3, 64, 96)
    expected, got = (outputs(m.model.float().eval(), x) for m in (YOLO(trained), load_detector(trained)))
    torch.testing.assert_close(got, expected)


def test_a_process_that_never_heard_of_us_predicts(trained: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "black.png"), np.zeros((64, 64, 3), np.uint8))
    done = fresh(f"from ultralytics import YOLO; YOLO({str(trained)!r}).predict('black.png', imgsz=64)", tmp_path)
    assert done.returncode == 0, done.stderr


def test_onnx_agrees_with_torch(trained: Path, tmp_path: Path) -> None:
    weights = tmp_path / "model.pt"
    weights.write_bytes(trained.read_bytes())
    exported = YOLOLAT(weights).export(format="onnx", imgsz=64, dynamic=True, verbose=False)
    session = onnxruntime.InferenceSession(exported)
    reference = YOLOLAT(trained).model.float().eval()
    for height, width in ((64, 64), (96, 160)):
        x = torch.rand(1, 3, height, width)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), outputs(reference, x), rtol=1e-3, atol=1e-3)
