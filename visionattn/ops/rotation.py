"""Rotary positions: pairs of channels of queries and keys are turned by angles that depend on where a token stands.

The product of a turned query and a turned key depends on the distance of their tokens alone. The tables are timm's:
the sines of all channels, then their cosines.

Source: RoFormer (arXiv 2104.09864), section 3.
"""

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from visionattn.errors import UnsupportedError


def rotate(x: Tensor, rope: Tensor, half: bool = False) -> Tensor:
    """Turn the last tokens of ``x``; the tokens before, for which the table has no rows, are prefix tokens and stay.

    Args:
        x: queries or keys, (B, H, N, D).
        rope: sines and cosines of M <= N tokens, (M, 2 D), or with dimensions before that broadcast to (B, H).
        half: pair channel d with d + D / 2, rather than 2 d with 2 d + 1.

    Returns:
        (B, H, N, D), in the type of ``x``.

    Raises:
        UnsupportedError: the table has more rows than there are tokens, or is for another width.
    """
    prefix = x.shape[-2] - rope.shape[-2]
    if prefix < 0 or rope.shape[-1] != 2 * x.shape[-1]:
        raise UnsupportedError(
            f"rope: got {rope.shape} for heads of {x.shape[-1]} channels and {x.shape[-2]} tokens; give sines and "
            "cosines, (tokens without prefix tokens, 2 x head_dim)"
        )
    turned = apply_rot_embed_cat(x[:, :, prefix:], rope, half)
    return torch.cat((x[:, :, :prefix], turned), -2)
