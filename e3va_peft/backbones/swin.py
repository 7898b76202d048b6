"""Swin Transformer v1: four stages, patch merging between them."""

from __future__ import annotations

from e3va_peft.backbones.base import Backbone, Branch, Host, Merging, merge_two_by_two, second_argument
from e3va_peft.backbones.splices import stages_of_tokens

SWIN = Backbone(
    name="swin",
    about="Swin Transformer v1",
    exits=("transformers.models.swin.modeling_swin.SwinEncoder",),
    blocks="layers.{stage}.blocks.{block}",
    width="layernorm_before",
    # The un-windowed attention output is what enters `drop_path`; `attention` itself returns windows.
    branches={"attention": Branch("drop_path", "input"), "mlp": Branch("mlp")},
    tokenwise="mlp",
    merging=Merging(
        ("layers.{stage}.downsample",),
        run=merge_two_by_two,
        forward="transformers.models.swin.modeling_swin.SwinPatchMerging.forward",
        parts=("layers.{stage}.downsample.norm", "layers.{stage}.downsample.reduction"),
    ),
    grid=second_argument,
    hosts=(
        # It norms each feature map by itself.
        Host(
            classes=("transformers.models.swin.modeling_swin.SwinBackbone",),
            path="../..",
            frozen=("../embeddings",),
            norms=("../../hidden_states_norms.{feature}",),
            unused=("../layernorm", "../../hidden_states_norms.*"),
            cuts=True,
        ),
        Host(frozen=("../embeddings",), norms=("../layernorm",)),
    ),
    splice=stages_of_tokens,
    onto=True,
)
