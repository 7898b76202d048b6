"""DINOv3, its ConvNeXts: a ConvNeXt whose stem is the downsampling of its first stage."""

from __future__ import annotations

from e3va_peft.backbones.base import Backbone, Branch, Host, Merging, map_size
from e3va_peft.backbones.splices import stages_of_maps

_MODULE = "transformers.models.dinov3_convnext.modeling_dinov3_convnext"

DINOV3_CONVNEXT = Backbone(
    name="dinov3-convnext",
    about="DINOv3, its ConvNeXts",
    exits=(f"{_MODULE}.DINOv3ConvNextEncoder",),
    blocks="stages.{stage}.layers.{block}",
    width="layer_norm",
    branches={"branch": Branch("drop_path", "input")},
    merging=Merging(("stages.{next}.downsample_layers.0", "stages.{next}.downsample_layers.1")),
    channels="first",
    grid=map_size,
    hosts=(
        Host(classes=(f"{_MODULE}.DINOv3ConvNextBackbone",), cuts=True),
        Host(norms=("../layer_norm",)),
    ),
    splice=stages_of_maps,
)
