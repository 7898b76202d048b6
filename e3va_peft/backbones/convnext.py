"""ConvNeXt, V1 and V2: four stages of one branch a block, on maps, the downsampling in front of a stage."""

from __future__ import annotations

from e3va_peft.backbones.base import Backbone, Branch, Host, Merging, map_size
from e3va_peft.backbones.splices import stages_of_maps

_V1, _V2 = "transformers.models.convnext.modeling_convnext", "transformers.models.convnextv2.modeling_convnextv2"

CONVNEXT = Backbone(
    name="convnext",
    about="ConvNeXt, ConvNeXt V2",
    exits=(f"{_V1}.ConvNextEncoder", f"{_V2}.ConvNextV2Encoder"),
    blocks="stages.{stage}.layers.{block}",
    width="layernorm",
    branches={"branch": Branch("drop_path", "input")},
    merging=Merging(("stages.{next}.downsampling_layer.0", "stages.{next}.downsampling_layer.1")),
    channels="first",
    grid=map_size,
    hosts=(
        Host(
            classes=(f"{_V1}.ConvNextBackbone", f"{_V2}.ConvNextV2Backbone"),
            frozen=("../embeddings",),
            norms=("../hidden_states_norms.{feature}",),
            unused=("../hidden_states_norms.*",),
            cuts=True,
        ),
        Host(frozen=("../embeddings",), norms=("../layernorm",)),
    ),
    splice=stages_of_maps,
)
