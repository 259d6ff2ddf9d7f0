"""The head of one convolution a branch: Ultralytics' own in all but its layers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.nn import modules
from ultralytics.nn.modules import Conv, Detect

from tests.detection.conftest import FAST
from visionattn.detection import YOLOLAT, DetectionNetwork, LinearDetect, load_detector

TINY = """
nc: 2
reg_max: {reg_max}
end2end: {end2end}
activation: torch.nn.ReLU()
backbone:
  - [-1, 1, Conv, [8, 3, 4]]
  - [-1, 1, Conv, [16, 3, 2]] # 1 stride 8
  - [-1, 1, Rep, [16]]
  - [-1, 1, Conv, [32, 3, 2]] # 3 stride 16
  - [-1, 1, LAT, [32, 16, ela_hadamard, 0, 5]]
head:
  - [[2, 4], 1, LinearDetect, [nc]]
"""


def tiny(folder: Path, reg_max: int = 1, end2end: bool = False) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(reg_max=reg_max, end2end=str(end2end).lower()))
    return path


def randomised(network: Any) -> Any:
    """Give normalisations and weights values that are not those of a new network."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.2)
    return network


def stock(head: LinearDetect) -> Detect:
    """A ``Detect`` whose branches are plain convolutions with the same weights."""
    end2end = hasattr(head, "one2one_cv2")
    widths = [branch[0].in_channels for branch in head.cv2]
    other = Detect(head.nc, head.reg_max, end2end, widths)

    def linear(name: str, out: int) -> None:
        plain = nn.ModuleList(nn.Sequential(nn.Conv2d(c, out, 1)) for c in widths)
        plain.load_state_dict(getattr(head, name).state_dict())
        setattr(other, name, plain)

    linear("cv2", 4 * head.reg_max)
    linear("cv3", head.nc)
    if end2end:
        linear("one2one_cv2", 4 * head.reg_max)
        other.one2one_cv3 = copy.deepcopy(head.one2one_cv3)
    other.stride = head.stride
    return other


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [one for part in (value.values() if isinstance(value, dict) else value) for one in flat(part)]


def test_it_passes_for_detect_and_nothing_else() -> None:
    assert {LinearDetect: 1}[Detect] == 1
    assert LinearDetect in {Detect}
    assert LinearDetect == LinearDetect
    others = {modules.Segment, modules.Pose, modules.OBB, modules.v10Detect, modules.WorldDetect, Conv, nn.Module, int}
    assert LinearDetect not in others
    assert all(other != LinearDetect and LinearDetect != other for other in others)
    assert Detect not in others


@pytest.mark.parametrize("end2end", [False, True])
@pytest.mark.parametrize("reg_max", [1, 4])
def test_outputs_are_those_of_a_stock_head_with_these_layers(tmp_path: Path, reg_max: int, end2end: bool) -> None:
    network: Any = YOLOLAT(tiny(tmp_path, reg_max, end2end)).model
    head = network.model[-1]
    assert type(head) is LinearDetect
    assert (head.nc, head.reg_max, head.f, head.stride.tolist()) == (2, reg_max, [2, 4], [8, 16])
    assert sum(p.numel() for p in head.cv2.parameters()) == (16 + 1 + 32 + 1) * 4 * reg_max
    assert sum(p.numel() for p in head.cv3.parameters()) == (16 + 1 + 32 + 1) * 2
    if end2end:
        assert sum(p.numel() for p in head.one2one_cv2.parameters()) == (16 + 1 + 32 + 1) * 4 * reg_max
        randomised(head.one2one_cv2)
        randomised(head.one2one_cv3)
    other = stock(head)
    maps = [torch.randn(2, 16, 8, 12), torch.randn(2, 32, 4, 6)]
    for training in (True, False):
        found, expected = (flat(one.train(training)(maps)) for one in (head, other))
        assert len(found) == len(expected)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two)
    assert found[0].shape == (2, 4 + 2, 8 * 12 + 4 * 6)


