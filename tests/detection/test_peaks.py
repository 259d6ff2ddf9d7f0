"""Boxes of both branches against a search by hand, one place after the other."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.detection.test_head import randomised, tiny
from visionattn.detection import YOLOLAT, DetectionNetwork
from visionattn.detection.peaks import damped
from visionattn.errors import UnsupportedError


def by_hand(scores: list[torch.Tensor]) -> list[torch.Tensor]:
    """Scale each score of (classes, H, W) by its share of the best within a ring of one cell of whichever map."""
    out = [level.clone() for level in scores]
    for i, level in enumerate(scores):
        for label, y, x in torch.cartesian_prod(*(torch.arange(side) for side in level.shape)).tolist():
            best = 0.0
            for j, other in enumerate(scores):
                first = [(place << i) >> j for place in (y, x)]
                last = [(((place + 1) << i) - 1) >> j for place in (y, x)]
                top, left = (max(place - 1, 0) for place in first)
                best = max(best, float(other[label, top : last[0] + 2, left : last[1] + 2].max()))
            out[i][label, y, x] *= max((float(level[label, y, x]) / best) ** 32, 0.1)
    return out


def test_scores_that_a_neighbour_exceeds_are_damped() -> None:
    torch.manual_seed(0)
    scores = [torch.rand(2, 3, 12 >> i, 16 >> i, dtype=torch.float64) for i in range(3)]
    found = [level.exp() for level in damped([level.log() for level in scores])]
    for image in range(2):
        for level, truth in zip(found, by_hand([level[image] for level in scores]), strict=True):
            torch.testing.assert_close(level[image], truth)
    kept = sum(int((new > 0.999 * old).sum()) for new, old in zip(found, scores, strict=True))
    assert 3 * 2 <= kept < 6 * (12 * 16 + 6 * 8 + 3 * 4) / 10, "a few are kept"


@pytest.mark.parametrize("half", [False, True])
def test_boxes_of_the_nms_free_branch_with_the_scores_of_both(tmp_path: Path, half: bool) -> None:
    detector = YOLOLAT(tiny(tmp_path, end2end=True))
    network: Any = randomised(detector.model).double().eval()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        found = DetectionNetwork(detector, "peaks", half)(images)[0]
        raw = network(images.double())[1]
    one, many = (raw[branch]["scores"][0].sigmoid() for branch in ("one2one", "one2many"))
    both = (many**3 * one) ** 0.25
    grids = [(8, 12), (4, 6)]
    truth = by_hand([part.view(2, *grid) for part, grid in zip(both.split([96, 24], 1), grids, strict=True)])
    best, order = torch.cat([level.flatten() for level in truth]).sort(descending=True)
    assert found.shape == (120, 6)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:, 4].double(), best[:120], atol=2e-2 if half else 1e-5, rtol=0)
    sides = raw["one2one"]["boxes"][0].split([96, 24], 1)
    for row, index in zip(found[:20].double(), order[:20].tolist(), strict=True):
        level, index = (0, index) if index < 2 * 96 else (1, index - 2 * 96)
        label, place = divmod(index, grids[level][0] * grids[level][1])
        y, x = divmod(place, grids[level][1])
        left, top, right, bottom = sides[level][:, place]
        corners = torch.stack((x + 0.5 - left, y + 0.5 - top, x + 0.5 + right, y + 0.5 + bottom)) * (8 << level)
        torch.testing.assert_close(row[:4], corners, atol=0.5 if half else 1e-3, rtol=1e-2 if half else 1e-4)
        assert int(row[5]) == label


def test_heads_that_it_cannot_read_are_named(tmp_path: Path) -> None:
    fused = YOLOLAT(tiny(tmp_path, end2end=True))
    fused.model.model[-1].end2end = True
    fused.fuse()
    with pytest.raises(UnsupportedError, match="fusing has removed the branch with NMS from these weights; use free"):
        DetectionNetwork(fused, "peaks")
    path = tmp_path / "far.yaml"
    path.write_text(tiny(tmp_path, end2end=True).read_text().replace("Conv, [32, 3, 2]", "Conv, [32, 3, 4]"))
    with pytest.raises(UnsupportedError, match=r"strides \[8\.0, 32\.0\], expected each twice the last; use free"):
        DetectionNetwork(YOLOLAT(path), "peaks")
