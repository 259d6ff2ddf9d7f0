"""Which blocks get their ReLU from cuDNN, and what it is asked for; its numbers are in tests/detection/test_gpu.py."""

import copy

import pytest
import torch
from torch import nn
from ultralytics.nn.modules import Bottleneck, Conv

from tests.detection.test_head import TINY, randomised, tiny
from visionattn.deployment.cudnn import ConvReLU, join_relus
from visionattn.detection import YOLOLAT, DetectionNetwork


@pytest.fixture
def network(tmp_path):
    """Layers with ReLUs: Conv, Conv, Rep, Conv, LAT, whose own have none, and a head."""
    detector = YOLOLAT(tiny(tmp_path))
    randomised(detector.model)
    return DetectionNetwork(detector)


@pytest.fixture
def cudnn_on_cpu(monkeypatch):
    """Compute what cuDNN would."""

    def joined(x, weight, bias, stride, padding, dilation, groups):
        calls.append(tuple(weight.shape))
        return nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    calls = []
    monkeypatch.setattr(torch, "cudnn_convolution_relu", joined)
    return calls


def joined(module):
    return {name for name, child in module.named_modules() if isinstance(child, ConvReLU)}


def test_blocks_of_a_convolution_and_a_relu(network, cudnn_on_cpu):
    plain = copy.deepcopy(network)
    weights = {name: value.data_ptr() for name, value in network.model.state_dict().items()}
    join_relus(network)
    assert joined(network.model) == {"model.0", "model.1", "model.2", "model.3"}
    assert {name: value.data_ptr() for name, value in network.model.state_dict().items()} == weights
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(network(x), plain(x))
    assert cudnn_on_cpu == [(8, 3, 3, 3), (16, 8, 3, 3), (16, 16, 3, 3), (32, 16, 3, 3)]


def test_blocks_inside_blocks_and_their_options(cudnn_on_cpu):
    torch.manual_seed(0)
    block = nn.Sequential(Bottleneck(8, 8, True, 2), Conv(8, 4, 3, 2, p=2, g=4, d=2, act=nn.ReLU())).eval()
    for part in (block[0].cv1, block[0].cv2):
        part.act = nn.ReLU()
    for part in (block[0].cv1, block[0].cv2, block[1]):
        part.conv.bias = nn.Parameter(torch.randn(part.conv.out_channels))
        del part.bn
        part.forward = part.forward_fuse
    x = torch.randn(1, 8, 9, 12)
    with torch.no_grad():
        expected = block(x)
        join_relus(block)
        torch.testing.assert_close(block(x), expected)
    assert joined(block) == {"0.cv1", "0.cv2", "1"}
    assert len(cudnn_on_cpu) == 3


@pytest.mark.parametrize("change", ["norms", "activation"])
def test_others_stay(tmp_path, change):
    path = tiny(tmp_path)
    if change == "activation":
        path.write_text(path.read_text().replace("ReLU", "SiLU"))
        assert path.read_text() != TINY
    model = YOLOLAT(path).model.eval()
    if change == "activation":
        model = model.fuse(verbose=False)
    kinds = [type(module) for module in model.modules()]
    join_relus(model)
    assert [type(module) for module in model.modules()] == kinds


def test_no_bias_no_joining():
    block = nn.Sequential(Conv(3, 4, act=nn.ReLU()))
    del block[0].bn
    join_relus(block)
    assert not joined(block)
