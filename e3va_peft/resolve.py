"""What the names in an `E3VAConfig` mean in a given model, and which of them cannot work there."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from e3va_peft.backbones import Backbone, Site, child, family_of, registered_backbones
from e3va_peft.card import BaseModel
from e3va_peft.config import E3VAConfig
from e3va_peft.highway import wraps_quantized
from e3va_peft.layer import E3VALayer

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Exit:
    """An exit that was found in a model."""

    name: str
    module: nn.Module
    family: Backbone
    site: Site

    @property
    def tail(self) -> dict[str, str]:
        """Full name -> own name of the modules inside the exit that may be trained."""
        present = [name for name in self.family.tail if getattr(self.module, name, None) is not None]
        return {child(self.name, name): name for name in present}

    def contains(self, name: str) -> bool:
        """Whether a module is inside the exit or in the frozen modules before it."""
        return any(name == part or name.startswith(f"{part}.") for part in (self.name, *self.site.frozen))


def base_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the children of a module as they were before PEFT wrapped any, under each of their names."""
    for name, item in module._modules.items():
        if item is not None:
            yield name, unwrap(item)


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside PEFT's wrappers for saved modules and inside ours for exits."""
    while True:
        if isinstance(module, E3VALayer):
            module = module.base_layer
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def base_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Iterate over (name, module) of a model as it was before PEFT wrapped any of its modules."""
    yield prefix, model
    for name, item in base_children(model):
        yield from base_modules(item, child(prefix, name))


def find_exits(model: nn.Module) -> list[Exit]:
    """Find the exits of all supported backbones in a model, wrapped or not."""
    modules = dict(base_modules(model))
    exits: list[Exit] = []
    for name, module in modules.items():
        family = family_of(module)
        if family is None or any(name.startswith(f"{found.name}.") for found in exits):
            continue
        parts = name.split(".") if name else []
        ancestors = [(above, modules[above]) for above in (".".join(parts[:i]) for i in range(len(parts)))]
        site = family.site(module, name, ancestors) if ancestors else Site(depth=())
        exits.append(Exit(name, module, family, site))
    return exits


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
    config.target_modules = [found.name for found in exits]
    for found in exits:
        _check_exit(found)
        _check_merging(found)
    _check_label_count(model, config, exits)
    if config.modules_to_save is None:
        config.modules_to_save = everything_outside(model, present, exits)
    else:
        config.modules_to_save = _full_names(model, exits, config.modules_to_save)
    _check_quantized(model, config.modules_to_save)
    _check_suffixes(model, exits, config.modules_to_save)
    _check_nesting(model, config.modules_to_save)
    config.base = _describe_base(model, exits)
    config.base.metrics = dict((config.auto_mapping or {}).get("metrics") or {})


def _targets(model: nn.Module, config: E3VAConfig, exits: list[Exit]) -> list[Exit]:
    """Return those of a model's exits that a config names; all of them where it names none."""
    if any(found.name == "" for found in exits):
        cls = type(model).__name__
        raise ValueError(
            f"model={cls}: the model itself is the backbone's exit, and PEFT cannot replace a root module. Pass a "
            f"model that contains it: one with a head ({cls.removesuffix('Model')}ForImageClassification, ...), or "
            "your own nn.Module with the backbone as an attribute."
        )
    if not exits:
        supported = {name: family.exit_classes for name, family in registered_backbones().items()}
        raise ValueError(
            f"model={type(model).__name__}: holds no backbone that E3VA knows. Supported: "
            + "; ".join(f"{name} ({', '.join(classes)})" for name, classes in supported.items())
            + ". Another one is a small class: see e3va_peft.register_backbone."
        )
    if config.target_modules is not None:
        full = {found.name for found in exits}
        chosen = [found for found in exits if _names(config.target_modules, found.name, full)]
        unknown = [] if isinstance(config.target_modules, str) else list(config.target_modules)
        unknown = [name for name in unknown if not any(_names([name], found.name, full) for found in exits)]
        if unknown or not chosen:
            raise ValueError(
                f"target_modules={config.target_modules!r}: {unknown or 'nothing'} is an exit of a backbone in this "
                f"{type(model).__name__}; its exits are {[found.name for found in exits]}. Leave target_modules out "
                "to adapt them all, or load onto the class of model that the adapter was trained on."
            )
        exits = chosen
    if config.exclude_modules:
        full = {found.name for found in exits}
        kept = [found for found in exits if not _names(config.exclude_modules, found.name, full)]
        if not kept:
            raise ValueError(
                f"exclude_modules={config.exclude_modules!r}: leaves no backbone to adapt; the exits are "
                f"{[found.name for found in exits]}."
            )
        exits = kept
    return exits


