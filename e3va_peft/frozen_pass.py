"""The record of one forward of a frozen backbone. Pure torch.

Who fills it and who reads it know nothing of each other: a *source* fills it (`recorder.Recorder`, while the backbone
runs), the *lane* reads it (`lane.Lane`), a *splice* of the family writes the lane into a copy of the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


class Grid(NamedTuple):
    """Places of the tokens of a stage in the image: `prefix` tokens, then height * width in rows."""

    prefix: int
    height: int
    width: int


class MergingCall(NamedTuple):
    """One call of frozen patch merging.

    Attributes:
        x: The stream that entered, (B, N, C) or (B, H, W, C).
        args: Its further arguments.
        kwargs: Likewise, by keyword.
        output: Its output, likewise; None where it was computed in another precision than the lane's.
    """

    x: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor | None


@dataclass
class FrozenPass:
    """Record of one forward of a frozen backbone. Tensors are detached and have their channels last.

    Attributes:
        taps: (stage, index of its adapter) -> what is kept of the tap (B, N, C), see `lane.Lane.keep`.
        mergings: Stage -> the patch merging behind it.
        grids: Stage -> how its tokens lie in the image.
        tail: Input of the modules behind the last block, (B, N, C).
        ends: Stage -> what entered the module at its end, (B, N, C) or (B, H, W, C).
        outputs: The outputs.
    """

    taps: dict[tuple[int, int], Sequence[Tensor]] = field(default_factory=dict)
    mergings: dict[int, MergingCall] = field(default_factory=dict)
    grids: dict[int, Grid] = field(default_factory=dict)
    tail: Tensor | None = None
    ends: dict[int, Tensor] = field(default_factory=dict)
    outputs: Any = None

    def check(self, stage: int, block: int, at_stage: int, at_block: int) -> None:
        """Refuse to look at a place that the lane, which only moves forward, has not reached or has left.

        Raises:
            RuntimeError: The patch merging between did not run, or the lane is past the place.
        """
        if stage > at_stage:
            raise RuntimeError(
                f"stage {at_stage}: its patch merging did not run. E3VA needs its forward: remove what skips or "
                "replaces it."
            )
        if stage < at_stage or block < max(at_block, 1):
            raise RuntimeError(
                f"the lane is behind block {at_block} of stage {at_stage} and moves forward only: that behind block "
                f"{block} of stage {stage} is gone. A splice asks for it in the order of stages and blocks; what is "
                "shown of a stage that the lane has left is kept where Backbone.shown says so."
            )

    def take(self, stage: int, first: int, last: int) -> list[Sequence[Tensor]]:
        """Return and forget what was kept of the taps `first` up to `last` (exclusive) of a stage.

        Raises:
            RuntimeError: One of them was not read.
        """
        indices = range(first, last)
        missing = [index for index in indices if (stage, index) not in self.taps]
        if missing:
            raise RuntimeError(
                f"stage {stage}: the taps {missing} were not read, so the backbone ran without some of its blocks. "
                "E3VA needs every block's forward to run: remove what skips or replaces blocks (layer pruning, graph "
                "capture, a patched forward)."
            )
        return [self.taps.pop((stage, index)) for index in indices]
