"""DINOv2, with and without registers: a plain vision transformer with LayerScale and an encoder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from e3va_peft.backbones.base import (
    Backbone,
    Run,
    Site,
    StageSpec,
    TapPoint,
    add,
    child,
    deepest_output,
    is_a,
    splice_hidden_states,
)


class Dinov2(Backbone):
    """`Dinov2Encoder`, in `Dinov2Model`, `Dinov2Backbone` and all that is built on them.

    The taps are behind LayerScale, as the residual stream sees them. `drop_path` is one module called twice and cannot
    be read.
    """

    name = "dinov2"
    exit_classes = ("Dinov2Encoder", "Dinov2WithRegistersEncoder")

    def stages(self, exit: nn.Module) -> tuple[StageSpec, ...]:
        """Describe the one stage: `layer[j]`."""
        blocks = tuple(
            {"attention": TapPoint(block.layer_scale1), "mlp": TapPoint(block.layer_scale2, branch=block.mlp)}
            for block in exit.layer  # type: ignore[union-attr]
        )
        return (StageSpec(width=exit.config.hidden_size, blocks=blocks),)  # type: ignore[union-attr, arg-type]

    def site(self, exit: nn.Module, name: str, ancestors: Sequence[tuple[str, nn.Module]]) -> Site:
        """Describe the surroundings: one norm for all that leaves, which a backbone may have switched off."""
        path, host = ancestors[-1]
        norm, embeddings = child(path, "layernorm"), child(path, "embeddings")
        blocks = len(exit.layer)  # type: ignore[arg-type]
        if is_a(host, "Dinov2Backbone", "Dinov2WithRegistersBackbone"):
            blocks = deepest_output(host)
            if not host.config.apply_layernorm:  # type: ignore[union-attr]
                return Site(depth=(blocks,), frozen=(embeddings,), unused=(norm,))
        return Site(depth=(blocks,), frozen=(embeddings,), norms=(norm,))

    def splice(self, outputs: Any, run: Run) -> Any:
        """Add the lane to each hidden state up to the deepest feature map, and to the last where it got that far."""
        splice_hidden_states(outputs, run)
        if run.depth[0] == len(run.exit.layer):  # type: ignore[arg-type]
            outputs.last_hidden_state = add(outputs.last_hidden_state, run.lane.advance(run.depth[0]))
        return outputs
