"""E3VA: a highway beside the backbone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft import get_peft_model
from torch import nn

from e3va_peft.config import E3VAConfig
from e3va_peft.methods.base import Method


def e3va(model: nn.Module, **options: Any) -> nn.Module:
    """Train a highway beside the backbone; options are for `E3VAConfig`."""
    return get_peft_model(model, E3VAConfig(**options))


def e3va_plus(model: nn.Module, **options: Any) -> nn.Module:
    """Train a highway as `E3VAConfig.plus` has it."""
    return get_peft_model(model, E3VAConfig.plus(**options))


SOURCE = "Yin et al., ACM MM 2024, arXiv 2306.09729"
SETTINGS: dict[str, dict[str, Any]] = {
    "E3VA, block taps": {"taps": ("block",)},
    "E3VA, block taps, int8": {"taps": ("block",), "tap_storage": "int8"},
    "E3VA, recompute": {"tap_storage": "recompute"},
}
E3VA = Method(
    "e3va", "E3VA", "highway", e3va, 2e-3, SOURCE, E3VAConfig, "adapter", True, published=1.20, settings=SETTINGS
)
E3VA_PLUS = replace(
    E3VA, name="e3va-plus", title="E3VA+", adapt=e3va_plus, source="this package", published=None, settings={}
)
