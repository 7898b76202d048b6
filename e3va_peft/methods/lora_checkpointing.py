"""LoRA with checkpointing: every block of the backbone runs again in backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from e3va_peft.errors import UserError
from e3va_peft.exits import find_exits
from e3va_peft.methods.lora import LORA, lora


def lora_checkpointing(model: nn.Module, **options: Any) -> nn.Module:
    """Train LoRA, and run every block of the backbone again in backward instead of keeping its activations.

    Checkpointing is reentrant: the meter can count the inputs that this form keeps. It wants an input that requires a
    gradient; PEFT's own hook for that crashes Swin, whose patch embeddings return a tuple, so the hook sits behind the
    embeddings' dropout. transformers checkpoints Swin's stages and the blocks in them: less is kept, and a block runs
    three times a step.

    Raises:
        UserError: A backbone of the model cannot be checkpointed.
    """
    model = lora(model, **options)
    for found in find_exits(model):
        if not hasattr(found.module, "gradient_checkpointing_enable"):
            raise UserError(
                f"{found.name}: {type(found.module).__name__} has no gradient_checkpointing_enable. Leave out the "
                "method that checkpoints."
            )
        found.module.gradient_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
    embeddings = [module for name, module in model.named_modules() if name.endswith("embeddings.dropout")]
    if not embeddings:
        raise UserError(
            f"model={type(model).__name__}: has no embeddings.dropout behind which gradients could begin, so a "
            "checkpointed backbone would train nothing. Leave out the method that checkpoints."
        )
    for module in embeddings:
        module.register_forward_hook(_want_gradient)
    return model


def _want_gradient(module: nn.Module, inputs: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()


SOURCE = f"{LORA.source}; Chen et al., 2016, arXiv 1604.06174"
LORA_CHECKPOINTING = replace(
    LORA, name="lora-checkpointing", title="LoRA + checkpointing", adapt=lora_checkpointing, source=SOURCE
)
