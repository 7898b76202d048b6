"""The ways to fine-tune, one word and one file each. All of them train the same head and output norms whole.

PEFT provides LoRA and norm tuning; the others are here, in a few lines each. Where modules are put in, they are
children of modules that the backbone has, run by hooks: no name in the model changes. A new method is one file, and
its line in the list below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from e3va_peft.errors import UserError, one_of
from e3va_peft.methods.adapter import ADAPTER
from e3va_peft.methods.adaptformer import ADAPTFORMER
from e3va_peft.methods.base import INSERTED, Method, refuse_lost, trained_whole
from e3va_peft.methods.bitfit import BITFIT
from e3va_peft.methods.e3va import E3VA, E3VA_PLUS
from e3va_peft.methods.full import FULL
from e3va_peft.methods.head_only import HEAD_ONLY
from e3va_peft.methods.lora import LORA
from e3va_peft.methods.lora_checkpointing import LORA_CHECKPOINTING
from e3va_peft.methods.lorand import LORAND
from e3va_peft.methods.mona import MONA
from e3va_peft.methods.norm_tuning import NORM_TUNING
from e3va_peft.methods.partial import PARTIAL_1

__all__ = ["INSERTED", "METHODS", "Method", "adapt", "refuse_lost", "settings", "trained_whole"]

_CHOOSING, _INSERTING = (FULL, HEAD_ONLY, PARTIAL_1, BITFIT, NORM_TUNING), (ADAPTER, ADAPTFORMER, LORAND, MONA)
METHODS = {method.name: method for method in (*_CHOOSING, *_INSERTING, LORA, LORA_CHECKPOINTING, E3VA_PLUS, E3VA)}
"""All methods by name."""


def adapt(model: nn.Module, method: Mapping[str, Any]) -> nn.Module:
    """Make a model trainable by a method; what is not trained is frozen.

    Args:
        model: Base model with its head.
        method: `name`, and options for the method's PEFT config where it has one.

    Raises:
        UserError: There is no such method, it cannot adapt this model, or an option cannot work.
    """
    name = method["name"]
    if name not in METHODS:
        raise UserError(f"method={name!r}: {one_of(name, METHODS)}")
    try:
        return METHODS[name].adapt(model, **{key: value for key, value in method.items() if key != "name"})
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"method={name}: {error}") from error


def settings() -> dict[str, dict[str, Any]]:
    """List every method, and E3VA at its settings too, by title: what `adapt` takes. E3VA comes first."""
    return {
        title: {"name": method.name, **options}
        for method in reversed(METHODS.values())
        for title, options in ((method.title, {}), *method.settings.items())
    }
