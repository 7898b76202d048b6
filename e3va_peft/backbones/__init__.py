"""What is known about frozen backbones. The only place that names their attributes: one family, one file."""

from __future__ import annotations

from torch import nn

from e3va_peft.backbones.base import Backbone, Run, Site, StageSpec, TapPoint, add, child, is_a
from e3va_peft.backbones.dinov2 import Dinov2
from e3va_peft.backbones.swin import Swin
from e3va_peft.backbones.vit import ViT

__all__ = [
    "Backbone",
    "Run",
    "Site",
    "StageSpec",
    "TapPoint",
    "add",
    "child",
    "family_of",
    "is_a",
    "register_backbone",
    "registered_backbones",
]

_FAMILIES: dict[str, Backbone] = {family.name: family for family in (Swin(), ViT(), Dinov2())}


def register_backbone(family: Backbone) -> Backbone:
    """Make a family of backbones known to E3VA, also from a user's own code.

    Raises:
        TypeError: `family` is no instance of `Backbone`.
        ValueError: Its name or one of its exit classes belongs to another family already.
    """
    if not isinstance(family, Backbone):
        raise TypeError(f"family={family!r}: must be an instance of a subclass of e3va_peft.Backbone.")
    for other in _FAMILIES.values():
        if type(other) is type(family):
            continue
        if other.name == family.name:
            raise ValueError(f"name={family.name!r}: taken by {type(other).__qualname__}. Choose another name.")
        if taken := set(other.exit_classes) & set(family.exit_classes):
            raise ValueError(f"exit_classes={sorted(taken)}: adapted by the family {other.name!r} already.")
    _FAMILIES[family.name] = family
    return family


def registered_backbones() -> dict[str, Backbone]:
    """Return the supported families by name."""
    return dict(_FAMILIES)


def family_of(module: nn.Module) -> Backbone | None:
    """Return the family whose exit this module is, or None."""
    return next((family for family in _FAMILIES.values() if is_a(module, *family.exit_classes)), None)