def test_scores_without_suppression_see_their_neighbours_and_boxes_do_not(tmp_path: Path) -> None:
    network: Any = YOLOLAT(tiny(tmp_path, end2end=True)).model
    head = randomised(network.model[-1]).eval()
    maps = [torch.randn(1, 16, 8, 12), torch.randn(1, 32, 4, 6)]
    other = [maps[0].clone(), maps[1]]
    other[0][..., 3, 5] += 1
    with torch.no_grad():
        one, two = (head(x)[1]["one2one"] for x in (maps, other))

    def changed(key: str) -> list[list[int]]:
        return (one[key] != two[key]).any(1)[0, : 8 * 12].view(8, 12).nonzero().tolist()

    assert changed("boxes") == [[3, 5]]
    assert changed("scores") == [[row, column] for row in range(1, 6) for column in range(3, 8)]


def test_boxes_are_distances_from_the_middle_of_a_place(tmp_path: Path) -> None:
    network: Any = YOLOLAT(tiny(tmp_path)).model
    head = network.model[-1].eval()
    with torch.no_grad():
        for boxes, classes in zip(head.cv2, head.cv3, strict=True):
            boxes[0].weight.zero_()
            boxes[0].bias.copy_(torch.tensor([1.0, 2.0, 3.0, 5.0]))  # left, top, right, bottom, in strides
            classes[0].weight.zero_()
            classes[0].bias.copy_(torch.tensor([0.0, 100.0]))
        found = head([torch.randn(1, 16, 4, 6), torch.randn(1, 32, 2, 3)])[0][0]
    place = 1 * 6 + 2  # row 1, column 2 of stride 8
    x1, y1, x2, y2 = (2.5 - 1) * 8, (1.5 - 2) * 8, (2.5 + 3) * 8, (1.5 + 5) * 8
    expected = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, 0.5, 1.0]
    assert found[:, place].tolist() == pytest.approx(expected)
    assert found[2:4, 24 + 1].tolist() == pytest.approx([4 * 16, 7 * 16])


def test_training_gives_both_branches_of_an_nms_free_head(tmp_path: Path) -> None:
    network: Any = YOLOLAT(tiny(tmp_path, end2end=True)).model.train()
    out = network(torch.rand(2, 3, 64, 96))
    assert set(out) == {"one2many", "one2one"}
    for branch in out.values():
        assert branch["boxes"].shape == (2, 4, 8 * 12 + 4 * 6)
        assert branch["scores"].shape == (2, 2, 8 * 12 + 4 * 6)
    out["one2one"]["boxes"].sum().backward()
    head = network.model[-1]
    assert head.one2one_cv2[0][0].weight.grad is not None
    assert head.cv2[0][0].weight.grad is None
    assert network.model[0].conv.weight.grad is None, "this branch does not teach the backbone"


@pytest.mark.parametrize("half", [False, True])
def test_an_nms_free_network_gives_the_best_places(tmp_path: Path, half: bool) -> None:
    detector = YOLOLAT(tiny(tmp_path, end2end=True))
    network: Any = randomised(detector.model).eval()
    head = network.model[-1]
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        found = DetectionNetwork(detector, "free", half)(x)
        head.end2end = False
        raw = flat(network(x)[1]["one2one"])  # boxes and scores
        scores = raw[1].sigmoid()
    assert found.dtype == torch.float32, "16 bits are too few for coordinates"
    assert found.shape == (1, 8 * 12 + 4 * 6, 6)
    best = scores.flatten().sort(descending=True).values[: found.shape[1]]
    torch.testing.assert_close(found[0, :, 4], best, atol=2e-2 if half else 1e-5, rtol=0)


