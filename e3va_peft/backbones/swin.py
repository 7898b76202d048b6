"""Swin Transformer v1: four stages, patch merging between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from e3va_peft.backbones.base import Backbone, Branch, ExitCall, Host, Merging, second_argument
from e3va_peft.backbones.splices import add, add_to_map, replaced

if TYPE_CHECKING:
    from e3va_peft.highway import Lane


def splice(outputs: Any, lane: Lane, call: ExitCall) -> Any:
    """Add the lane to the stages' outputs.

    `hidden_states[i + 1]` is stage i behind its patch merging. `reshaped_hidden_states[i + 1]` is the same as a map
    (B, C, H, W), or the stage *before* merging where the caller (`SwinBackbone`) asked for that.
    """
    before_merging = call.kwargs.get("output_hidden_states_before_downsampling", False)
    hidden, maps = list(outputs.hidden_states or ()), list(outputs.reshaped_hidden_states or ())
    changes: dict[str, Any] = {}
    for i, blocks in enumerate(call.depth):
        merged, last = i + 1 < len(call.depth), i + 1 == len(call.exit.layers)  # type: ignore[arg-type]
        if maps and maps[i + 1] is not None:
            maps[i + 1] = add_to_map(
                maps[i + 1], lane.ahead(i) if merged and not before_merging else lane.behind(i, blocks)
            )
        if hidden and hidden[i + 1] is not None and (merged or last):
            hidden[i + 1] = add(hidden[i + 1], lane.ahead(i) if merged else lane.behind(i, blocks))
        if last:
            changes["last_hidden_state"] = add(outputs.last_hidden_state, lane.behind(i, blocks))
    if hidden:
        changes["hidden_states"] = tuple(hidden)
    if maps:
        changes["reshaped_hidden_states"] = tuple(maps)
    return replaced(outputs, **changes)


SWIN = Backbone(
    name="swin",
    about="Swin Transformer v1",
    exits=("transformers.models.swin.modeling_swin.SwinEncoder",),
    blocks="layers.{stage}.blocks.{block}",
    width="layernorm_before",
    # The un-windowed attention output is what enters `drop_path`; `attention` itself returns windows.
    branches={"attention": Branch("drop_path", "input"), "mlp": Branch("mlp")},
    merging=Merging(("layers.{stage}.downsample",)),
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
    splice=splice,
)
