"""Gaussian vectors for random features: from a seed, the same on every machine and in every precision."""

import math

import numpy as np
import torch
from torch import Tensor

from visionattn.errors import ConfigError

DRAWS = ("orthogonal", "iid")


def gaussian(heads: int, rows: int, dim: int, seed: int, how: str = "orthogonal") -> Tensor:
    """Return vectors whose every row has the law N(0, I), (heads, rows, dim), on the CPU.

    They are rounded to bfloat16, so that a module cast to half precision keeps the very same numbers.

    Args:
        heads: independent sets.
        rows: vectors of a set.
        dim: their width.
        seed: of the generator.
        how: ``iid``, or ``orthogonal``: blocks of ``dim`` rows are orthogonal to each other, of independent lengths
            (arXiv 2009.14794, section 2.4).

    Raises:
        ConfigError: ``how`` is neither.
    """
    if how not in DRAWS:
        raise ConfigError(f"draws: got {how!r}; accepted: {', '.join(DRAWS)}")
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(generator.standard_normal(shape))

    if how == "iid":
        return normal(heads, rows, dim).bfloat16().float()
    turned, triangle = torch.linalg.qr(normal(heads, math.ceil(rows / dim), dim, dim))
    # QR's sign convention is undone, without which the directions are not uniform.
    directions = turned * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    lengths = normal(heads, rows, dim).norm(dim=-1, keepdim=True)
    return (directions.transpose(-2, -1).flatten(1, 2)[:, :rows] * lengths).bfloat16().float()
