"""E3VA among PEFT's methods: `PeftType.E3VA`, and the tables by which PEFT's functions find configs and tuners."""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method


def peft_type() -> PeftType:
    """Return `PeftType.E3VA`, adding it to PEFT's enum where PEFT does not ship it.

    PEFT has no plug-in mechanism and its loaders look the type up by name, so this is a real member of the enum: it
    passes isinstance, iteration, lookup by name and value, json, pickle and copy.
    """
    if "E3VA" not in PeftType.__members__:
        member = str.__new__(PeftType, "E3VA")
        member._name_ = member._value_ = "E3VA"
        member.__objclass__ = PeftType  # type: ignore[attr-defined]
        member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
        PeftType._member_names_.append("E3VA")
        PeftType._member_map_["E3VA"] = member
        PeftType._value2member_map_["E3VA"] = member
        type.__setattr__(PeftType, "E3VA", member)
    return PeftType["E3VA"]


def register(config_class: type[Any], model_class: type[Any]) -> None:
    """Register E3VA with PEFT, once. Where PEFT ships the method itself, leave PEFT's in place and say so.

    Args:
        config_class: `E3VAConfig`.
        model_class: `E3VAModel`.
    """
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type())
    if known is None:
        register_peft_method(name="e3va", config_cls=config_class, model_cls=model_class)
    elif known.__module__ != model_class.__module__:
        warnings.warn(
            f"PEFT registers E3VA itself ({known.__module__}). Use its classes; e3va_peft's stay unregistered.",
            stacklevel=2,
        )