@pytest.mark.parametrize("end2end", [False, True])
def test_trained_saved_loaded_as_data_fused_and_trained_on(tiny_data: Path, tmp_path: Path, end2end: bool) -> None:
    YOLOLAT(tiny(tmp_path, end2end=end2end)).train(
        data=str(tiny_data), epochs=1, save_dir=str(tmp_path / "run"), val=False, **FAST
    )
    weights = tmp_path / "run" / "weights" / "best.pt"
    network: Any = load_detector(weights).model.float().eval()
    head = network.model[-1]
    assert type(head) is LinearDetect
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        before = network(x)[0]
        network.fuse(verbose=False)
        torch.testing.assert_close(network(x)[0], before, rtol=1e-3, atol=1e-3)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert (head.cv2 is None or head.one2one_cv2 is None) if end2end else not hasattr(head, "one2one_cv2")

    seen = []

    def look(trainer: Any) -> None:
        seen.append({key: value.clone() for key, value in trainer.model.state_dict().items() if ".running" not in key})

    again = YOLO(weights)
    expected = {key: value.float() for key, value in YOLO(weights).model.state_dict().items()}
    again.add_callback("on_train_start", look)
    again.train(data=str(tiny_data), epochs=1, save_dir=str(tmp_path / "more"), val=False, **FAST)
    for key, value in seen[0].items():
        torch.testing.assert_close(value.float(), expected[key], msg=key)


def test_weights_of_other_classes_are_a_beginning(tmp_path: Path) -> None:
    network: Any = randomised(YOLOLAT(tiny(tmp_path)).model)
    more = tmp_path / "more.yaml"
    more.write_text(tiny(tmp_path).read_text().replace("nc: 2", "nc: 5"))
    other: Any = YOLOLAT(more).model
    other.load(network)
    for name in ("0.conv.weight", "4.qkv.conv.weight", "5.cv2.1.0.weight"):
        torch.testing.assert_close(other.state_dict()[f"model.{name}"], network.state_dict()[f"model.{name}"])
    assert other.model[-1].cv3[0][0].weight.shape == (5, 16, 1, 1)


@pytest.mark.parametrize("classes", [2, 20])
@pytest.mark.parametrize("head", ["Detect", "LinearDetect"])
def test_a_second_stage_begins_with_the_branch_that_is_trained(
    head: str, classes: int, tiny_data: Path, tmp_path: Path
) -> None:
    """Everything else frozen, it alone learns; weights of 20 classes have wider layers before the last, too."""

    def network(end2end: bool, nc: int) -> YOLOLAT:
        path = tmp_path / f"{nc}.yaml"
        path.write_text(
            tiny(tmp_path, end2end=end2end).read_text().replace("nc: 2", f"nc: {nc}").replace("LinearDetect", head)
        )
        return YOLOLAT(path)

    first, second, seen = network(False, classes), network(True, 2), []
    randomised(first.model)
    first.save(tmp_path / "first.pt")
    second.add_callback("on_train_start", lambda trainer: seen.append(copy.deepcopy(trainer.model.state_dict())))
    second.train(
        data=str(tiny_data),
        epochs=1,
        save_dir=str(tmp_path / "run"),
        val=False,
        pretrained=str(tmp_path / "first.pt"),
        freeze=[0, 1, 2, 3, 4, "5.cv2", "5.cv3"],
        **FAST,
    )
    trained = load_detector(tmp_path / "run" / "weights" / "best.pt").model.float().state_dict()
    for key, value in first.model.half().float().state_dict().items():
        if key.endswith("num_batches_tracked") or value.shape != seen[0][key].shape:
            continue
        torch.testing.assert_close(seen[0][key].float(), value, msg=key)
        torch.testing.assert_close(trained[key], value, msg=key)
    alike = [key for key in seen[0] if "one2one_" in key and key.replace("one2one_", "") in seen[0]]
    assert any("cv2" in key for key in alike)
    assert any("cv3" in key for key in alike) == (head == "Detect")
    for key in alike:
        torch.testing.assert_close(seen[0][key], seen[0][key.replace("one2one_", "")], msg=key)
    assert any(not torch.equal(trained[key], seen[0][key].float()) for key in alike if "weight" in key)
