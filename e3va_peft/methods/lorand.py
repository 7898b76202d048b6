"""LoRand: adapters whose projections are products of small factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_peft.methods.base import Method, behind_branches


class LoRand(nn.Module):
    """A bottleneck whose projections are synthesised: `gelu(x W1 + b1) W2 + b2`, (B, N, C) -> (B, N, C).

    W1 = sum over branches of P1 K Q1, (C, r) (r, r) (r, C/2); W2 = sum of P2 K Q2, (C/2, r) (r, r) (r, C). Both share
    the kernel K of each branch. All factors start uniform.

    Args:
        width: Channels C.
        branches: The paper's α.
        rank: The paper's β, r above.
    """

    def __init__(self, width: int, branches: int = 2, rank: int = 8) -> None:
        super().__init__()
        inner = width // 2
        self.kernel = nn.Parameter(torch.empty(branches, rank, rank))
        self.p1 = nn.Parameter(torch.empty(branches, width, rank))
        self.q1 = nn.Parameter(torch.empty(branches, rank, inner))
        self.p2 = nn.Parameter(torch.empty(branches, inner, rank))
        self.q2 = nn.Parameter(torch.empty(branches, rank, width))
        self.down_bias = nn.Parameter(torch.empty(inner))
        self.up_bias = nn.Parameter(torch.empty(width))
        for factor in (self.kernel, self.p1, self.q1, self.p2, self.q2):
            bound = factor.shape[-1] ** -0.5
            nn.init.uniform_(factor, -bound, bound)
        nn.init.uniform_(self.down_bias, -(width**-0.5), width**-0.5)
        nn.init.uniform_(self.up_bias, -(inner**-0.5), inner**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        down = (self.p1 @ self.kernel @ self.q1).sum(0)  # (C, C/2)
        up = (self.p2 @ self.kernel @ self.q2).sum(0)  # (C/2, C)
        return F.gelu(x @ down + self.down_bias) @ up + self.up_bias


def lorand(model: nn.Module) -> nn.Module:
    """Put a LoRand adapter behind attention and another behind the MLP, each with a residual: `t + A(t)`.

    Two branches of rank 8. The width C / 2 is inferred from the published count. Placed and initialised as in the
    authors' code, which does *not* start at zero: the adapted model begins near the pretrained one, not at it.
    """
    return behind_branches(model, LoRand)


SOURCE = "Yin et al., CVPR 2023, 1% VS 100%: Parameter-Efficient Low Rank Adapter for Dense Predictions"
LORAND = Method("lorand", "LoRand", "low-rank adapters", lorand, 1e-3, SOURCE, saves="inserted", published=1.20)
