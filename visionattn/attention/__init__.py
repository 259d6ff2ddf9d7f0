"""Attention mechanisms by name. A new one is a file here and a line in :data:`ATTENTION`."""

from visionattn.attention.base import Attention, LinearAttention
from visionattn.attention.ela_hadamard import ElaHadamardAttention
from visionattn.attention.elu import EluAttention
from visionattn.attention.softmax import SoftmaxAttention
from visionattn.errors import UnknownNameError, suggest


class _Mechanisms(dict[str, type[Attention]]):
    def __missing__(self, name: str) -> type[Attention]:
        raise UnknownNameError(f"unknown attention {name!r}; {suggest(name, self)}")


ATTENTION: dict[str, type[Attention]] = _Mechanisms(
    softmax=SoftmaxAttention,
    elu=EluAttention,
    ela_hadamard=ElaHadamardAttention,
)

__all__ = ["ATTENTION", "Attention", "LinearAttention"]
