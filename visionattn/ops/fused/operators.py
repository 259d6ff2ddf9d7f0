"""Operators of PyTorch, for what traces a call in place of running it: ``torch.compile`` above all."""

from collections.abc import Callable
from typing import Any

import torch

LIBRARY: Any = torch.library.Library("visionattn", "FRAGMENT")  # type: ignore[no-untyped-call]

TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def operator(
    schema: str,
    run: Callable[..., Any],
    shapes: Callable[..., Any],
    differentiate: Callable[..., Any] | None = None,
    remember: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Define an operator and return it.

    It is defined in the low-level form: the wrappers of ``torch.library.custom_op`` cost some 0.1 ms a call.

    Args:
        schema: its name, arguments and results, without namespace.
        run: what it does. It changes none of its arguments, and returns none of them.
        shapes: memory for its results alone.
        differentiate: the gradient, as for :func:`torch.library.register_autograd`.
        remember: what the gradient needs, as for it.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=TAGS)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"visionattn::{name}", shapes, lib=LIBRARY)
    if differentiate is not None:
        torch.library.register_autograd(f"visionattn::{name}", differentiate, setup_context=remember, lib=LIBRARY)
    found: Callable[..., Any] = getattr(torch.ops.visionattn, name).default
    return found
