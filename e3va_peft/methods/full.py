"""Full fine-tuning: everything is trained."""

from __future__ import annotations

from torch import nn

from e3va_peft.methods.base import Method


def full(model: nn.Module) -> nn.Module:
    """Train everything."""
    return model.requires_grad_(True)


FULL = Method("full", "full", "everything", full, learning_rate=1e-4)
