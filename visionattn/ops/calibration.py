"""Random features of exp(q.k) fitted to the queries and keys that a network has: the same mean, a smaller spread.

One draw w of N(0, I) estimates ``exp(q.k)`` by ``exp(w.z - |q|^2/2 - |k|^2/2)``, z = q + k, with the relative variance
``exp(|z|^2) - 1``. Two things make it smaller and leave the product q.k as it is:

- *Balance*: q -> T q and k -> T^-1 k. With ``T^2 = S_q^-1 # S_k``, # being the geometric mean of matrices, both have
  the same covariance, and the expected ``|q|^2 + |k|^2`` is the smallest that there is.
- *Dense exponentials* (FAVOR#, arXiv 2302.00787, section 4): with A of each direction of the moment E[z z^T], of
  eigenvalue L,

      exp(2 A w^2 + sqrt(1 - 4 A) w z) sqrt(1 - 4 A),   A = (1 - 2 L - sqrt((2 L + 1)^2 + 8 L)) / 16,

  has the same expectation for every A, and for this one the smallest expected logarithm of the second moment.
"""

import torch
from torch import Tensor


def geometric_mean(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a # b = a^(1/2) (a^(-1/2) b a^(-1/2))^(1/2) a^(1/2)`` of symmetric positive matrices, (..., D, D)."""
    root, inverse = _power(a, 0.5), _power(a, -0.5)
    return _symmetric(root @ _power(_symmetric(inverse @ b @ inverse), 0.5) @ root)


def balance(queries: Tensor, keys: Tensor, loading: float = 1e-3) -> Tensor:
    """Return the symmetric T for which T q and T^-1 k have one covariance.

    Args:
        queries: covariance of queries, (H, D, D).
        keys: covariance of keys, (H, D, D).
        loading: share of the mean eigenvalue that is added to all of them, so that directions that hardly occurred are
            not stretched beyond measure.
    """
    queries, keys = (_loaded(x, loading) for x in (queries, keys))
    return _power(geometric_mean(_power(queries, -1.0), keys), 0.5)


def dense_exponential(draws: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return draws and the logarithms of their weights for sums q + k of a second moment.

    Args:
        draws: of N(0, I), (H, F, D).
        moment: E[(q + k)(q + k)^T], (H, D, D).

    Returns:
        Draws (H, F, D), rounded to bfloat16 so that a cast of the module does not change them, and the logarithm of the
        weight of each, (H, 1, F); ``sum_f weight_f exp(w_f.(q + k) - |q|^2/2 - |k|^2/2) / F`` estimates ``exp(q.k)``.
    """
    lengths, basis = torch.linalg.eigh(moment.double())
    lengths = lengths.clamp(min=0).unsqueeze(-2)
    a = (1 - 2 * lengths - ((2 * lengths + 1).square() + 8 * lengths).sqrt()) / 16
    gain = (1 - 4 * a).sqrt()
    chosen = ((draws.double() * gain) @ basis.transpose(-2, -1)).bfloat16().double()
    normal = chosen @ basis / gain  # what the rounded draws are draws of
    weights = (2 * a * normal.square() + gain.log()).sum(-1).unsqueeze(-2)
    return chosen.to(draws.dtype), weights.to(draws.dtype)


def _power(a: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values.clamp(min=1e-30).pow(exponent).unsqueeze(-2)) @ vectors.transpose(-2, -1)


def _symmetric(a: Tensor) -> Tensor:
    return (a + a.transpose(-2, -1)) / 2


def _loaded(a: Tensor, loading: float) -> Tensor:
    mean = a.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
    return a + loading * mean[..., None, None] * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
