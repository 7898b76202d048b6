"""BitFit: the biases. PEFT's BEFT trains those of value projections only and is another method."""

from __future__ import annotations

from torch import nn

from e3va_peft.exits import find_exits
from e3va_peft.methods.base import Method, freeze_backbone, read_modules


def bitfit(model: nn.Module) -> nn.Module:
    """Train all biases of the backbone, its tables of relative position bias among them.

    The paper's models have no such tables; the 0.20 M published for Swin-B count them.
    """
    freeze_backbone(model)
    for found in find_exits(model):
        for _, module in read_modules(model, found):
            for name, parameter in module.named_parameters(recurse=False):
                if "bias" in name:
                    parameter.requires_grad_(True)
    return model


SOURCE = "Ben Zaken et al., ACL 2022, arXiv 2106.10199"
BITFIT = Method("bitfit", "BitFit", "biases", bitfit, learning_rate=1e-3, source=SOURCE, published=0.20)
