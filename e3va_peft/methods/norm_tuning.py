"""Norm tuning: the layer norms, by PEFT's LN tuning."""

from __future__ import annotations

import re
import warnings

from peft import LNTuningConfig, get_peft_model
from torch import nn

from e3va_peft.exits import find_exits
from e3va_peft.methods.base import Method, read_modules, trained_whole


def norm_tuning(model: nn.Module) -> nn.Module:
    """Train all layer norms of the backbone."""
    whole = trained_whole(model)
    norms = [
        name
        for found in find_exits(model)
        for name, module in read_modules(model, found)
        if isinstance(module, nn.LayerNorm) and name not in whole
    ]
    config = LNTuningConfig(target_modules="|".join(map(re.escape, norms)), modules_to_save=whole)
    with warnings.catch_warnings():  # PEFT asks of every layer whether it is linear, also where it tunes norms
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
        return get_peft_model(model, config)


SOURCE = "Zhao et al., ICLR 2024, arXiv 2312.11420"
NORM_TUNING = Method(
    "norm-tuning", "norm tuning", "layer norms", norm_tuning, 1e-3, SOURCE, saves="adapter", published=0.06
)
