"""Attention mechanisms by name."""

from visionattn.attention.agent import AgentAttention
from visionattn.attention.base import Attention
from visionattn.attention.cosformer import CosformerAttention
from visionattn.attention.dark import DarkAttention
from visionattn.attention.ela_diff import ElaDiffAttention
from visionattn.attention.ela_direction import ElaDirectionAttention
from visionattn.attention.ela_hadamard import ElaHadamardAttention
from visionattn.attention.ela_sum import ElaSumAttention
from visionattn.attention.elu import EluAttention
from visionattn.attention.focused import FocusedAttention
from visionattn.attention.gka import GaussianKernelAttention
from visionattn.attention.inline import InlineAttention
from visionattn.attention.mala import MalaAttention
from visionattn.attention.performer import PerformerAttention
from visionattn.attention.polaformer import PolaformerAttention
from visionattn.attention.rala import RalaAttention
from visionattn.attention.relu import ReluAttention
from visionattn.attention.slay import SlayAttention, SlayPaperAttention
from visionattn.attention.softmax import SoftmaxAttention
from visionattn.attention.ttt import TttAttention
from visionattn.attention.uniform import UniformAttention
from visionattn.attention.yat import YatAttention
from visionattn.attention.yat_spherical import SphericalYatAttention
from visionattn.errors import UnknownNameError, suggest


class _Mechanisms(dict[str, type[Attention]]):
    def __missing__(self, name: str) -> type[Attention]:
        raise UnknownNameError(f"unknown attention {name!r}; {suggest(name, self)}")


ATTENTION: dict[str, type[Attention]] = _Mechanisms(
    softmax=SoftmaxAttention,
    uniform=UniformAttention,
    relu=ReluAttention,
    elu=EluAttention,
    cosformer=CosformerAttention,
    performer=PerformerAttention,
    ela_hadamard=ElaHadamardAttention,
    ela_sum=ElaSumAttention,
    ela_diff=ElaDiffAttention,
    ela_direction=ElaDirectionAttention,
    yat=YatAttention,
    yat_spherical=SphericalYatAttention,
    slay=SlayAttention,
    slay_paper=SlayPaperAttention,
    gka=GaussianKernelAttention,
    dark=DarkAttention,
    focused=FocusedAttention,
    polaformer=PolaformerAttention,
    agent=AgentAttention,
    mala=MalaAttention,
    inline=InlineAttention,
    rala=RalaAttention,
    ttt=TttAttention,
)
