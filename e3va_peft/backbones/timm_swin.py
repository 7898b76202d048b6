"""timm's SwinTransformer: taken apart into a list of feature maps (`features_only=True`), or whole."""

from __future__ import annotations

from dataclasses import replace

from e3va_peft.backbones.base import Backbone, Branch, Merging, map_size
from e3va_peft.backbones.timm import splice_list, splice_maps, without_norm

TIMM_SWIN_FEATURES = Backbone(
    name="timm-swin-features",
    about="timm's SwinTransformer, features_only=True",
    exits=("timm.models._features.FeatureListNet",),
    blocks="layers_{stage}.blocks.{block}",
    width="norm1",
    branches={"attention": Branch("drop_path1", "input"), "mlp": Branch("drop_path2", "input", computed_by="mlp")},
    tokenwise="mlp",
    merging=Merging(("layers_{next}.downsample",)),
    grid=map_size,
    shown=lambda call: True,
    splice=splice_list,
)

TIMM_SWIN = replace(
    TIMM_SWIN_FEATURES,
    name="timm-swin",
    about="timm's SwinTransformer",
    exits=("timm.models.swin_transformer.SwinTransformer",),
    methods=("forward_features", "forward_intermediates"),
    blocks="layers.{stage}.blocks.{block}",
    merging=Merging(("layers.{next}.downsample",)),
    frozen=("patch_embed", "layers"),
    tail=("norm",),
    shown=lambda call: call.method != "forward_features",
    prepare=without_norm,
    splice=splice_maps,
)
