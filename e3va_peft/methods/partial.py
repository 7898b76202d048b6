"""Partial-1: the last block."""

from __future__ import annotations

from torch import nn

from e3va_peft.exits import find_exits
from e3va_peft.methods.base import Method, blocks, freeze_backbone
from e3va_peft.methods.full import FULL


def partial_1(model: nn.Module) -> nn.Module:
    """Train the last block of the backbone."""
    freeze_backbone(model)
    for found in find_exits(model):
        *_, (_, last, _) = blocks(found)
        last.requires_grad_(True)
    return model


SOURCE = "Yosinski et al., NeurIPS 2014, arXiv 1411.1792; the name is from Jia et al., ECCV 2022, arXiv 2203.12119"
PARTIAL_1 = Method("partial-1", "partial-1", "last block", partial_1, FULL.learning_rate, SOURCE, published=12.60)
