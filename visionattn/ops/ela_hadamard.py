"""The Hadamard exponential kernel of ELA, ``k(q, k) = sum_d exp(q_d) exp(k_d)``: the features are ``exp`` itself.

Source: Exact Linear Attention (arXiv 2605.18848), section 3.
"""

from torch import Tensor


def log_kernel(q: Tensor, k: Tensor) -> Tensor:
    """Logarithm of the kernel of all pairs, (B, H, N, N); O(N^2 D) memory."""
    return (q.unsqueeze(-2) + k.unsqueeze(-3)).logsumexp(-1)
