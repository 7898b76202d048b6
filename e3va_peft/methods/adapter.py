"""The adapter: bottlenecks behind attention and MLP."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.nn import functional as F

from e3va_peft.methods.base import Bottleneck, Method, behind_branches


def adapter(model: nn.Module) -> nn.Module:
    """Put a bottleneck of GELU behind attention and another behind the MLP, each with a residual: `t + A(t)`.

    Section 2.1; GELU and width 64 as in V-PETL Bench. Zero at the start, where the paper is near zero.
    """
    return behind_branches(model, partial(Bottleneck, activation=F.gelu))


SOURCE = "Houlsby et al., ICML 2019, arXiv 1902.00751"
ADAPTER = Method("adapter", "adapter", "bottlenecks", adapter, 1e-3, SOURCE, saves="inserted", published=3.11)
