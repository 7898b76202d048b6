"""The ways to fine-tune that `e3va train` offers: one word each, the same head and norms trained by all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from e3va_peft.config import E3VAConfig
from e3va_peft.errors import UserError
from e3va_peft.exits import everything_outside, find_exits

LEARNING_RATES = {"e3va": 2e-3, "head-only": 2e-3, "lora": 1e-3, "full": 1e-4}
QUERIES_AND_VALUES = ("query", "value", "q_proj", "v_proj")


def adapt(model: nn.Module, method: Mapping[str, Any]) -> nn.Module:
    """Make a model trainable by a method; what is not trained is frozen.

    *e3va*: the highway. *lora*: PEFT's, on queries and values of the backbone. *head-only*: nothing in the backbone
    but its output norms. All three train everything outside the backbone, and its output norms, whole. *full*:
    everything.

    Args:
        model: Base model with its head.
        method: `name`, and options for the method's PEFT config.

    Raises:
        UserError: The method cannot adapt this model, or an option cannot work.
    """
    options = {key: value for key, value in method.items() if key != "name"}
    name = method["name"]
    try:
        if name == "e3va":
            return get_peft_model(model, E3VAConfig(**options))
        if name == "lora":
            return get_peft_model(model, lora_config(model, **options))
    except (TypeError, ValueError) as error:
        raise UserError(f"method={name}: {error}") from error
    return head_only(model) if name == "head-only" else model.requires_grad_(True)


def refuse_lost(adapted: nn.Module, new: Sequence[str]) -> None:
    """Refuse to train beside parameters that start at random and that nothing would keep.

    A whole model is saved with all it has; of an adapter's base only what it trains.

    Args:
        adapted: What `adapt` returned.
        new: Names of the parameters of its base that no checkpoint gave their values.

    Raises:
        UserError: Some of them are neither trained nor saved.
    """
    if not isinstance(adapted, PeftModel):
        return
    base, config = adapted.get_base_model(), adapted.peft_config["default"]
    saved = {name for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    saved |= set(config.modules_to_save or ()) if isinstance(config, E3VAConfig) else set()  # also in the exits
    unused = {name for found in find_exits(base) for name in found.site.unused}
    kept = tuple(f"{name}." for name in saved | unused)
    lost = [name for name in new if not name.startswith(kept)]
    if lost:
        raise UserError(
            f"method.modules_to_save: leaves out {lost[:3]}{' and more' if len(lost) > 3 else ''}, which start at "
            "random, because the model has no weights for them or for other classes; they would be neither trained "
            "nor saved. Name their modules, or leave modules_to_save out to train everything outside the backbone."
        )


def lora_config(model: nn.Module, **options: Any) -> LoraConfig:
    """Configure LoRA as it is usual for vision transformers: rank 8 on queries and values, head trained whole.

    Args:
        model: Base model.
        options: For `LoraConfig`; they win.
    """
    exits = "|".join(re.escape(part) for found in find_exits(model) for part in found.parts)
    queries = f"({exits})\\..*\\.({'|'.join(QUERIES_AND_VALUES)})"
    defaults: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": queries,
        "modules_to_save": trained_whole(model),
    }
    return LoraConfig(**(defaults | options))


def head_only(model: nn.Module) -> nn.Module:
    """Freeze the backbone but its output norms. It runs in eval mode, as under E3VA: no dropout, no drop-path."""
    freeze_backbone(model)
    for found in find_exits(model):
        for name in found.parts:
            model.get_submodule(name).register_forward_pre_hook(_stay_in_eval_mode)
    return model


def freeze_backbone(model: nn.Module) -> None:
    """Leave trainable what every method trains whole, and nothing else."""
    whole = trained_whole(model)
    model.requires_grad_(False)
    for name in whole:
        model.get_submodule(name).requires_grad_(True)


def checkpointed(model: nn.Module) -> nn.Module:
    """Switch on checkpointing of every block, in the reentrant form, which keeps its inputs where the meter sees them.

    It wants an input that requires a gradient; PEFT's own hook for that crashes Swin, whose patch embeddings return a
    tuple, so the hook sits behind the embeddings' dropout. transformers checkpoints Swin's stages and the blocks in
    them: less is kept, and a block runs three times a step.

    Raises:
        UserError: A backbone of the model cannot be checkpointed.
    """
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


def trained_whole(model: nn.Module) -> list[str]:
    """Return the names of the modules that every method trains whole: outside the backbone, and its output norms.

    Raises:
        UserError: The model holds no backbone that is known here.
    """
    exits = find_exits(model)
    if not exits:
        raise UserError(
            f"model={type(model).__name__}: holds no backbone that `e3va backbones` lists, so there is no telling "
            "head from backbone. Choose another model, or method: full."
        )
    return everything_outside(model, exits)


def _want_gradient(module: nn.Module, inputs: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()


def _stay_in_eval_mode(module: nn.Module, inputs: Any) -> None:
    if module.training:
        module.eval()
