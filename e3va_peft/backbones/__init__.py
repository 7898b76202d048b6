"""Families of frozen backbones, as data. The only place that names their attributes: one family, one file."""

from __future__ import annotations

from torch import nn

from e3va_peft.backbones.base import Backbone, Branch, ExitCall, Host, Merging, Site, TapPoint, child
from e3va_peft.backbones.convnext import CONVNEXT
from e3va_peft.backbones.dinov2 import DINOV2
from e3va_peft.backbones.dinov3_convnext import DINOV3_CONVNEXT
from e3va_peft.backbones.dinov3_vit import DINOV3_VIT
from e3va_peft.backbones.swin import SWIN
from e3va_peft.backbones.swinv2 import SWINV2
from e3va_peft.backbones.timm_swin import TIMM_SWIN, TIMM_SWIN_FEATURES
from e3va_peft.backbones.timm_vit import TIMM_VIT
from e3va_peft.backbones.vit import VIT

__all__ = [
    "Backbone",
    "Branch",
    "ExitCall",
    "Host",
    "Merging",
    "Site",
    "TapPoint",
    "child",
    "family_of",
    "register_backbone",
    "registered_backbones",
]

_BUILT_IN = (
    SWIN,
    SWINV2,
    VIT,
    DINOV2,
    DINOV3_VIT,
    CONVNEXT,
    DINOV3_CONVNEXT,
    TIMM_VIT,
    TIMM_SWIN,
    TIMM_SWIN_FEATURES,
)
_FAMILIES: dict[str, Backbone] = {family.name: family for family in _BUILT_IN}


def register_backbone(family: Backbone) -> Backbone:
    """Make a family of backbones known to E3VA, also from a user's own code. Registered again, it replaces itself.

    Raises:
        TypeError: `family` is not a `Backbone`.
        ValueError: Its name or one of its exit classes belongs to another family already.
    """
    if not isinstance(family, Backbone):
        raise TypeError(f"family={family!r}: must be an e3va_peft.Backbone.")
    for other in _FAMILIES.values():
        if other.exits == family.exits and other.name == family.name:
            continue
        if other.name == family.name:
            raise ValueError(f"name={family.name!r}: taken by the family of {other.exits}. Choose another name.")
        if taken := set(other.exits) & set(family.exits):
            raise ValueError(f"exits={sorted(taken)}: adapted by the family {other.name!r} already.")
    _FAMILIES[family.name] = family
    return family


def registered_backbones() -> dict[str, Backbone]:
    """Return the supported families by name."""
    return dict(_FAMILIES)


def family_of(module: nn.Module) -> Backbone | None:
    """Return the family whose exit this module is, or whose methods it has, or None."""
    return next((family for family in _FAMILIES.values() if family.matches(module)), None)
