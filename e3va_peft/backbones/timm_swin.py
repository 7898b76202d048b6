"""timm's SwinTransformer: whole, or taken apart into a list of feature maps (`features_only=True`)."""

from __future__ import annotations

from dataclasses import replace

from e3va_peft.backbones.base import Backbone, Branch, Merging, map_size, no_change
from e3va_peft.backbones.timm import splice_list, splice_maps, without_norm

TIMM_SWIN = Backbone(
    name="timm-swin",
    about="timm's SwinTransformer",
    exits=("timm.models.swin_transformer.SwinTransformer",),
    methods=("forward_features", "forward_intermediates"),
    blocks="layers.{stage}.blocks.{block}",
    width="norm1",
    branches={"attention": Branch("drop_path1", "input"), "mlp": Branch("drop_path2", "input", computed_by="mlp")},
    tokenwise="mlp",
    merging=Merging(("layers.{next}.downsample",)),
    grid=map_size,
    frozen=("patch_embed", "layers"),
    tail=("norm",),
    shown=lambda call: call.method != "forward_features",
    prepare=without_norm,
    splice=splice_maps,
)

TIMM_SWIN_FEATURES = replace(
    TIMM_SWIN,
    name="timm-swin-features",
    about="timm's SwinTransformer, features_only=True",
    exits=("timm.models._features.FeatureListNet",),
    methods=(),
    blocks="layers_{stage}.blocks.{block}",
    merging=Merging(("layers_{next}.downsample",)),
    frozen=(),
    tail=(),
    shown=lambda call: True,
    prepare=no_change,
    splice=splice_list,
)
