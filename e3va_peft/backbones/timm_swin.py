"""timm's SwinTransformer: whole, or taken apart into a list of feature maps (`features_only=True`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from e3va_peft.backbones.base import Backbone, Branch, Merging, map_size
from e3va_peft.backbones.splices import add, in_own_dtype
from e3va_peft.backbones.timm import bound, taken, without_norm


def splice(outputs: Any, lane: Any, call: Any) -> Any:
    """Splice the last map (B, H, W, C), normed again, and of `forward_intermediates` maps (B, C, H, W)."""
    last, arguments = len(call.depth) - 1, bound(call)
    maps = [] if call.method == "forward_features" else outputs if arguments["intermediates_only"] else outputs[1]
    which, spliced = taken(call, len(call.depth)) if maps else [], []
    for x, stage in zip(maps, which, strict=True):
        x = x.movedim(1, -1)
        x = add(x, lane.behind(stage, call.depth[stage]).reshape(x.shape))
        x = in_own_dtype(call.tail["norm"], x) if arguments["norm"] and stage == last else x
        spliced.append(x.movedim(-1, 1).contiguous())
    if spliced and arguments["intermediates_only"]:
        return spliced
    if spliced and arguments["stop_early"] and max(which) < last:
        return spliced[-1].movedim(1, -1).contiguous(), spliced
    x = call.tail_input
    final = in_own_dtype(call.tail["norm"], add(x, lane.behind(last, call.depth[last]).reshape(x.shape)))
    return (final, spliced) if spliced else final


def splice_list(outputs: Any, lane: Any, call: Any) -> Any:
    """Splice a list of maps (B, H, W, C)."""
    stages = [int(name.rpartition("_")[2]) for name in call.exit.return_layers]
    return [add(x, lane.behind(i, call.depth[i]).reshape(x.shape)) for x, i in zip(outputs, stages, strict=True)]


TIMM_SWIN = Backbone(
    name="timm-swin",
    about="timm's SwinTransformer",
    exits=("timm.models.swin_transformer.SwinTransformer",),
    methods=("forward_features", "forward_intermediates"),
    blocks="layers.{stage}.blocks.{block}",
    width="norm1",
    branches={"attention": Branch("drop_path1", "input"), "mlp": Branch("drop_path2", "input", computed_by="mlp")},
    merging=Merging(("layers.{next}.downsample",)),
    grid=map_size,
    frozen=("patch_embed", "layers"),
    tail=("norm",),
    prepare=without_norm,
    splice=splice,
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
    prepare=lambda call: (call.args, call.kwargs),
    splice=splice_list,
)
