"""Controls are Ultralytics' own networks in all but their width, ablations are ours in all but their attention."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ultralytics import YOLO

from visionattn.attention import ATTENTION
from visionattn.detection import LAT, ablated, build_detector, narrow_control
from visionattn.errors import ConfigError, VisionAttnError


def read_back(name: str, content: dict[str, Any], folder: Path) -> Any:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return build_detector(str(path)).model


def built(control: str, folder: Path) -> Any:
    return read_back(*narrow_control(control), folder)


def parameters(network: Any) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_at_the_family_width_it_is_the_family(tmp_path: Path) -> None:
    stock: Any = YOLO("yolo26n.yaml").model
    same = built("yolo26:0.25", tmp_path)
    shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (same, stock)]
    assert shapes[0] == shapes[1]


def test_narrower_is_smaller_with_the_same_layers(tmp_path: Path) -> None:
    stock: Any = YOLO("yolo26n.yaml").model
    narrow, wide = built("yolo26:0.09", tmp_path), built("yolo26:0.5", tmp_path)
    assert parameters(narrow) < 0.25 * parameters(stock)
    assert parameters(wide) > 2 * parameters(stock)
    assert [type(layer) for layer in narrow.model] == [type(layer) for layer in stock.model]
    assert narrow.model[-1].reg_max == 1
    assert narrow.eval()(torch.rand(1, 3, 64, 64))[0].shape == stock.eval()(torch.rand(1, 3, 64, 64))[0].shape


def test_a_box_side_is_one_number_also_where_the_family_has_bins(tmp_path: Path) -> None:
    narrow, stock = built("yolo11:0.09", tmp_path), YOLO("yolo11n.yaml").model
    assert (narrow.model[-1].reg_max, stock.model[-1].reg_max) == (1, 16)
    assert parameters(narrow) < parameters(stock)


@pytest.mark.parametrize("name", ["yolo26:0.09", "yolo26:1"])
def test_the_name_tells_the_width(name: str) -> None:
    assert narrow_control(name)[0] == f"yolo26n-width{name.partition(':')[2]}"


@pytest.mark.parametrize("control", ["yolo26", "yolo26:", "yolo26:thin", "yolo99:0.1", ":0.1", "0.1", "../yolo26:0.1"])
def test_nonsense(control: str) -> None:
    with pytest.raises(ConfigError, match=f"control '{control}'; expected a family of Ultralytics and a width"):
        narrow_control(control)


@pytest.mark.parametrize("width", ["0", "-0.1", "nan", "inf"])
def test_widths_that_are_none(width: str) -> None:
    with pytest.raises(ConfigError, match=f"control 'yolo26:{width}': expected a width above 0"):
        narrow_control(f"yolo26:{width}")


def ablate(ablation: str, folder: Path) -> Any:
    return read_back(*ablated(ablation), folder)


def test_another_attention_in_all_blocks_and_nothing_else(tmp_path: Path) -> None:
    usual: Any = build_detector("yolo-lat-p").model
    other = ablate("yolo-lat-p:softmax", tmp_path)
    assert (tmp_path / "yolo-lat-p-softmax.yaml").is_file()
    kinds = [type(block.attention) for block in other.modules() if isinstance(block, LAT)]
    assert kinds == [ATTENTION["softmax"]] * sum(isinstance(block, LAT) for block in usual.modules())
    shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (usual, other)]
    assert shapes[0] == shapes[1]


def test_no_blocks_and_convolutions_of_as_many_weights(tmp_path: Path) -> None:
    usual: Any = build_detector("yolo-lat-n").model
    blocks = sum(parameters(block) for block in usual.modules() if isinstance(block, LAT))
    without, convolved = ablate("yolo-lat-n:none", tmp_path), ablate("yolo-lat-n:conv", tmp_path)
    assert not any(isinstance(block, LAT) for network in (without, convolved) for block in network.modules())
    assert parameters(without) == parameters(usual) - blocks
    assert parameters(convolved) - parameters(without) == pytest.approx(blocks, rel=0.05)
    x = torch.rand(1, 3, 64, 96)
    shape = usual.eval()(x)[0].shape
    assert without.eval()(x)[0].shape == convolved.eval()(x)[0].shape == shape


def test_the_local_part_alone(tmp_path: Path) -> None:
    usual, alone = build_detector("yolo-lat-s").model, ablate("yolo-lat-s:local", tmp_path)
    blocks = [block for block in alone.modules() if isinstance(block, LAT)]
    assert len(blocks) == sum(isinstance(block, LAT) for block in usual.modules()) > 1
    assert all(block.attention is None and block.local is not None for block in blocks)
    assert alone.eval()(torch.rand(1, 3, 64, 96))[0].shape[1:] == (84, 126)
    content = ablated("yolo-lat-s:softmax")[1]
    for row in (row for row in content["backbone"] if row[2] == "LAT"):
        row[3][-1] = 0
    path = tmp_path / "bare.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="a LAT row has no depthwise convolution"):
        ablated(f"{path}:local")


@pytest.mark.parametrize(
    ("ablation", "message"),
    [
        ("yolo-lat-p", "expected MODEL:ATTENTION"),
        ("yolo-lat-p:sofmax", "expected MODEL:ATTENTION; .*nearest: softmax"),
        ("yolo26n.yaml:softmax", "yolo26n.yaml has no LAT row to change"),
        ("yolo-lat-q:softmax", "unknown model 'yolo-lat-q'"),
    ],
)
def test_ablations_that_are_none(ablation: str, message: str) -> None:
    with pytest.raises(VisionAttnError, match=message):
        ablated(ablation)
