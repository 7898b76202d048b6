"""DINOv3, its vision transformers: a plain one with LayerScale, registers and an encoder of its own."""

from __future__ import annotations

from e3va_peft.backbones.base import Backbone, Branch, Host
from e3va_peft.backbones.splices import plain_encoder

_FROZEN = ("../embeddings", "../rope_embeddings")

DINOV3_VIT = Backbone(
    name="dinov3-vit",
    about="DINOv3, its vision transformers",
    exits=("transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTEncoder",),
    blocks="layer.{block}",
    width="norm1",
    branches={"attention": Branch("layer_scale1"), "mlp": Branch("layer_scale2", computed_by="mlp")},
    tap_norm="relative",
    tokenwise="mlp",
    prefix=lambda exit: 1 + exit.config.num_register_tokens,
    hosts=(
        # The last block's output is always normed, the others where the config says so.
        Host(
            classes=("transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTBackbone",),
            frozen=_FROZEN,
            norms=("../norm",),
            cuts=True,
            norms_if=lambda host: host.config.apply_layernorm or host.stage_names[-1] in host.out_features,
        ),
        Host(frozen=_FROZEN, norms=("../norm",)),
    ),
    splice=plain_encoder,
)
