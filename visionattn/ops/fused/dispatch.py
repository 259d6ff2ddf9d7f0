"""Whether fused kernels can do a call, by the switch, the device and the inputs; the kernels are imported if so.

Each function returns None where the eager formula is to be taken.
"""

import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from visionattn.errors import UnsupportedError
from visionattn.ops import switch
from visionattn.ops.fused.maps import FeatureMap
from visionattn.ops.packing import Projection, transformed

TRITON = find_spec("triton") is not None

MAX_FEATURES, MAX_WIDTH = 256, 128
MAX_ANCHORS = 16
TYPES = (torch.float16, torch.bfloat16, torch.float32)


def attend_positive(inputs: Projection, features: FeatureMap | None, keep: Tensor | None = None) -> Tensor | None:
    """Attend over all tokens by positive features, or return None; shapes as in :mod:`visionattn.ops`.

    Raises:
        UnsupportedError: the switch is on ``fused`` and no kernel can do it.
    """
    if not _chosen(_map_refusal(inputs, features) or _refusal(inputs)):
        return None
    assert features is not None
    from visionattn.ops.fused.library import attend

    return attend(inputs, features, keep)


def attend_with_moments(inputs: Projection, kind: str, keep: Tensor | None = None) -> Tensor | None:
    """Attend over all tokens by one of ELA's kernels, ``sum``, ``diff`` or ``direction``, or return None.

    Raises:
        UnsupportedError: the switch is on ``fused`` and no kernel can do it.
    """
    if not _chosen(_refusal(inputs)):
        return None
    from visionattn.ops.fused.moments_library import attend_moments

    return attend_moments(inputs, kind, keep)


def attend_causally(
    q: Tensor, k: Tensor, v: Tensor, features: FeatureMap | Callable[[Tensor], Tensor], keep: Tensor | None = None
) -> Tensor | None:
    """Attend to the tokens before each by positive features, or return None.

    Args:
        q: (B, H, N, D).
        k: (B, H, N, D).
        v: (B, H, N, E).
        features: a map; or what returns the logarithms of features, (B, H, N, F), of queries or keys.
        keep: key mask, boolean, broadcastable to (B, H, N, 1).

    Raises:
        UnsupportedError: the switch is on ``fused`` and no kernel can do it.
    """
    refusal = _refusal(Projection(q, q.shape[1], k, v), MAX_FEATURES)
    if not refusal:
        if isinstance(features, FeatureMap):
            count = features.features(q.shape[-1])
        else:
            count = features(q[:1, :, :1].detach()).shape[-1]
        if count > MAX_FEATURES:
            refusal = f"it has {count} features a head, and kernels take {MAX_FEATURES}"
    if not _chosen(refusal):
        return None
    from visionattn.ops.fused.causal_library import attend_causal

    return attend_causal(q, k, v, features, keep)


def refuse(reason: str) -> Tensor | None:
    """Return None, for the eager formula to be taken for a reason.

    Raises:
        UnsupportedError: the switch is on ``fused``.
    """
    _chosen(reason)
    return None


def _chosen(refusal: str | None) -> bool:
    """Say whether a kernel is taken, and tell whoever listens."""
    path = switch.path()
    if path == "fused" and refusal:
        raise UnsupportedError(f"no fused kernel: {refusal}; choose kernels('auto') or kernels('eager')")
    fused = path != "eager" and not refusal
    if switch.listeners:
        switch.tell(fused, "kernels('eager') is chosen" if path == "eager" else refusal or "")
    return fused


def _refusal(inputs: Projection, widest: int = MAX_WIDTH) -> str | None:
    """Say why kernels cannot take the inputs, whatever the map."""
    if _exporting():
        return "the network is being exported"
    compiling = torch.compiler.is_compiling()
    if not compiling and transformed():
        return "torch.func or forward-mode differentiation is at work"
    x, _, k, v = inputs
    k, v = x if k is None else k, x if v is None else v
    reason = _reason if compiling else _remembered  # what is remembered is unknown to a compiler
    return reason(x.device, k.device, v.device, x.dtype, k.dtype, v.dtype, *inputs.shapes(), interpreted(x), widest)


def _exporting() -> bool:
    """Say whether a graph is captured that shall run without this package.

    The flag is read, not torch.compiler.is_exporting(): up to PyTorch 2.11 the compiler takes that for always true.
    """
    flag: bool = torch.compiler._is_exporting_flag
    return flag or torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]


def _reason(*inputs: Any) -> str | None:
    """Say why kernels cannot take inputs of such devices, types and shapes."""
    q_device, k_device, v_device, q_type, k_type, v_type, q, k, v, interpreter, widest = inputs
    if not TRITON:
        return "Triton is not installed"
    if q_device.type != "cuda" and not interpreter:
        return f"the inputs are on {q_device.type}, and kernels run on cuda"
    if any(x not in TYPES for x in (q_type, k_type, v_type)):
        return f"the inputs are {q_type}, {k_type}, {v_type}; kernels take float16, bfloat16, float32"
    if q_type != k_type or q_device != k_device or q_device != v_device:
        return f"queries are {q_type} on {q_device}, keys {k_type} on {k_device}, values on {v_device}"
    if len(q) != 4 or q != k or q[:-1] != v[:-1] or 0 in (*q, *v):
        shapes = f"queries {tuple(q)}, keys {tuple(k)}, values {tuple(v)}"
        return f"there are {shapes}; kernels take (B, H, N, D) twice and (B, H, N, E), none of them empty"
    width = v[-1] if q[-1] <= widest else max(q[-1], v[-1])
    return f"heads are {width} wide, and kernels take {MAX_WIDTH}" if width > MAX_WIDTH else None


@lru_cache(maxsize=1024)
def _remembered(*inputs: Any) -> str | None:
    """Say once for each kind of call why kernels cannot take it; on a GPU, where that costs time, with a warning."""
    reason = _reason(*inputs)
    if reason and inputs[0].type == "cuda" and switch.path() == "auto":
        warnings.warn(f"no fused kernel: {reason}; the eager formula is taken, which is slower", stacklevel=2)
    return reason


def _map_refusal(inputs: Projection, features: FeatureMap | None) -> str | None:
    """Say why kernels cannot take the map."""
    if features is None:
        return "there is none for this mechanism and its options"
    if features.draws is None:
        return None
    constants = features.draws, features.bank, features.log_weights
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in constants):
        return "its draws, anchors or weights want a gradient, and kernels give none"
    count = features.features(inputs.shapes()[0][-1])
    if count > MAX_FEATURES:
        return f"it has {count} features a head, and kernels take {MAX_FEATURES}"
    types = inputs.x.dtype, inputs.x.dtype if inputs.v is None else inputs.v.dtype
    if torch.float32 in types:
        return f"kernels with projections take half precision, and queries are {types[0]}, values {types[1]}"
    if features.bank is not None and len(features.bank) > MAX_ANCHORS:
        return f"it has {len(features.bank)} anchors, and kernels take {MAX_ANCHORS}"
    return None


def reaches(x: Tensor) -> bool:
    """Say whether kernels may run where x is: on a GPU, or in Triton's interpreter."""
    return x.is_cuda or interpreted(x)


def interpreted(x: Tensor) -> bool:
    """Say whether kernels run in Triton's interpreter: on the CPU, if the switch is on ``fused``."""
    return x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and switch.path() == "fused"
