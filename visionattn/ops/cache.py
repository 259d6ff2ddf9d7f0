"""The state of kernels that do not factor: every key and value so far."""

from typing import NamedTuple

import torch
from torch import Tensor


class Cache(NamedTuple):
    """Keys (B, H, n, D) and values (B, H, n, E) of the n tokens so far."""

    k: Tensor
    v: Tensor


def extended(cache: Cache | None, k: Tensor, v: Tensor) -> Cache:
    """Return the cache (None at the first token) with one more token."""
    return Cache(k, v) if cache is None else Cache(torch.cat((cache.k, k), -2), torch.cat((cache.v, v), -2))
