"""The method: adapter -> stage -> highway, and the lane that runs on it. Pure torch: tensors in, tensors out.

Notation of the paper (arXiv 2306.09729): `C` width of a stage, `r` rank, `k` bottleneck, `N` tokens, `x` the frozen
residual stream, `z` the lane:

    adapter   A(t) = GELU(t U1 V1 + b1) U2 V2 + b2          dual low-rank
    lane      z_l  = z_{l-1} + A(attention_l) + A'(mlp_l)   or, with one tap per block, + A(attention_l + mlp_l)
    merging   z    = PM(x + z) - PM(x)                      PM: the backbone's own frozen patch merging

*Inferred*, because the paper gives neither code nor these details: k = C/2, the place of GELU, no LayerNorm inside the
adapter, the lane starting at zero, the initialisation.

`adapter`, `sum_of_adapters` and `merge` are these formulas in plain PyTorch. What runs is `fused`, which has the same
values and gradients and keeps less for backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_peft import fused
from e3va_peft.frozen_pass import FrozenPass
from e3va_peft.storage import STORAGES, pack, unpack


def adapter(t: Tensor, u1: Tensor, v1: Tensor, b1: Tensor, u2: Tensor, v2: Tensor, b2: Tensor) -> Tensor:
    """(..., C) -> (..., C): one adapter. U1 is (C, r), V1 (r, k), b1 (k), U2 (k, r), V2 (r, C), b2 (C)."""
    return F.gelu(t @ u1 @ v1 + b1) @ u2 @ v2 + b2


def sum_of_adapters(factors: Sequence[Tensor], taps: Sequence[Sequence[Tensor]]) -> Tensor:
    """N x (..., C) -> (..., C): the sum of n adapters, `fused.sum_of_adapters` in plain PyTorch."""
    read = [unpack(tap, factors[0].shape[1], factors[0].dtype) for tap in taps]
    return torch.stack([adapter(t, *(f[i] for f in factors)) for i, t in enumerate(read)]).sum(0)


def merge(merging: fused.Merging, x: Tensor, z: Tensor, grid: Any, *args: Any, **kwargs: Any) -> Tensor:
    """(B, N, C) -> (B, N', C'): the lane behind frozen patch merging, `fused.merge` in plain PyTorch."""
    modules, run, _ = merging
    return run(modules, x + z, grid, *args, **kwargs) - run(modules, x, grid, *args, **kwargs)


class Stage(nn.Module):
    """The adapters of one stage: one per tap, their factors stacked along the first dimension.

    Args:
        width: Channels C of the stage.
        num_adapters: Adapters n = blocks * taps per block, in the order in which the lane meets them.
        r: Rank of both projections.
        bottleneck: Width k between the projections.
        init_weights: Zero the last factor, so that the lane starts at exactly zero.
    """

    FACTORS = ("u1", "v1", "bias1", "u2", "v2", "bias2")  # bias1, bias2: the Trainer decays no weight named bias

    def __init__(self, width: int, num_adapters: int, r: int, bottleneck: int, init_weights: bool = True) -> None:
        super().__init__()
        self.u1 = nn.Parameter(torch.empty(num_adapters, width, r))
        self.v1 = nn.Parameter(torch.empty(num_adapters, r, bottleneck))
        self.bias1 = nn.Parameter(torch.empty(num_adapters, bottleneck))
        self.u2 = nn.Parameter(torch.empty(num_adapters, bottleneck, r))
        self.v2 = nn.Parameter(torch.empty(num_adapters, r, width))
        self.bias2 = nn.Parameter(torch.empty(num_adapters, width))
        self.init_weights = init_weights
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw U1, V1, U2 Kaiming-uniform over their inputs and zero the rest (*inferred*)."""
        for factor in (self.u1, self.v1, self.u2):
            bound = (6 / factor.shape[1]) ** 0.5
            nn.init.uniform_(factor, -bound, bound)
        nn.init.zeros_(self.bias1)
        for factor in (self.v2, self.bias2):
            nn.init.zeros_(factor) if self.init_weights else nn.init.normal_(factor, std=0.1)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """U1, V1, b1, U2, V2, b2 (by attribute, because a replica's tensors are no parameters)."""
        return tuple(getattr(self, name) for name in self.FACTORS)

    def forward(self, taps: Sequence[Any], start: int = 0, mode: Literal["sum", "reduce", "expand"] = "sum") -> Tensor:
        """Run the adapters `start`, `start + 1`, ... on one tap each.

        Args:
            taps: One entry for each adapter.
            start: Index of the first adapter.
            mode: *sum*: n x (..., C) -> (..., C), of what is kept of each tap (`storage.pack`). Where no gradient is
                wanted it can be had in two halves that hold less, and round nothing: *reduce*, (..., C) -> (..., r),
                one adapter up to its last factor, and *expand*, n x (..., r) -> (..., C), the rest of all of them.
        """
        factors = self.factors
        if len(taps) < len(self.u1):
            factors = tuple(factor[start : start + len(taps)] for factor in factors)
        if mode == "reduce":
            return fused.reduce(taps[0].to(self.u1.device), [factor[0] for factor in factors[:4]])
        if mode == "expand":
            return fused.expand(taps, *factors[4:])
        # a device map may have split the stage
        return fused.sum_of_adapters(factors, [[part.to(self.u1.device) for part in tap] for tap in taps])


