"""Detection on a GPU: batches made there by compiled code, and convolutions whose ReLU cuDNN adds."""

import copy

import pytest
import torch

from tests.detection.test_device_loader import (
    SIDE,
    STRONG,
    assert_boxes_enclose_paint,
    loader,
    painted,
    scenes,
    smooth,
)
from tests.detection.test_head import randomised, tiny
from visionattn.deployment.cudnn import ConvReLU, join_relus
from visionattn.detection import YOLOLAT, DetectionNetwork
from visionattn.detection.device_loader import Warp, inverse, paint, warped_boxes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def batched(warps):
    """One warp of many."""
    return Warp(*(torch.cat(parts) for parts in zip(*warps, strict=True)))


def test_compiled_batches_agree_with_the_cpu(monkeypatch):
    dataset = smooth()
    here, there = loader(dataset), loader(dataset, device="cuda")
    alone = loader(dataset, **STRONG)._draw(torch.arange(12))
    warp = batched([alone, *(made[-1] for made in scenes(monkeypatch, 20))])
    gains = (torch.rand(32, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1) * torch.tensor([0.015, 0.7, 0.4])
    away = Warp(*(part.cuda() for part in warp))
    expected = paint(here.images, here.sizes, warp, inverse(warp.matrix), gains, SIDE)
    found = there._paint(there.images, there.sizes, away, inverse(away.matrix), gains.cuda(), SIDE)
    assert (found.dtype, found.shape) == (torch.uint8, (32, 3, SIDE, SIDE))
    off = (found.cpu().int() - expected.int()).abs().amax(1)
    assert (off > 1).double().mean() < 2e-3  # places on the edge of a picture, and greys, whose hue is anything
    assert off.double().mean() < 0.05

    boxes, kept = warped_boxes(here.boxes[warp.images], warp, SIDE)
    boxes_there, kept_there = warped_boxes(there.boxes[away.images], away, SIDE)
    assert torch.equal(kept_there.cpu(), kept)
    torch.testing.assert_close(boxes_there.cpu(), boxes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_boxes_enclose_what_was_painted(mosaic):
    dataset, colours = painted()
    made = loader(dataset, device="cuda", mosaic=mosaic, **STRONG)
    assert_boxes_enclose_paint(made, colours, 4.0)


def test_an_epoch_lies_on_the_gpu_and_is_the_same_again():
    dataset, _ = painted(20)
    first, again = (list(loader(dataset, device="cuda", mosaic=1.0, hsv_s=0.7, batch=8, **STRONG)) for _ in range(2))
    assert len(first) == 3
    for one, two in zip(first, again, strict=True):
        for key in ("img", "cls", "bboxes", "batch_idx"):
            assert one[key].is_cuda
            assert torch.equal(one[key], two[key])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_joined_relus_agree_with_the_plain_network(tmp_path, layout):
    detector = YOLOLAT(tiny(tmp_path))
    randomised(detector.model)
    network = DetectionNetwork(detector, half=True).cuda().to(memory_format=layout)
    exact = DetectionNetwork(detector).cuda()
    plain = copy.deepcopy(network)
    join_relus(network)
    assert sum(isinstance(module, ConvReLU) for module in network.modules()) == 4
    x = torch.rand(3, 3, 96, 160, device="cuda").to(memory_format=layout)
    with torch.no_grad():
        found, usual, truth = network(x), plain(x), exact(x)
    assert (found - truth).norm() < 1.5 * (usual - truth).norm() + 1e-4 * truth.norm()
    torch.testing.assert_close(found[:, 4:], usual[:, 4:], rtol=0, atol=2e-2)
    torch.testing.assert_close(found[:, :4], usual[:, :4], rtol=2e-2, atol=1.0)
