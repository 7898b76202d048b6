"""The lane: the sum that the highway's adapters add to, stage after stage, up to the first live block. Pure torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from e3va_peft import fused
from e3va_peft.backbones.splices import add
from e3va_peft.frozen_pass import FrozenPass
from e3va_peft.highway import Highway
from e3va_peft.recompute import Recompute
from e3va_peft.storage import TAP_STORAGES, keep


def most_exact(highways: Sequence[Highway]) -> str:
    """Return the storage of taps for highways that are active together."""
    return TAP_STORAGES[min([TAP_STORAGES.index(highway.tap_storage) for highway in highways] or [0])]


class Lane:
    """The running tensor `z` (B, N, C), in at least fp32: a cursor over stages and blocks that only moves forward.

    Args:
        highways: The active highways; their adapters add up. They read taps in the same way.
        frozen: The record it reads, and releases as it goes.
        depth: Blocks to adapt in each stage.
        taps_per_block: Adapters of a block.
        mergings: The frozen patch merging behind each stage but the last.
        grad: Whether a gradient is wanted.
        keep_stages: Remember the lane behind every stage, where outputs show it.
        live: (stage, block) of the first live block: there the lane is written into the stream, and ends.
        shows_sums: Outputs show the lane by `onto` alone.
    """

    def __init__(
        self, highways: Sequence[Highway], frozen: FrozenPass, depth: Sequence[int], taps_per_block: int = 1,
        mergings: Sequence[fused.Merging] = (), grad: bool = True, keep_stages: bool = True,
        live: tuple[int, int] | None = None, shows_sums: bool = False,
    ) -> None:  # fmt: skip
        self.highways, self.frozen, self.depth, self.taps_per_block = highways, frozen, depth, taps_per_block
        self.mergings, self.grad, self.keep_stages, self.shows_sums = mergings, grad, keep_stages, shows_sums
        self.live = (len(depth), 0) if live is None else live
        # Highways that are active together read the same taps: kept as the most exact one wants; others round.
        self.storage = most_exact(highways) if grad else "exact"
        self.norm = highways[0].tap_norm if highways else "none"
        self.replays = False  # the record is a cache's, which holds what is kept of each tap
        self.recompute: tuple[Recompute, Tensor] | None = None  # what computes gradients in backward, and its handle
        self.stage = self.block = 0
        self.z: Tensor | None = None
        self.passed: dict[tuple[int, int], Tensor] = {}  # (stage, block) -> the lane in front of that block
        # Likewise, in place of the lane: the stream there with the lane written into it, and whether it was shown.
        self.written: dict[tuple[int, int], tuple[Tensor, bool]] = {}
        self.shapes: dict[int, tuple[Tensor, torch.Size]] = {}  # live stage -> its zero, and the shape of its stream

    @property
    def keeps_taps(self) -> bool:
        """Whether what the record holds of a tap is what backward reads."""
        return self.replays or (self.grad and self.storage != "recompute")

    def keep(self, stage: int, index: int, tap: Tensor) -> Sequence[Tensor]:
        """The part of a tap (B, N, C) that is kept: packed, or (B, N, r or r + 1), reduced at once by each highway."""
        if self.keeps_taps:
            return keep(tap, self.storage, self.norm)
        with torch.no_grad():
            return [highway(stage, [tap], index, "reduce") for highway in self.highways]

    def behind(self, stage: int, block: int) -> Tensor:
        """Return the lane (B, N, C) behind the first `block` blocks of a stage: zero behind a live one."""
        if (stage, block) > self.live:
            zero, shape = self.shapes[stage]
            return zero.expand(shape)
        if (stage, block) in self.passed:
            return self.passed[stage, block]
        self.frozen.check(stage, block, self.stage, self.block)
        first, last = self.block * self.taps_per_block, block * self.taps_per_block
        if kept := self.frozen.take(stage, first, last):
            step = self._step(stage, first, kept)
            self.z = step if self.z is None else self.z.to(step.device) + step
        self.block = block
        return self.z  # type: ignore[return-value]  # block >= 1: checked

    def _step(self, stage: int, first: int, kept: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the sum of all adapters of consecutive taps (B, N, C), in at least fp32."""
        total: Tensor | None = None
        with torch.set_grad_enabled(self.grad and self.keeps_taps):
            for i, highway in enumerate(self.highways):
                step = highway(stage, kept, first) if self.keeps_taps else highway(
                    stage, [tap[i] for tap in kept], first, "expand"
                )  # fmt: skip
                step = step.to(torch.promote_types(step.dtype, torch.float32))
                total = step if total is None else total.to(step.device) + step
        assert total is not None
        if self.recompute is None:
            return total
        recompute, handle = self.recompute
        return recompute.attach(total, handle, stage, first, first + len(kept))

    def ahead(self, stage: int) -> Tensor:
        """Return the lane (B, N', C') behind the patch merging of a stage."""
        if stage >= self.live[0]:
            return self.behind(stage + 1, 1)
        self.frozen.check(stage + 1, 1, self.stage, 0) if (stage + 1, 0) not in self.passed else None
        return self.passed[stage + 1, 0]

    def onto(self, x: Tensor, stage: int, block: int) -> Tensor:
        """Return x, the stream in front of a block (B, N, C), with the lane written into it, in x's dtype.

        Where merging has made that sum it is not made again. Merging must not need it in backward: heads may change
        in place what they are given.
        """
        if (stage, block) in self.written:
            found, shown = self.written[stage, block]
            self.written[stage, block] = found, True
            return (found.clone() if shown else found).to(x)  # no two outputs share memory
        z = self.behind(stage, block) if block else self.ahead(stage - 1)
        return add(x, z)

    def leave(self, stage: int) -> None:
        """Carry the lane through the frozen patch merging behind a stage, which has just run."""
        with torch.set_grad_enabled(self.grad):
            behind, call = self.behind(stage, self.depth[stage]), self.frozen.mergings.pop(stage)
            z = behind.to(call.x.device).reshape(call.x.shape)  # of a map, where the stream is one
            grid, lean = self.frozen.grids.get(stage), self.storage != "exact"
            z, entered, left = fused.merge(self.mergings[stage], call, z, grid, lean)
            self.z = z.flatten(1, -2) if z.dim() > 3 else z
        if self.keep_stages:
            shown = {(stage, self.depth[stage]): (behind, entered), (stage + 1, 0): (self.z, left)}
            for place, (lane, written) in shown.items():
                # a cache may hold outputs otherwise than what entered merging
                if written is None or self.replays or not self.shows_sums:
                    self.passed[place] = lane
                else:
                    self.written[place] = written, False
        self.stage, self.block = stage + 1, 0

    def enter(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C): what enters the first live block, with the lane written into it."""
        stage, block = self.live
        with torch.set_grad_enabled(self.grad):
            for shown in range(1, block + 1 if self.keep_stages and len(self.depth) == 1 else 1):
                self.passed[stage, shown] = self.behind(stage, shown)  # outputs of one stage show each block
            z = self.behind(stage, block) if block else self.z
            if z is not None and self.keep_stages and block:
                self.passed[stage, block] = z
            return x if z is None else add(x, z.reshape(x.shape))

    def end(self) -> None:
        """Forget what was read: backward, which may ask live blocks for their answers again, must not hold it."""
        self.frozen, self.z, self.recompute = FrozenPass(), None, None
        self.passed.clear()
        self.written.clear()

    def answer(self, stage: int, index: int, tap: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C): what the adapters add to the stream where they read it, in a live block."""
        self.shapes[stage] = tap.new_zeros(()), tap.shape
        answers = [highway(stage, [tap], index, "answer") for highway in self.highways]
        return torch.stack(answers).sum(0) if len(answers) > 1 else answers[0]
