"""Names in an `E3VAConfig`, resolved to the modules of a given model."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn

from e3va_peft.backbones import registered_backbones
from e3va_peft.card import BaseModel
from e3va_peft.config import E3VAConfig
from e3va_peft.exits import Exit, base_modules, everything_outside, find_exits
from e3va_peft.layer import first_live
from e3va_peft.refusals import (
    check_exit,
    check_highway_size,
    check_label_count,
    check_merging,
    check_nesting,
    check_offloaded,
    check_quantized,
    check_saved_module,
    check_suffixes,
    check_twins,
)


def resolve(model: nn.Module, config: E3VAConfig) -> None:
    """Replace the names in a config by full names, note the base model, and refuse what cannot work.

    Args:
        model: The model that shall be adapted, not changed here.
        config: Changed in place.

    Raises:
        ValueError: See the messages: each names the argument, its value and what to do.
    """
    present = find_exits(model)
    exits = _targets(model, config, present)
    check_twins(present)
    for found in exits:
        check_exit(model, found)
        check_merging(found)
        first_live(found.site.depth, config.live_blocks)  # refuses more than there are
        check_highway_size(model, found, config)
    config.target_modules = [found.target for found in exits]
    taps = {found.family.taps(config.taps) for found in exits}
    if len(taps) == 1:  # where families with branches of other names meet, None stays
        config.taps = taps.pop()
    norms = {config.tap_norm or found.family.tap_norm for found in exits}
    if len(norms) == 1:
        config.tap_norm = norms.pop()
    check_label_count(model, config, exits)
    if config.modules_to_save is None:
        config.modules_to_save = everything_outside(model, present, exits)
    else:
        config.modules_to_save = _full_names(model, exits, config.modules_to_save)
    check_offloaded(model, exits, config.modules_to_save)
    check_quantized(model, config.modules_to_save)
    check_suffixes(model, exits, config.modules_to_save)
    check_nesting(model, config.modules_to_save)
    config.base = _describe_base(model, exits, config.revision)
    before = config.auto_mapping or {}
    config.base.metrics = dict(before.get("metrics") or {})
    config.base.commits |= before.get("commits") or {}  # that it was loaded by, and not the newest in the cache


def _targets(model: nn.Module, config: E3VAConfig, exits: list[Exit]) -> list[Exit]:
    """Return those of a model's exits that a config names; all of them where it names none."""
    if any(found.target == "" for found in exits):
        cls = type(model).__name__
        raise ValueError(
            f"model={cls}: the model itself is the backbone's exit, and PEFT cannot replace a root module. Pass a "
            f"model that contains it: one with a head ({cls.removesuffix('Model')}ForImageClassification, ...), or "
            "your own nn.Module with the backbone as an attribute."
        )
    if not exits:
        supported = {
            name: [exit.rpartition(".")[2] for exit in family.exits] for name, family in registered_backbones().items()
        }
        raise ValueError(
            f"model={type(model).__name__}: holds no backbone that E3VA knows. Supported: "
            + "; ".join(f"{name} ({', '.join(classes)})" for name, classes in supported.items())
            + f"; `e3va backbones` lists them. Use the nearest, e.g. {_nearest(model)}. Another one is a small "
            "declaration: see e3va_peft.register_backbone."
        )
    if config.target_modules is not None:
        full = {found.target for found in exits}
        chosen = [found for found in exits if _names(config.target_modules, found.target, full)]
        unknown = [] if isinstance(config.target_modules, str) else list(config.target_modules)
        unknown = [name for name in unknown if not any(_names([name], found.target, full) for found in exits)]
        if unknown or not chosen:
            raise ValueError(
                f"target_modules={config.target_modules!r}: no exit of a backbone in this {type(model).__name__} has "
                f"the name {unknown[0] if unknown else config.target_modules!r}; its exits are "
                f"{[found.target for found in exits]}. Leave target_modules out to adapt them all, or load onto the "
                "class of model that the adapter was trained on."
            )
        exits = chosen
    if config.exclude_modules:
        full = {found.target for found in exits}
        kept = [found for found in exits if not _names(config.exclude_modules, found.target, full)]
        if not kept:
            raise ValueError(
                f"exclude_modules={config.exclude_modules!r}: leaves no backbone to adapt; the exits are "
                f"{[found.target for found in exits]}."
            )
        exits = kept
    return exits


def _nearest(model: nn.Module) -> str:
    """Return the Hub id of a model that works: a pyramid of stages for one, else a plain vision transformer."""
    pyramid = hasattr(getattr(model, "config", None), "depths")
    return "microsoft/swin-tiny-patch4-window7-224" if pyramid else "facebook/dinov2-base"


def _names(patterns: list[str] | str, name: str, full: set[str]) -> bool:
    """Whether a pattern means a name: a regular expression, a full name, or an ending that is not one."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or (pattern not in full and name.endswith(f".{pattern}")) for pattern in patterns)


def _describe_base(model: nn.Module, exits: list[Exit], revision: str | None) -> BaseModel:
    """Write down what has to be known of the base model to build it again."""
    backbones: dict[str, str] = {}
    if not getattr(model, "name_or_path", ""):
        for name, module in base_modules(model):
            source = getattr(module, "name_or_path", "")
            if source and any(found.is_within(name) for found in exits):
                backbones.setdefault(name, source)
    outermost = {
        name: path for name, path in backbones.items() if not any(name.startswith(f"{o}.") for o in backbones)
    }
    sources = [str(getattr(model, "name_or_path", "")), *outermost.values()]
    commits = {source: _commit_of(source, revision if i == 0 else None) for i, source in enumerate(sources)}
    quantizers: list[Any] = [getattr(module, "hf_quantizer", None) for _, module in base_modules(model)]
    methods = [q.quantization_config.quant_method for q in quantizers if q is not None and not q.pre_quantized]
    return BaseModel(
        config=getattr(model, "config", None),
        class_name=type(model).__name__,
        library=type(model).__module__,
        backbones=outermost,
        folders=[source for source in sources if source and os.path.isdir(source)],
        commits={source: commit for source, commit in commits.items() if commit},
        quantized_by=str(getattr(methods[0], "value", methods[0])) if methods else "",
    )


def _commit_of(source: str, revision: str | None) -> str | None:
    """Return the commit that a Hub id's files in the local cache are of; a model does not know its own."""
    if not source or os.path.isdir(source):
        return None
    try:
        file = try_to_load_from_cache(source, "config.json", revision=revision)
    except HFValidationError:  # a path of another machine
        return None
    return Path(file).parent.name if isinstance(file, str) else None


def _full_names(model: nn.Module, exits: list[Exit], requested: list[str]) -> list[str]:
    """Turn the names a user gave for `modules_to_save` into full names."""
    modules = dict(base_modules(model))
    resolved: list[str] = []
    for name in requested:
        matches = [name] if name in modules else [full for full in modules if full.endswith(f".{name}")]
        if not matches:
            close = difflib.get_close_matches(name, modules, n=3)
            hint = f" Did you mean {close}?" if close else ""
            raise ValueError(
                f"modules_to_save={name!r}: no module of this {type(model).__name__} has that name.{hint}"
            )
        for full in matches:
            check_saved_module(full, modules[full], exits)
        resolved += [full for full in matches if full not in resolved]
    return resolved
