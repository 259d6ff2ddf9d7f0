"""The Hadamard exponential kernel of ELA, ``k(q, k) = sum_d exp(q_d) exp(k_d)``, in a form that cannot overflow.

Source: Exact Linear Attention (arXiv 2605.18848), section 3. With ``l_d = log sum_j exp(k_jd)`` the normalised
output is

    y_i = sum_d softmax_d(q_i + l)_d * (sum_j softmax_j(k_jd) v_j),

two ordinary softmaxes: D value slots, filled over the tokens and read by each query. It is the kernel's own attention
exactly (no epsilon, a convex mix of the values), not an approximation of softmax attention; as a matrix over tokens its
rank is at most D per head.
"""

from torch import Tensor

from visionattn.ops.precision import widen


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernel through its explicit N x N matrix; O(N^2 D) time and memory.

    Args:
        q: queries, (B, H, N, D).
        k: keys, (B, H, N, D).
        v: values, (B, H, N, E).
    """
    log_kernel = (q.unsqueeze(-2) + k.unsqueeze(-3)).logsumexp(-1)
    return log_kernel.softmax(-1) @ v


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernel in O(N D E) time and O(N (D + E)) memory; same arguments and, up to rounding, same result."""
    q, k = widen(q), widen(k)
    top = k.detach().amax(-2, keepdim=True)
    # The mean, not the sum, so that half-precision exports stay finite; log N is common to all d and cancels.
    log_mass = top + (k - top).exp().mean(-2, keepdim=True).log()
    slots = k.softmax(-2).to(v.dtype).transpose(-2, -1) @ v
    return (q + log_mass).softmax(-1).to(v.dtype) @ slots
