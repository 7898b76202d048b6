"""timm's VisionTransformer (ViT, DeiT III, DINOv2, SigLIP, ...): the exit is two methods of the model itself."""

from __future__ import annotations

from e3va_peft.backbones.base import Backbone, Branch
from e3va_peft.backbones.timm import splice_tokens, without_norm

TIMM_VIT = Backbone(
    name="timm-vit",
    about="timm's VisionTransformer: ViT, DeiT III, DINOv2, SigLIP, ...",
    exits=("timm.models.vision_transformer.VisionTransformer",),
    methods=("forward_features", "forward_intermediates"),
    blocks="blocks.{block}",
    width="norm1",
    branches={"attention": Branch("drop_path1", "input"), "mlp": Branch("drop_path2", "input", computed_by="mlp")},
    tokenwise="mlp",
    prefix=lambda exit: exit.num_prefix_tokens,
    frozen=("patch_embed", "pos_drop", "patch_drop", "norm_pre", "blocks"),
    tail=("norm",),
    prepare=without_norm,
    splice=splice_tokens,
)
