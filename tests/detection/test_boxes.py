"""Boxes that a file has finished, of an NMS-free head or suppressed in the graph."""

import numpy as np
import pytest
import torch

from visionattn.detection.boxes import in_image, letterbox, suppress

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


def test_a_fitted_picture_comes_back_by_the_rounding_it_went_by() -> None:
    """Half a pixel of the input at most, for every length of one side; the content is found by its colour."""
    side = 320
    for length in range(1, 2001):
        shape = (length, 8) if length % 2 else (8, length)
        fitted = letterbox([np.zeros((*shape, 3), np.uint8)], (side, side), "cpu")[0, 0] < 0.2  # the rim is grey, .45
        rows, columns = fitted.any(1).nonzero(), fitted.any(0).nonzero()
        content = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        gain = min(side / shape[0], side / shape[1])
        got = in_image(torch.tensor([content], dtype=torch.float64), (side, side), shape)[0]
        wanted = torch.tensor([0, 0, shape[1], shape[0]], dtype=torch.float64)
        assert ((got - wanted).abs() * gain).max() <= 0.5 + 1e-9 or min(shape) * gain < 1, shape