class Highway(nn.Module):
    """All adapters of all stages of one backbone.

    Args:
        widths: Channels C of each stage.
        num_adapters: Adapters of each stage.
        r: Rank of both projections.
        ratio: k / C.
        init_weights: See `Stage`.
        tap_storage: How its taps are kept for backward, see `storage.pack`.
    """

    def __init__(
        self, widths: Sequence[int], num_adapters: Sequence[int], r: int = 16, ratio: float = 0.5,
        init_weights: bool = True, tap_storage: str = "exact",
    ) -> None:  # fmt: skip
        super().__init__()
        self.tap_storage = tap_storage
        sizes = zip(widths, num_adapters, strict=True)
        self.stages = nn.ModuleList(Stage(c, n, r, max(1, int(c * ratio)), init_weights) for c, n in sizes)

    @property
    def trainable(self) -> bool:
        """Whether any factor wants a gradient."""
        return any(factor.requires_grad for stage in self.stages for factor in stage.factors)  # type: ignore[union-attr]

    def forward(self, stage: int, *args: Any) -> Tensor:
        """Run adapters of one stage, see `Stage.forward`."""
        return self.stages[stage](*args)


class Lane:
    """The running tensor `z` (B, N, C), in at least fp32: a cursor over stages and blocks that only moves forward.

    Args:
        highways: The active highways; their adapters add up.
        frozen: The record it reads, and releases as it goes.
        depth: Blocks to adapt in each stage.
        taps_per_block: Adapters of a block.
        mergings: The frozen patch merging behind each stage but the last.
        grad: Whether a gradient is wanted.
        keep_stages: Remember the lane behind every stage, where outputs show it.
    """

    def __init__(
        self, highways: Sequence[Highway], frozen: FrozenPass, depth: Sequence[int], taps_per_block: int = 1,
        mergings: Sequence[fused.Merging] = (), grad: bool = True, keep_stages: bool = True,
    ) -> None:  # fmt: skip
        self.highways, self.frozen, self.depth, self.taps_per_block = highways, frozen, depth, taps_per_block
        self.mergings, self.grad, self.keep_stages = mergings, grad, keep_stages
        # Highways that are active together read the same taps: the one that wants most decides.
        self.storage = STORAGES[min([STORAGES.index(h.tap_storage) for h in highways] or [0])] if grad else "exact"
        self.stage = self.block = 0
        self.z: Tensor | None = None
        self.stages: dict[int, tuple[Tensor, Tensor]] = {}  # stage -> the lane behind its blocks, and behind merging

    def keep(self, stage: int, index: int, tap: Tensor) -> Sequence[Tensor]:
        """Return what the lane wants of a tap (B, N, C): packed, or at once reduced to (B, N, r) for each highway."""
        if self.grad:
            return pack(tap, self.storage)
        return [highway(stage, [tap], index, "reduce") for highway in self.highways]

    def behind(self, stage: int, block: int) -> Tensor:
        """Return the lane (B, N, C) behind the first `block` blocks of a stage."""
        if stage in self.stages and block == self.depth[stage]:
            return self.stages[stage][0]
        self.frozen.check(stage, block, self.stage, self.block)
        first, last = self.block * self.taps_per_block, block * self.taps_per_block
        kept = self.frozen.take(stage, first, last)
        for i, highway in enumerate(self.highways if kept else ()):
            step = highway(stage, *((kept, first) if self.grad else ([tap[i] for tap in kept], first, "expand")))
            step = step.to(torch.promote_types(step.dtype, torch.float32))
            self.z = step if self.z is None else self.z.to(step.device) + step
        self.block = block
        return self.z  # type: ignore[return-value]  # block >= 1: checked

    def ahead(self, stage: int) -> Tensor:
        """Return the lane (B, N', C') behind the patch merging of a stage."""
        self.frozen.check(stage + 1, 1, self.stage, 0) if stage not in self.stages else None
        return self.stages[stage][1]

    def leave(self, stage: int) -> None:
        """Carry the lane through the frozen patch merging behind a stage, which has just run."""
        with torch.set_grad_enabled(self.grad):
            behind, call = self.behind(stage, self.depth[stage]), self.frozen.mergings.pop(stage)
            z = behind.to(call.x.device).reshape(call.x.shape)  # of a map, where the stream is one
            z = fused.merge(self.mergings[stage], call, z, self.frozen.grids.get(stage), self.storage != "exact")
            self.z = z.flatten(1, -2) if z.dim() > 3 else z
        if self.keep_stages:
            self.stages[stage] = behind, self.z
        self.stage, self.block = stage + 1, 0
