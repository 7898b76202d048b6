"""Plain vision transformers whose model class runs the loop over blocks itself: ViT and DeiT."""

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
    in_own_dtype,
    splice_hidden_states,
)


class ViT(Backbone):
    """`ViTModel` and `DeiTModel` inside their heads: one stage, the output norm and the pooler inside the exit."""

    name = "vit"
    exit_classes = ("ViTModel", "DeiTModel")
    tail = ("layernorm", "pooler")

    def stages(self, exit: nn.Module) -> tuple[StageSpec, ...]:
        """Describe the one stage: `layers[j]`."""
        blocks = tuple(
            {"attention": TapPoint(block.attention), "mlp": TapPoint(block.mlp)}
            for block in exit.layers  # type: ignore[union-attr]
        )
        return (StageSpec(width=exit.config.hidden_size, blocks=blocks),)  # type: ignore[union-attr, arg-type]

    def site(self, exit: nn.Module, name: str, ancestors: Sequence[tuple[str, nn.Module]]) -> Site:
        """Describe the surroundings: everything frozen and the output norm are inside the exit."""
        return Site(depth=(len(exit.layers),), norms=(child(name, "layernorm"),))  # type: ignore[arg-type]

    def splice(self, outputs: Any, run: Run) -> Any:
        """Add the lane to each hidden state, then run the output norm and the pooler again."""
        splice_hidden_states(outputs, run)
        hidden = add(run.tail_input, run.lane.advance(run.depth[0]))
        outputs.last_hidden_state = in_own_dtype(run.tail["layernorm"], hidden)
        if "pooler" in run.tail:
            outputs.pooler_output = in_own_dtype(run.tail["pooler"], outputs.last_hidden_state)
        return outputs
