"""Swin Transformer v1: four stages, patch merging between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from e3va_peft.backbones.base import Backbone, Run, Site, StageSpec, TapPoint, add, child, deepest_output, is_a


class Swin(Backbone):
    """`SwinEncoder`, in `SwinModel` and all that is built on it (`SwinBackbone`, UperNet, Mask2Former).

    The un-windowed attention output is what enters `drop_path`; `attention` itself returns windows.
    """

    name = "swin"
    exit_classes = ("SwinEncoder",)

    def stages(self, exit: nn.Module) -> tuple[StageSpec, ...]:
        """Describe the stages: `layers[i].blocks[j]`, patch merging in `layers[i].downsample`."""
        return tuple(
            StageSpec(
                width=stage.blocks[0].layernorm_before.normalized_shape[0],
                blocks=tuple(
                    {"attention": TapPoint(block.drop_path, "input"), "mlp": TapPoint(block.mlp)}
                    for block in stage.blocks
                ),
                merging=stage.downsample,
            )
            for stage in exit.layers  # type: ignore[union-attr]
        )

    def site(self, exit: nn.Module, name: str, ancestors: Sequence[tuple[str, nn.Module]]) -> Site:
        """Describe the surroundings: `SwinModel` norms its last stage, `SwinBackbone` each feature map by itself."""
        path, model = ancestors[-1]
        norm, embeddings = child(path, "layernorm"), child(path, "embeddings")
        blocks = tuple(len(stage.blocks) for stage in exit.layers)  # type: ignore[union-attr]
        host_path, host = ancestors[-2] if len(ancestors) > 1 else ("", model)
        if not is_a(host, "SwinBackbone"):
            return Site(depth=blocks, frozen=(embeddings,), norms=(norm,))
        norms = {key: child(host_path, f"hidden_states_norms.{key}") for key in host.hidden_states_norms}  # type: ignore[union-attr]
        return Site(
            depth=blocks[: deepest_output(host)],
            frozen=(embeddings,),
            norms=tuple(norm for key, norm in norms.items() if key in host.out_features),  # type: ignore[operator]
            unused=(norm, *(norm for key, norm in norms.items() if key not in host.out_features)),  # type: ignore[operator]
        )

    def splice(self, outputs: Any, run: Run) -> Any:
        """Add the lane to the stages' outputs.

        `hidden_states[i + 1]` is stage i behind its patch merging. `reshaped_hidden_states[i + 1]` is the same as a
        map (B, C, H, W), or the stage *before* merging where the caller (`SwinBackbone`) asked for that.
        """
        before_merging = run.kwargs.get("output_hidden_states_before_downsampling", False)
        hidden = list(outputs.hidden_states or ())
        maps = list(outputs.reshaped_hidden_states or ())
        for i, blocks in enumerate(run.depth):
            behind = ahead = run.lane.advance(blocks)
            last = run.lane.mergings[i] is None
            merged = not last and (i + 1 < len(run.depth) or not before_merging)
            if merged:
                ahead = run.lane.merge()
            if maps and maps[i + 1] is not None:
                maps[i + 1] = _add_to_map(maps[i + 1], behind if before_merging else ahead)
            if hidden and hidden[i + 1] is not None and (merged or last):
                hidden[i + 1] = add(hidden[i + 1], ahead)
            if last:
                outputs.last_hidden_state = add(outputs.last_hidden_state, ahead)
        if hidden:
            outputs.hidden_states = tuple(hidden)
        if maps:
            outputs.reshaped_hidden_states = tuple(maps)
        return outputs


def _add_to_map(x: Tensor, z: Tensor) -> Tensor:
    """(B, C, H, W) + (B, H * W, C) -> (B, C, H, W)."""
    return add(x, z.transpose(1, 2).reshape(x.shape))