def _names(patterns: list[str] | str, name: str, full: set[str]) -> bool:
    """Whether a pattern means a name: a regular expression, a full name, or the end of names that is no full name."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or (pattern not in full and name.endswith(f".{pattern}")) for pattern in patterns)


def _check_exit(found: Exit) -> None:
    """Refuse an exit that has nothing to adapt, or that another PEFT method has already changed."""
    if not any(found.site.depth):
        raise ValueError(
            f"{found.name}: the deepest output that is asked for is the stem, in front of every block, so there is "
            "nothing to adapt. Ask the backbone for a deeper stage (out_features)."
        )
    for name, module in found.module.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"{found.name}.{name} is already adapted by {type(module).__name__}. E3VA sends no gradient into the "
                "backbone, so that adapter would never train. unload() or merge it first."
            )


def _check_merging(found: Exit) -> None:
    """Refuse patch merging by layers of bitsandbytes that round activations as well: the lane passes through it."""
    mergings = [stage.merging for stage in found.family.stages(found.module)]
    rounding = [module for module in mergings if module and any(hasattr(p, "SCB") for p in module.parameters())]
    names = [child(found.name, name) for name, module in found.module.named_modules() if module in rounding]
    if names:
        raise ValueError(
            f"load_in_8bit=True: bitsandbytes rounds what enters the patch merging {names}, and the lane, which "
            f"passes through, would drown in that. Add llm_int8_skip_modules={names} to the BitsAndBytesConfig, or "
            "use load_in_4bit=True or a TorchAoConfig: only weights are rounded there."
        )


def _describe_base(model: nn.Module, exits: list[Exit]) -> BaseModel:
    """Write down what has to be known of the base model to build it again."""
    backbones: dict[str, str] = {}
    if not getattr(model, "name_or_path", ""):
        for name, module in base_modules(model):
            source = getattr(module, "name_or_path", "")
            if source and any(f"{found.name}.".startswith(f"{name}.") for found in exits):
                backbones.setdefault(name, source)
    outermost = {
        name: path for name, path in backbones.items() if not any(name.startswith(f"{o}.") for o in backbones)
    }
    quantizers: list[Any] = [getattr(module, "hf_quantizer", None) for _, module in base_modules(model)]
    methods = [q.quantization_config.quant_method for q in quantizers if q is not None and not q.pre_quantized]
    return BaseModel(
        config=getattr(model, "config", None),
        class_name=type(model).__name__,
        library=type(model).__module__,
        backbones=outermost,
        quantized_by=str(getattr(methods[0], "value", methods[0])) if methods else "",
    )


def _check_label_count(model: nn.Module, config: E3VAConfig, exits: list[Exit]) -> None:
    """Refuse to load a trained head onto a base model with another number of classes."""
    trained = (config.auto_mapping or {}).get("num_labels")
    present = getattr(getattr(model, "config", None), "num_labels", None)
    norms = {name for found in exits for name in found.site.norms}
    heads = [name for name in config.modules_to_save or () if name not in norms]
    if heads and trained is not None and present is not None and trained != present:
        raise ValueError(
            f"num_labels={present}: the base model has {present} classes, the adapter's head was trained for "
            f"{trained}. Build the base with num_labels={trained}, or let e3va_peft.load_adapter(folder_or_repo) "
            "rebuild base, head and image processor."
        )


def everything_outside(model: nn.Module, exits: list[Exit], chosen: list[Exit] | None = None) -> list[str]:
    """Return the names of the maximal modules that hold no exit, plus the output norms inside exits.

    Args:
        model: The model.
        exits: All its exits.
        chosen: Those that are adapted, all by default. The backbones of the others stay frozen whole.

    Raises:
        ValueError: One module outside the backbone is registered under two names.
    """
    chosen = exits if chosen is None else chosen
    skipped = {name for found in exits for name in (*found.site.frozen, *found.site.unused)}
    skipped |= {name for found in exits if found not in chosen for name in found.site.norms}
    names: list[str] = []
    seen: dict[int, str] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        bare = [name for name, _ in module.named_parameters(recurse=False)]
        if bare and not isinstance(module, _CONTAINERS):
            warnings.warn(
                f"the parameters {bare} sit directly on {prefix or type(model).__name__}, beside the backbone, "
                "where PEFT cannot save them: they stay frozen. Put them into a module of their own to train them.",
                stacklevel=2,
            )
        for key, item in base_children(module):
            name = child(prefix, key)
            if name in skipped or any(name == found.name for found in exits):
                continue
            if id(item) in seen:
                raise ValueError(
                    f"the module {seen[id(item)]!r} is registered again as {name!r}; PEFT can wrap it under one name "
                    "only, and the other would use the frozen original. Register it once, or give modules_to_save "
                    "without it."
                )
            if isinstance(item, _CONTAINERS) or any(found.name.startswith(f"{name}.") for found in exits):
                visit(name, item)
            elif _learns(item):
                seen[id(item)] = name
                names.append(name)

    visit("", model)
    inside = [name for found in chosen for name in found.site.norms if name in found.tail]
    return names + inside


def _check_nesting(model: nn.Module, names: list[str]) -> None:
    """Refuse to save a part of what another adapter saves whole, or the other way round: the copies would overlap."""
    wrapped = [
        name.replace(".original_module", "").replace(".base_layer", "")
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    ]
    for name in names:
        if whole := [other for other in names if name.startswith(f"{other}.")]:
            raise ValueError(
                f"modules_to_save={name!r}: is a part of {whole[0]!r}, which is saved whole. Name one of them."
            )
        for other in wrapped:
            if name.startswith(f"{other}.") or other.startswith(f"{name}."):
                raise ValueError(
                    f"modules_to_save={name!r}: overlaps {other!r}, which another adapter of this model saves. Name "
                    "the same modules in both."
                )


def _learns(module: nn.Module) -> bool:
    """Whether training changes a module: it has parameters, or running statistics (a loss's constants are neither)."""
    return any(True for _ in module.parameters()) or any(hasattr(m, "running_mean") for m in module.modules())


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
            _check_saved_module(full, modules[full], exits)
        resolved += [full for full in matches if full not in resolved]
    return resolved


def _check_saved_module(name: str, module: nn.Module, exits: list[Exit]) -> None:
    """Refuse to save and train what is inside the frozen region, holds it, or cannot be wrapped."""
    for found in exits:
        if found.contains(name) and name not in found.tail:
            raise ValueError(
                f"modules_to_save={name!r}: is inside the frozen backbone, where no gradient enters, so it would "
                f"never train. Of {found.name}, only {sorted(found.tail) or 'nothing'} can be trained whole; beside "
                "it, anything."
            )
        if found.name.startswith(f"{name}."):
            raise ValueError(
                f"modules_to_save={name!r}: contains the frozen backbone {found.name}. Name its other parts."
            )
    if isinstance(module, _CONTAINERS):
        parts = [child(name, key) for key, _ in module.named_children()]
        raise ValueError(
            f"modules_to_save={name!r}: is a {type(module).__name__}, which PEFT cannot wrap. Name {parts}."
        )


def _check_quantized(model: nn.Module, names: list[str]) -> None:
    """Refuse to train quantised weights: they take no gradient, or no optimizer step, or cannot be saved."""
    modules = dict(base_modules(model))
    quantized = {
        name: f"{child(name, key)} is a {type(parameter).__name__} of {parameter.dtype}"
        for name in names
        for key, parameter in modules[name].named_parameters()
        if wraps_quantized(parameter) or not parameter.is_floating_point()
    }
    if quantized:
        raise ValueError(
            f"modules_to_save={list(quantized)}: what is saved is trained whole, which quantised weights cannot be: "
            f"{'; '.join(quantized.values())}. Load the base model with modules_to_not_convert={list(quantized)} in "
            "its TorchAoConfig (llm_int8_skip_modules in a BitsAndBytesConfig), or leave them out of modules_to_save."
        )


def _check_suffixes(model: nn.Module, exits: list[Exit], names: list[str]) -> None:
    """Refuse a name that by PEFT's rule, `endswith`, would also mean another module outside the backbone."""
    unused = {name for found in exits for name in found.site.unused}
    for key, module in base_modules(model):
        inside = any(key == name or key.startswith(f"{name}.") for name in names)
        if inside or key in unused or not _learns(module) or any(found.contains(key) for found in exits):
            continue
        for name in names:
            if key.endswith(name):
                raise ValueError(
                    f"modules_to_save={name!r}: PEFT matches these names by their ending, so this would also mean "
                    f"{key!r}. Name both, leave modules_to_save out to train everything outside the backbone, or "
                    f"rename the attribute {name!r} of your model."
                )
