"""DINOv2, with and without registers: a plain vision transformer with LayerScale and an encoder of its own."""

from __future__ import annotations

from e3va_peft.backbones.base import Backbone, Branch, Host
from e3va_peft.backbones.splices import plain_encoder

_MODELS = "transformers.models"

DINOV2 = Backbone(
    name="dinov2",
    about="DINOv2, with or without registers",
    exits=(
        f"{_MODELS}.dinov2.modeling_dinov2.Dinov2Encoder",
        f"{_MODELS}.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersEncoder",
    ),
    blocks="layer.{block}",
    width="norm1",
    # Behind LayerScale, as the stream sees them. `drop_path` is one module called twice and cannot be read.
    branches={"attention": Branch("layer_scale1"), "mlp": Branch("layer_scale2", computed_by="mlp")},
    tap_norm="relative",
    tokenwise="mlp",
    prefix=lambda exit: 1 + getattr(exit.config, "num_register_tokens", 0),
    hosts=(
        # One norm for all that leaves, which may be switched off.
        Host(
            classes=(
                f"{_MODELS}.dinov2.modeling_dinov2.Dinov2Backbone",
                f"{_MODELS}.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersBackbone",
            ),
            frozen=("../embeddings",),
            norms=("../layernorm",),
            cuts=True,
            norms_if=lambda backbone: backbone.config.apply_layernorm,
        ),
        Host(frozen=("../embeddings",), norms=("../layernorm",)),
    ),
    splice=plain_encoder,
)
