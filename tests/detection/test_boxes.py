"""Boxes that a file has finished, of an NMS-free head or suppressed in the graph."""

import pytest
import torch

from visionattn.detection.boxes import suppress

ROWS = torch.tensor(
    [
        [1.0, 1.0, 9.0, 9.0, 0.9, 2],
        [1.0, 1.0, 9.0, 9.0, 0.8, 0],  # the same place, of another class
        [1.0, 1.0, 9.0, 9.1, 0.7, 2],  # another place, however near
        [1.0, 1.0, 9.0, 9.0, 0.6, 1],
        [5.0, 5.0, 7.0, 7.0, 0.1, 1],
    ]
)


@pytest.mark.parametrize(
    ("conf", "multi_label", "kept"),
    [(0.25, False, [0, 2]), (0.05, False, [0, 2, 4]), (0.25, True, [0, 1, 2, 3]), (0.95, False, []), (0.95, True, [])],
)
def test_a_place_is_given_its_best_class(conf: float, multi_label: bool, kept: list[int]) -> None:
    empty = torch.zeros_like(ROWS)
    found, none = suppress(torch.stack((ROWS, empty)), conf, 0.7, 300, multi_label, finished=True)
    torch.testing.assert_close(found, ROWS[kept])
    assert none.shape == (0, 6)
