"""Whether fused kernels can do a call, by the switch, the device and the inputs; the kernels are imported if so.

Each function returns None where the eager formula is to be taken.
"""

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from visionattn.errors import UnsupportedError
from visionattn.ops import switch
from visionattn.ops.fused.maps import FeatureMap
from visionattn.ops.packing import transformed

TRITON = find_spec("triton") is not None

MAX_FEATURES, MAX_WIDTH = 256, 128
MAX_ANCHORS = 16

SHARED_MEMORY = {"wide": 148_000, "random": 155_000, "warped": 205_000, "sphere": 168_000, "projected": 224_000}
"""Bytes a program needs: of heads wider than 64, of maps with projections, of both; ``LEAST`` of all others."""

LEAST = 99_000


def attend_positive(q: Tensor, k: Tensor, v: Tensor, features: FeatureMap | None) -> Tensor | None:
    """Attend over all tokens by positive features, or return None; shapes as in :mod:`visionattn.ops`.

    Raises:
        UnsupportedError: the switch is on ``fused`` and no kernel can do it.
    """
    if not _chosen(_refusal(q, k, v) or _map_refusal(q, v, features)):
        return None
    assert features is not None
    from visionattn.ops.fused.library import attend

    return attend(q, k, v, features)


def attend_with_moments(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor | None:
    """Attend over all tokens by one of ELA's kernels, ``sum``, ``diff`` or ``direction``, likewise."""
    if not _chosen(_refusal(q, k, v) or _width_refusal(q, v)):
        return None
    from visionattn.ops.fused.moments_library import attend_moments

    return attend_moments(q, k, v, kind)


def attend_causally(a: Tensor, b: Tensor, v: Tensor) -> Tensor | None:
    """Attend to the tokens before each, by the logarithms of positive features (B, H, N, F), likewise."""
    refusal = f"it has {a.shape[-1]} features a head, and kernels take {MAX_FEATURES}"
    if not _chosen(_refusal(a, b, v) or (refusal if a.shape[-1] > MAX_FEATURES else _width_refusal(v, v))):
        return None
    from visionattn.ops.fused.causal_library import attend_causal

    return attend_causal(a, b, v)


def refuse(reason: str) -> Tensor | None:
    """Return None, for the eager formula to be taken for a reason.

    Raises:
        UnsupportedError: the switch is on ``fused``.
    """
    _chosen(reason)
    return None


def _chosen(refusal: str | None) -> bool:
    path = switch.path()
    if path == "fused" and refusal:
        raise UnsupportedError(f"no fused kernel: {refusal}; choose kernels('auto') or kernels('eager')")
    return path != "eager" and not refusal


def _refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Say why kernels cannot take the inputs, whatever the map."""
    if not TRITON:
        return "Triton is not installed"
    if q.device.type != "cuda" and not (q.device.type == "cpu" and interpreted()):
        return f"the inputs are on {q.device.type}, and kernels run on cuda"
    if not torch.compiler.is_compiling() and transformed():
        return "torch.func or forward-mode differentiation is at work"
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
        return "the network is being exported"
    if any(x.dtype not in (torch.float16, torch.bfloat16, torch.float32) for x in (q, k, v)):
        return f"the inputs are {q.dtype}, {k.dtype}, {v.dtype}; kernels take float16, bfloat16, float32"
    if q.dtype != k.dtype or q.device != k.device or q.device != v.device:
        return f"queries are {q.dtype} on {q.device}, keys {k.dtype} on {k.device}, values on {v.device}"
    if q.dim() != 4 or q.shape != k.shape or q.shape[:-1] != v.shape[:-1] or min(q.numel(), v.numel()) == 0:
        shapes = f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}"
        return f"there are {shapes}; kernels take (B, H, N, D) twice and (B, H, N, E), none of them empty"
    return _memory_refusal(q, SHARED_MEMORY["wide"] if max(q.shape[-1], v.shape[-1]) > 64 else LEAST)


def _map_refusal(q: Tensor, v: Tensor, features: FeatureMap | None) -> str | None:
    """Say why kernels cannot take the map."""
    if features is None:
        return "there is none for this mechanism and its options"
    refusal = _width_refusal(q, v)
    if features.draws is None or refusal:
        return refusal
    if features.features(q.shape[-1]) > MAX_FEATURES:
        return f"it has {features.features(q.shape[-1])} features a head, and kernels take {MAX_FEATURES}"
    if torch.float32 in (q.dtype, v.dtype):
        return f"kernels with projections take half precision, and queries are {q.dtype}, values {v.dtype}"
    if features.bank is not None and len(features.bank) > MAX_ANCHORS:
        return f"it has {len(features.bank)} anchors, and kernels take {MAX_ANCHORS}"
    kind = "warped" if features.warp is not None else features.kind
    return _memory_refusal(q, SHARED_MEMORY["projected" if q.shape[-1] > 64 else kind])


def _memory_refusal(q: Tensor, need: int) -> str | None:
    room = _shared_memory(q.device) if q.is_cuda else need
    return f"a program needs {need} bytes of shared memory, and the GPU has {room}" if room < need else None


def _width_refusal(q: Tensor, v: Tensor) -> str | None:
    width = max(q.shape[-1], v.shape[-1])
    return f"heads are {width} wide, and kernels take {MAX_WIDTH}" if width > MAX_WIDTH else None


def interpreted() -> bool:
    """Say whether kernels run in Triton's interpreter, on the CPU, and are to: if the switch is on ``fused``."""
    return os.environ.get("TRITON_INTERPRET") == "1" and switch.path() == "fused"


def _shared_memory(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
