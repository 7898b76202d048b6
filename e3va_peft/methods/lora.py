"""LoRA, by PEFT, on queries and values."""

from __future__ import annotations

import re
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from e3va_peft.exits import find_exits
from e3va_peft.methods.base import Method, trained_whole

QUERIES_AND_VALUES = ("query", "value", "q_proj", "v_proj")


def lora(model: nn.Module, **options: Any) -> nn.Module:
    """Train LoRA as usual for vision transformers, rank 8 on queries and values; options, for `LoraConfig`, win."""
    exits = "|".join(re.escape(part) for found in find_exits(model) for part in found.parts)
    queries = f"({exits})\\..*\\.({'|'.join(QUERIES_AND_VALUES)})"
    defaults: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": queries,
        "modules_to_save": trained_whole(model),
    }
    return get_peft_model(model, LoraConfig(**(defaults | options)))


SOURCE = "Hu et al., ICLR 2022, arXiv 2106.09685"
LORA = Method("lora", "LoRA", "low-rank", lora, 1e-3, SOURCE, LoraConfig, saves="adapter", published=3.03)  # rank 64
