"""What Ultralytics offers, with our models: built by name and by path, trained, scored, fused, exported."""

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from torch import nn
from ultralytics import YOLO
from ultralytics.nn import tasks

from tests.detection.conftest import FAST
from visionattn.attention import ATTENTION, Attention
from visionattn.cli import main
from visionattn.detection import LAT, MODELS, YOLOLAT, registration
from visionattn.errors import UnknownNameError, UnsupportedError

LIMITS = {"yolo-lat-p": (0.32e6, 7), "yolo-lat-n": (1.0e6, 80), "yolo-lat-s": (2.6e6, 80), "yolo-lat-m": (10e6, 80)}
"""Most parameters, normalisations folded, and with how many classes."""
STRIDES = [8, 16, 32]


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def test_packaged_sizes() -> None:
    assert set(MODELS) == set(LIMITS)


@pytest.mark.parametrize("name", LIMITS)
def test_size_limit_attention_and_levels(name: str, tmp_path: Path) -> None:
    limit, classes = LIMITS[name]
    content = yaml.safe_load(MODELS[name].read_text())
    assert content["nc"] == 80
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(content | {"nc": classes}))
    model: Any = YOLOLAT(tmp_path / "model.yaml").model
    assert any(isinstance(module, LAT) for module in model.modules())
    assert model.stride.tolist() == STRIDES
    assert model.model[-1].nc == classes
    assert 0.6 * limit < parameters(model.fuse(verbose=False)) <= limit


def test_name_path_and_plain_yolo_build_the_same() -> None:
    by_name, by_suffix, by_path = YOLOLAT("yolo-lat-n"), YOLOLAT("yolo-lat-n.yaml"), YOLO(MODELS["yolo-lat-n"])
    shapes = [{k: v.shape for k, v in m.model.state_dict().items()} for m in (by_name, by_suffix, by_path)]
    assert shapes[0] == shapes[1] == shapes[2]


def test_a_file_of_ones_own_goes_before_the_packaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = MODELS["yolo-lat-n"].read_text().replace("ela_hadamard", "uniform")
    (tmp_path / "yolo-lat-n.yaml").write_text(changed)
    monkeypatch.chdir(tmp_path)
    names = ["yolo-lat-n.yaml", "yolo-lat-n"]
    blocks = {name: [type(m) for m in YOLOLAT(name).model.modules() if isinstance(m, Attention)] for name in names}
    assert blocks == {"yolo-lat-n.yaml": [ATTENTION["uniform"]], "yolo-lat-n": [ATTENTION["ela_hadamard"]]}


def test_unknown_size() -> None:
    with pytest.raises(UnknownNameError, match=r"yolo-lat-x.*nearest: yolo-lat-"):
        YOLOLAT("yolo-lat-x")


@pytest.mark.parametrize("before", ["yolov8n.yaml", "yolo26n.yaml"])
def test_a_model_is_the_same_after_another_one(before: str) -> None:
    alone = repr(YOLOLAT("yolo-lat-n").model)
    YOLO(before)
    assert repr(YOLOLAT("yolo-lat-n").model) == alone


def test_a_name_that_ultralytics_has_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    class Conv(nn.Module):
        pass

    with pytest.raises(RuntimeError, match="already knows another Conv"):
        registration.register([Conv])
    assert tasks.Conv is not Conv


def test_rectangles_and_odd_sizes() -> None:
    model = YOLOLAT("yolo-lat-n").model.eval()
    with torch.no_grad():
        for height, width in ((96, 160), (160, 96), (64, 64)):
            anchors = sum((height // s) * (width // s) for s in STRIDES)
            assert model(torch.rand(2, 3, height, width))[0].shape == (2, 84, anchors)


def test_fuse_folds_every_normalisation_and_keeps_the_output() -> None:
    torch.manual_seed(0)
    model = YOLOLAT("yolo-lat-n").model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    model = model.double().eval()
    x = torch.rand(1, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)[0]
        after = model.fuse(verbose=False)(x)[0]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_train_val_predict_save(checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    model = YOLOLAT(checkpoint)
    assert model.names == {0: "yellow", 1: "cyan"}
    metrics = model.val(data=str(tiny_data), project=str(tmp_path), **FAST)
    assert 0 <= metrics.box.map <= 1

    images = sorted((tiny_data.parent / "images" / "val").iterdir())
    assert len(model.predict(images[0], imgsz=64, verbose=False)) == 1
    assert len(model.predict(images[0].parent, imgsz=64, verbose=False)) == len(images)

    video = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
    for value in range(5):
        writer.write(np.full((64, 96, 3), 40 * value, np.uint8))
    writer.release()
    assert len(list(model.predict(video, imgsz=64, stream=True, verbose=False))) == 5

    model.save(tmp_path / "copy.pt")
    again = YOLO(tmp_path / "copy.pt")
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, got = (m.model.float().eval()(x)[0] for m in (YOLO(checkpoint), again))
    torch.testing.assert_close(got, expected)


def test_plain_yolo_trains_from_yaml_and_from_weights(checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    for i, source in enumerate((MODELS["yolo-lat-n"], checkpoint)):
        YOLO(source).train(data=str(tiny_data), epochs=1, save_dir=str(tmp_path / str(i)), **FAST)
        assert (tmp_path / str(i) / "weights" / "last.pt").exists()


@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx_agrees_with_torch(checkpoint: Path, tmp_path: Path, dynamic: bool) -> None:
    weights = tmp_path / "model.pt"
    weights.write_bytes(checkpoint.read_bytes())
    model = YOLOLAT(weights)
    session = onnxruntime.InferenceSession(model.export(format="onnx", imgsz=64, dynamic=dynamic, verbose=False))
    reference = YOLOLAT(checkpoint).model.float().eval()
    for height, width in [(64, 64), (96, 160)] if dynamic else [(64, 64)]:
        x = torch.rand(1, 3, height, width)
        with torch.no_grad():
            expected = reference(x)[0].numpy()
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_tracking_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lap", None)
    monkeypatch.setattr(sys, "argv", ["visionattn", "yolo", "track", "model=yolo-lat-p.yaml", "source=a.mp4"])
    with pytest.raises(
        UnsupportedError, match=r"the package lap, which is not installed; pip install 'visionattn\[track\]'"
    ):
        YOLOLAT("yolo-lat-p").track(str(tmp_path / "clip.mp4"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
