"""AdaptFormer: a bottleneck beside the MLP."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from e3va_peft.errors import UserError
from e3va_peft.exits import find_exits
from e3va_peft.methods.base import INSERTED, Bottleneck, Method, blocks, freeze_backbone


def adaptformer(model: nn.Module) -> nn.Module:
    """Put a bottleneck of ReLU beside the MLP: `MLP(x) + 0.1 A(x)`, x being the normed input of the MLP.

    Equations 2 and 3, s = 0.1, width 64, zero at the start. Where the backbone scales its branches (LayerScale), the
    sum is scaled (inferred: the paper's backbones do not). The 3.11 M published for Swin-B are two adapters a block,
    behind attention and MLP; the paper and its authors' code have one, beside the MLP.

    Raises:
        UserError: No one module of a block is the MLP.
    """
    freeze_backbone(model)
    for found in find_exits(model):
        for width, _, points in blocks(found):
            beside = points["mlp"].branch if "mlp" in points else None
            if beside is None:
                raise UserError(
                    f"method=adaptformer: no one module of a {found.family.name} block is an MLP to run beside. Leave "
                    "the method out."
                )
            beside.add_module(INSERTED, Bottleneck(width, F.relu, scale=0.1))
            beside.register_forward_hook(_beside)
    return model


def _beside(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + module.get_submodule(INSERTED)(args[0])


SOURCE = "Chen et al., NeurIPS 2022, arXiv 2205.13535"
ADAPTFORMER = Method(
    "adaptformer", "AdaptFormer", "bottlenecks", adaptformer, 1e-3, SOURCE, saves="inserted", published=3.11
)
