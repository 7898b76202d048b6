"""The head alone, and the backbone's output norms."""

from __future__ import annotations

from typing import Any

from torch import nn

from e3va_peft.exits import find_exits
from e3va_peft.methods.base import Method, freeze_backbone


def head_only(model: nn.Module) -> nn.Module:
    """Freeze the backbone but its output norms. It runs in eval mode, as under E3VA: no dropout, no drop-path."""
    freeze_backbone(model)
    for found in find_exits(model):
        for name in found.parts:
            model.get_submodule(name).register_forward_pre_hook(_stay_in_eval_mode)
    return model


def _stay_in_eval_mode(module: nn.Module, inputs: Any) -> None:
    if module.training:
        module.eval()


HEAD_ONLY = Method("head-only", "head only", "nothing", head_only, learning_rate=2e-3, cacheable=True)
