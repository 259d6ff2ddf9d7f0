"""Agent attention: n agents gather the values by one softmax, queries read the agents by another.

    y_i = sum_f softmax_f(s q_i.A_f) sum_j softmax_j(s A_f.k_j) v_j,   s = D^(-1/2).

The agents A are mean queries of n groups of tokens. That is the kernel ``sum_f exp(a_f(q_i) + b_f(k_j))`` of
:mod:`visionattn.ops.positive` with ``a = s q.A`` and ``b = log softmax_j(s A.k)``: b is normalised over the tokens, or
the agents would not weigh alike.

Groups are those of adaptive average pooling: of C tokens in a row, group f holds those from floor(f C / n) to
ceil((f + 1) C / n), less one.

Source: Agent attention (arXiv 2312.08874), section 3, and its code, without the biases, which fix the grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.errors import UnsupportedError
from visionattn.ops.precision import never, outcast, widen


def members(place: Tensor, count: Tensor, groups: int) -> Tensor:
    """Return which tokens are in which group of a row, (..., groups, N).

    Args:
        place: where tokens stand among those that count, (..., 1, N), from 0.
        count: how many those are, (..., 1, 1).
        groups: n.
    """
    group = torch.arange(groups, device=place.device).unsqueeze(-1)
    return (group * count < groups * (place + 1)) & (groups * place < (group + 1) * count)


def line(tokens: Tensor, groups: int, keep: Tensor | None) -> Tensor:
    """Group the kept tokens of a sequence, (B, H, N, D) to (1, 1, groups, N) or, by a mask, to (B, H, groups, N)."""
    if keep is None:
        place = torch.arange(tokens.shape[-2], device=tokens.device).view(1, 1, 1, -1)
        return members(place, torch.full_like(place[..., :1], tokens.shape[-2]), groups)
    kept = keep.transpose(-2, -1).expand(tokens.shape[0], -1, 1, tokens.shape[-2])
    place = kept.cumsum(-1) - 1
    return members(place, place[..., -1:] + 1, groups) & kept


def plane(tokens: Tensor, side: int, grid: tuple[int, int], keep: Tensor | None) -> Tensor:
    """Group the tokens of a grid in ``side`` rows and columns; prefix tokens, in front, are in no group.

    Raises:
        UnsupportedError: the grid has more tokens than there are.
    """
    height, width = grid
    prefix = tokens.shape[-2] - height * width
    if prefix < 0:
        raise UnsupportedError(f"agent: got {tokens.shape[-2]} tokens with grid={grid}; give the grid of the tokens")
    rows, columns = (
        members(torch.arange(x, device=tokens.device), torch.full((1, 1), x, device=tokens.device), side)
        for x in (height, width)
    )
    cells = rows.view(side, 1, height, 1) & columns.view(1, side, 1, width)
    inside = cells.reshape(1, 1, side * side, height * width)
    inside = F.pad(inside, [prefix, 0])
    return inside if keep is None else inside & keep.transpose(-2, -1)


def log_features(q: Tensor, k: Tensor, groups: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a and b, (B, H, N, n) each, of queries and keys; an agent of no tokens is read by no query."""
    q, k = widen(q), widen(k)
    share = groups.to(q.dtype)
    size = share.sum(-1, keepdim=True)
    agents = (share / size.clamp(min=1.0)) @ outcast(q, keep) * q.shape[-1] ** -0.5
    a = (q @ agents.transpose(-2, -1)).masked_fill((size == 0).transpose(-2, -1), never())
    b = outcast(k @ agents.transpose(-2, -1), keep, never())
    return a, b.log_softmax(-2)


def weights(q: Tensor, k: Tensor, agents: Tensor, keep: Tensor | None) -> Tensor:
    """Return the weights of all pairs, (B, H, N, N), by two softmaxes, for agents (B, H, n, D) that all have tokens."""
    scale = q.shape[-1] ** -0.5
    gather = agents @ k.transpose(-2, -1) * scale
    if keep is not None:
        gather = gather.masked_fill(~keep.transpose(-2, -1), float("-inf"))
    return (q @ agents.transpose(-2, -1) * scale).softmax(-1) @ gather.softmax(-1).nan_to_num()
