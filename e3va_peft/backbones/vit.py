"""Plain vision transformers whose model class runs the loop over blocks itself: ViT and DeiT."""

from __future__ import annotations

from e3va_peft.backbones.base import Backbone, Branch
from e3va_peft.backbones.splices import plain_model

VIT = Backbone(
    name="vit",
    about="ViT, DeiT",
    exits=("transformers.models.vit.modeling_vit.ViTModel", "transformers.models.deit.modeling_deit.DeiTModel"),
    blocks="layers.{block}",
    width="layernorm_before",
    branches={"attention": Branch("attention"), "mlp": Branch("mlp")},
    tokenwise="mlp",
    prefix=lambda exit: 1 if exit.config.model_type == "vit" else 2,
    tail=("layernorm", "pooler"),
    splice=plain_model,
)
