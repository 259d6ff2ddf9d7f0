"""timm models: stock vision transformers through ``attn_layer``. Importing this package registers the names."""

from timm.models.vision_transformer import ATTN_LAYERS

from visionattn.attention import ATTENTION

ATTN_LAYERS.update(ATTENTION)
