"""cosFormer's reweighting of the ReLU kernel: ``(phi(q_i).phi(k_j)) prod_axes cos(pi/2 (p_i - p_j))``.

A position p in [0, 1) along each axis; on one axis it is i / T, on two (row / H, column / W). Since
``cos(a - b) = cos a cos b + sin a sin b``, with all of them non-negative on [0, pi/2), the features are the D of the
ReLU kernel times each of the 2 (one axis) or 4 (two axes) products of cosines and sines.

Source: cosFormer (arXiv 2202.08791), section 3.2, equation 10, for one axis. The product over two axes is ours.
"""

import math

import torch
from torch import Tensor

from visionattn.ops import relu
from visionattn.ops.precision import never


def line(first: int, tokens: int, total: int, device: torch.device) -> Tensor:
    """Return the positions of tokens ``first`` and on among ``total``, (tokens, 1)."""
    return (torch.arange(first, first + tokens, device=device, dtype=torch.float64) / total).unsqueeze(-1)


def plane(grid: tuple[int, int], tokens: int, device: torch.device) -> Tensor:
    """Return the positions of the tokens of a grid, (tokens, 2); prefix tokens, in front, stand in its middle."""
    rows = torch.arange(grid[0], device=device, dtype=torch.float64) / grid[0]
    columns = torch.arange(grid[1], device=device, dtype=torch.float64) / grid[1]
    places = torch.stack((rows.repeat_interleave(grid[1]), columns.repeat(grid[0])), -1)
    prefix = torch.full((tokens - grid[0] * grid[1], 2), 0.5, device=device, dtype=torch.float64)
    return torch.cat((prefix, places))


def log_features(x: Tensor, positions: Tensor) -> Tensor:
    """Return the logarithm of the features: x (B, H, N, D) and positions (N, axes) to (B, H, N, 2^axes D)."""
    logs = relu.log_features(x)
    angles = positions * (math.pi / 2)
    waves = torch.stack((angles.cos(), angles.sin()), -1).log().clamp(min=never()).to(logs.dtype)
    for axis in range(positions.shape[-1]):
        logs = (logs.unsqueeze(-2) + waves[:, axis].unsqueeze(-1)).flatten(-2)
    return logs


def log_kernel(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """Logarithm of the kernel of all pairs, (B, H, N, N)."""
    angles = (positions.unsqueeze(-2) - positions.unsqueeze(-3)) * (math.pi / 2)
    return relu.log_kernel(q, k) + angles.cos().log().sum(-1)
