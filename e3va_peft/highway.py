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
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_peft import fused
from e3va_peft.frozen_pass import FrozenPass
from e3va_peft.storage import STORAGES, pack, unpack

Mode = Literal["sum", "reduce", "expand"]


def adapter(t: Tensor, u1: Tensor, v1: Tensor, b1: Tensor, u2: Tensor, v2: Tensor, b2: Tensor) -> Tensor:
    """(..., C) -> (..., C): one adapter. U1 is (C, r), V1 (r, k), b1 (k), U2 (k, r), V2 (r, C), b2 (C)."""
    return F.gelu(t @ u1 @ v1 + b1) @ u2 @ v2 + b2


def sum_of_adapters(factors: Sequence[Tensor], taps: Sequence[Sequence[Tensor]]) -> Tensor:
    """N x (..., C) -> (..., C): the sum of n adapters, `fused.sum_of_adapters` in plain PyTorch."""
    width, dtype = factors[0].shape[1], factors[0].dtype
    read = [unpack(tap, width, dtype) for tap in taps]
    return torch.stack([adapter(t, *(f[i] for f in factors)) for i, t in enumerate(read)]).sum(0)


def merge(
    modules: fused.Modules, run: fused.Run, x: Tensor, z: Tensor, grid: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """(B, N, C) -> (B, N', C'): the lane behind frozen patch merging, `fused.merge` in plain PyTorch."""
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

    def forward(self, taps: Sequence[Any], start: int = 0, mode: Mode = "sum") -> Tensor:
        """Run the adapters `start`, `start + 1`, ... on one tap each.

        Args:
            taps: One entry for each adapter.
            start: Index of the first adapter.
            mode: *sum*: n x (..., C) -> (..., C), the sum of the adapters, of what is kept of each tap
                (`storage.pack`). Where no gradient is wanted it can be had in two halves that hold less, and round
                nothing: *reduce*, (..., C) -> (..., r), one adapter up to its last factor, and *expand*,
                n x (..., r) -> (..., C), the rest of all of them.
        """
        factors = self.factors
        if len(taps) < len(self.u1):
            factors = tuple(factor[start : start + len(taps)] for factor in factors)
        if mode == "reduce":
            return fused.reduce(taps[0], [factor[0] for factor in factors[:4]])
        if mode == "expand":
            return fused.expand(taps, *factors[4:])
        return fused.sum_of_adapters(factors, taps)


class Highway(nn.Module):
    """All adapters of all stages of one backbone.

    Args:
        widths: Channels C of each stage.
        num_adapters: Adapters of each stage.
        r: Rank of both projections.
        bottleneck_ratio: k / C.
        init_weights: See `Stage`.
        tap_storage: How its taps are kept for backward, see `storage.pack`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_adapters: Sequence[int],
        r: int = 16,
        bottleneck_ratio: float = 0.5,
        init_weights: bool = True,
        tap_storage: str = "exact",
    ) -> None:
        super().__init__()
        self.tap_storage = tap_storage
        self.stages = nn.ModuleList(
            Stage(width, n, r, max(1, int(width * bottleneck_ratio)), init_weights)
            for width, n in zip(widths, num_adapters, strict=True)
        )

    @property
    def trainable(self) -> bool:
        """Whether any factor wants a gradient."""
        return any(factor.requires_grad for stage in self.stages for factor in stage.factors)  # type: ignore[union-attr]

    def forward(self, stage: int, taps: Sequence[Any], start: int = 0, mode: Mode = "sum") -> Tensor:
        """Run adapters of one stage, see `Stage.forward`."""
        return self.stages[stage](taps, start, mode)


class MergingSpec(NamedTuple):
    """Frozen patch merging: its modules, and what runs them (`backbones.Merging.run`)."""

    modules: fused.Modules
    run: fused.Run


class Lane:
    """The running tensor `z`, as a cursor over stages and blocks that only moves forward.

    It is kept in at least fp32, whatever the backbone's dtype is, and has its channels last.

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
        self,
        highways: Sequence[Highway],
        frozen: FrozenPass,
        depth: Sequence[int],
        taps_per_block: int = 1,
        mergings: Sequence[MergingSpec] = (),
        grad: bool = True,
        keep_stages: bool = True,
    ) -> None:
        self.highways = highways
        self.frozen = frozen
        self.depth = depth
        self.taps_per_block = taps_per_block
        self.mergings = mergings
        self.grad = grad
        self.keep_stages = keep_stages
        # Highways that are active together read the same taps: the one that wants most decides.
        self.storage = STORAGES[min([STORAGES.index(h.tap_storage) for h in highways] or [0])] if grad else "exact"
        self.stage = self.block = 0
        self.z: Tensor | None = None
        self.stages: dict[int, tuple[Tensor, Tensor]] = {}  # stage -> the lane behind its blocks, and behind merging

    def keep(self, stage: int, index: int, tap: Tensor) -> Sequence[Tensor]:
        """Return what the lane wants of a tap (..., C): packed, or at once reduced to (..., r) for each highway."""
        if self.grad:
            return pack(tap, self.storage)
        return [highway(stage, [tap], index, "reduce") for highway in self.highways]

    def behind(self, stage: int, block: int) -> Tensor:
        """Return the lane (..., C) behind the first `block` blocks of a stage."""
        if stage in self.stages:
            return self.stages[stage][0]
        if stage > self.stage:
            raise RuntimeError(
                f"stage {self.stage}: its patch merging did not run. E3VA needs its forward: remove what skips or "
                "replaces it."
            )
        if stage < self.stage or block < self.block or block == 0:
            raise RuntimeError(f"the lane is at block {self.block} of stage {self.stage}, not at {block} of {stage}")
        if block > self.block:
            first, last = self.block * self.taps_per_block, block * self.taps_per_block
            kept = self.frozen.take(stage, first, last)
            for which, highway in enumerate(self.highways):
                if self.grad:
                    step = highway(stage, kept, first)
                else:
                    step = highway(stage, [reduced[which] for reduced in kept], first, "expand")
                step = step.to(torch.promote_types(step.dtype, torch.float32))
                self.z = step if self.z is None else self.z.to(step.device) + step
            self.block = block
        assert self.z is not None
        return self.z

    def ahead(self, stage: int) -> Tensor:
        """Return the lane (..., C') behind the patch merging of a stage."""
        return self.stages[stage][1]

    def leave(self, stage: int) -> None:
        """Carry the lane through the frozen patch merging behind a stage, which has just run."""
        with torch.set_grad_enabled(self.grad):
            behind = self.behind(stage, self.depth[stage])
            x, args, kwargs, output = self.frozen.mergings.pop(stage)
            grid, lean = self.frozen.grids.get(stage), self.storage != "exact"
            self.z = fused.merge(*self.mergings[stage], x, behind.to(x.device), grid, args, kwargs, output, lean)
        self.stage, self.block = stage + 1, 0
        if self.keep_stages:
            self.stages[stage] = behind, self.z
