"""timm models: stock vision transformers through ``attn_layer``, and ours. Importing it registers the names."""

from timm.layers import DropPath, Format, LayerNorm, Mlp
from timm.models import FeatureInfo, FeatureListNet, register_notrace_module
from timm.models.vision_transformer import ATTN_LAYERS
from torch.serialization import add_safe_globals

from visionattn.attention import ATTENTION, Attention
from visionattn.backbones import saved
from visionattn.backbones.lat import Lat, LatBlock, LatStage
from visionattn.backbones.vit_lat import VitLat

ATTN_LAYERS.update(ATTENTION)
register_notrace_module(Attention)  # FX sees an attention as one node, since what it does depends on types and shapes
# What a pickled lat consists of, so that a detector on one loads as data.
add_safe_globals([Lat, LatStage, LatBlock, DropPath, LayerNorm, Mlp, FeatureListNet, FeatureInfo, Format])

__all__ = ["Lat", "VitLat", "saved"]
