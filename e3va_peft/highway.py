"""The method: adapter -> stage -> highway; `lane` runs on it. Pure torch: tensors in, tensors out.

Notation of the paper (arXiv 2306.09729): `C` width of a stage, `r` rank, `k` bottleneck, `N` tokens, `x` the frozen
residual stream, `z` the lane, `n(t)` a tap normalised over its channels:

    adapter   A(t) = s (GELU(n(t) U1 V1 + b1) U2 V2 + b2)   dual low-rank
    lane      z_l  = z_{l-1} + A(attention_l) + A'(mlp_l)   or, with one tap per block, + A(attention_l + mlp_l)
              z_l  = z_{l-1} + A(x_{l-1})                       with a tap of the stream, alone or beside the others
    merging   z    = PM(x + z) - PM(x)                      PM: the backbone's own frozen patch merging
    live      x_l  = x_{l-1} + attention_l + A(attention_l) + ...   where gradient passes the block, from x + z on

*The paper's*: the dual low-rank adapter, the sum, patch merging. *Inferred*, because the paper gives neither code nor
these details: k = C/2, the place of GELU, the norm n, the lane starting at zero, the initialisation. *Ours*: the scale
s of an answer, taps of the stream, live blocks. `benchmarks/results/choices.json` compares norms, scales of an answer
and a factor on the sum (1, 1/sqrt(n), 1/n, learnt; 1 here) on two tasks: without live blocks all are within noise of
each other; with them a plain ViT needs s. One of its scales, a constant for each adapter (`calibrated`), won nothing
and is not in the package.

`adapter`, `answer`, `sum_of_adapters` and `merge` are these formulas in plain PyTorch. What runs is `fused`, which has
the same values and gradients and keeps less for backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_peft import fused
from e3va_peft.storage import coarser, deviation_of, normalized, read


def adapter(t: Tensor, u1: Tensor, v1: Tensor, b1: Tensor, u2: Tensor, v2: Tensor, b2: Tensor) -> Tensor:
    """(..., C) -> (..., C): one adapter. U1 is (C, r), V1 (r, k), b1 (k), U2 (k, r), V2 (r, C), b2 (C)."""
    return F.gelu(t @ u1 @ v1 + b1) @ u2 @ v2 + b2


def answer(t: Tensor, factors: Sequence[Tensor], norm: str = "none") -> Tensor:
    """(..., C) -> (..., C): what one adapter says to a tap, `fused.answer` in plain PyTorch."""
    own = adapter(t if norm == "none" else normalized(t), *factors)
    return own * deviation_of(t) if norm == "relative" else own


def sum_of_adapters(factors: Sequence[Tensor], taps: Sequence[Sequence[Tensor]], norm: str = "none") -> Tensor:
    """N x (..., C) -> (..., C): the sum of n adapters, `fused.sum_of_adapters` in plain PyTorch."""
    total: Any = 0
    for i, tap in enumerate(taps):
        t, s = read(tap, factors[0].shape[1], factors[0].dtype, norm)
        total = total + adapter(t, *(f[i] for f in factors)) * (1 if s is None else s)
    return total


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
        norm: How taps are read (`E3VAConfig.tap_norm`).
        storage: How they are rounded for it (`E3VAConfig.tap_storage`).
    """

    FACTORS = ("u1", "v1", "bias1", "u2", "v2", "bias2")  # bias1, bias2: the Trainer decays no weight named bias

    def __init__(
        self, width: int, num_adapters: int, r: int, bottleneck: int, init_weights: bool = True, norm: str = "none",
        storage: str = "exact",
    ) -> None:  # fmt: skip
        super().__init__()
        self.u1 = nn.Parameter(torch.empty(num_adapters, width, r))
        self.v1 = nn.Parameter(torch.empty(num_adapters, r, bottleneck))
        self.bias1 = nn.Parameter(torch.empty(num_adapters, bottleneck))
        self.u2 = nn.Parameter(torch.empty(num_adapters, bottleneck, r))
        self.v2 = nn.Parameter(torch.empty(num_adapters, r, width))
        self.bias2 = nn.Parameter(torch.empty(num_adapters, width))
        self.init_weights, self.norm, self.storage = init_weights, norm, storage
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
        """U1, V1, b1, U2, V2, b2 (by attribute, because a replica's tensors are not parameters)."""
        return tuple(getattr(self, name) for name in self.FACTORS)

    def forward(
        self, taps: Sequence[Any], start: int = 0, mode: Literal["sum", "reduce", "expand", "answer"] = "sum"
    ) -> Tensor:
        """Run the adapters `start`, `start + 1`, ... on one tap each.

        Args:
            taps: One entry for each adapter.
            start: Index of the first adapter.
            mode: *sum*: n x (..., C) -> (..., C), of what is kept of each tap (`storage.keep`); taps get no gradient.
                Where none is wanted it can be had in two halves that hold less: *reduce*,
                (..., C) -> (..., r or r + 1), one adapter up to its last factor, and *expand*, n x of these ->
                (..., C), the rest of all of them. *answer*: (..., C) -> (..., C), one adapter in a live block.
        """
        factors = self.factors
        if len(taps) < len(self.u1):
            factors = tuple(factor[start : start + len(taps)] for factor in factors)
        if mode == "expand":
            return fused.expand(taps, *factors[4:])
        device = self.u1.device  # a device map may have split the stage
        if mode == "sum":
            width = self.u1.shape[1]
            taps = [coarser([part.to(device) for part in tap], self.storage, width, self.norm) for tap in taps]
            return fused.sum_of_adapters(factors, taps, self.norm)
        tap, own = taps[0].to(device), [factor[0] for factor in factors]
        if mode == "answer":
            return fused.answer(tap.to(torch.promote_types(tap.dtype, own[0].dtype)), own, self.norm)
        return fused.reduce(tap, own[:4], self.norm, self.storage)


class Highway(nn.Module):
    """All adapters of all stages of one backbone.

    Args:
        widths: Channels C of each stage.
        num_adapters: Adapters of each stage.
        r: Rank of both projections.
        ratio: k / C.
        init_weights: See `Stage`.
        tap_storage: How its taps are read, and kept for backward (`E3VAConfig.tap_storage`).
        tap_norm: How they are read (`E3VAConfig.tap_norm`).
    """

    def __init__(
        self, widths: Sequence[int], num_adapters: Sequence[int], r: int = 16, ratio: float = 0.5,
        init_weights: bool = True, tap_storage: str = "exact", tap_norm: str = "none",
    ) -> None:  # fmt: skip
        super().__init__()
        self.tap_storage, self.tap_norm = tap_storage, tap_norm
        sizes = zip(widths, num_adapters, strict=True)
        self.stages = nn.ModuleList(
            Stage(c, n, r, max(1, int(c * ratio)), init_weights, tap_norm, tap_storage) for c, n in sizes
        )

    @property
    def trainable(self) -> bool:
        """Whether any factor wants a gradient."""
        return any(factor.requires_grad for stage in self.stages for factor in stage.factors)  # type: ignore[union-attr]

    def forward(self, stage: int, *args: Any) -> Tensor:
        """Run adapters of one stage, see `Stage.forward`."""
        return self.stages[stage](*args)
