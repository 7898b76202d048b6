"""Injection: `E3VAModel(BaseTuner)`, and what the names in an `E3VAConfig` mean in a given model."""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from e3va_peft.backbones import Backbone, Site, child, family_of, registered_backbones
from e3va_peft.card import BaseModel
from e3va_peft.config import E3VAConfig, peft_type
from e3va_peft.layer import E3VALayer, FrozenGuard, cannot_merge, remove_hooks

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
    """Iterate over the children of a module as they were before PEFT wrapped any of them."""
    for name, item in module.named_children():
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


class E3VAModel(BaseTuner):
    """Puts E3VA highways beside the frozen backbones of a model.

    Not called by users: `peft.get_peft_model(model, E3VAConfig())` does.
    """

    prefix = "e3va_"
    tuner_layer_cls = E3VALayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, on a copy of the user's config, so that one config can serve many models.

        The saved modules are wrapped here and not by PEFT, which matches their names by `endswith`: a head that holds
        another `head` would be wrapped twice.
        """
        config = self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        tails = {name for found in find_exits(model) for name in found.tail}
        for name in config.modules_to_save:
            if name not in tails:
                _wrap_saved_module(model, name, adapter_name, adapter_name in self.active_adapters, config.inference_mode)
        _ignore_input_gradients(model)

    def _prepare_adapter_config(self, peft_config: E3VAConfig, model_config: dict[str, Any]) -> E3VAConfig:
        """Resolve the names in the config and refuse what cannot work, before anything is changed."""
        exits = _targets(self.model, peft_config)
        peft_config.target_modules = [found.name for found in exits]
        for found in exits:
            _check_exit(found)
        _check_label_count(self.model, peft_config, exits)
        if peft_config.modules_to_save is None:
            peft_config.modules_to_save = _everything_outside(self.model, exits)
        else:
            peft_config.modules_to_save = _resolve(self.model, exits, peft_config.modules_to_save)
        _check_suffixes(self.model, exits, peft_config.modules_to_save)
        peft_config.base = _describe_base(self.model, exits)
        for_peft = copy.copy(peft_config)
        for_peft.modules_to_save = None  # see inject_adapter
        return for_peft

    @staticmethod
    def _check_target_module_exists(peft_config: E3VAConfig, key: str) -> Any:
        found = BaseTuner._check_target_module_exists(peft_config, key)
        return found and key in (peft_config.target_modules or ())

    def _create_and_replace(
        self,
        peft_config: E3VAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        found = next(found for found in find_exits(self.model) if found.name == current_key)
        if isinstance(target, E3VALayer):
            layer = target
        else:
            layer = E3VALayer(target, found.family, found.site.depth, peft_config.taps)
        saved = self.peft_config[adapter_name].modules_to_save
        tail = [own for full, own in found.tail.items() if full in saved]
        layer.update_layer(adapter_name, peft_config, tail)
        if layer is not target:
            layer.train(target.training)
            for name in found.site.frozen:
                self.model.get_submodule(name).register_forward_pre_hook(FrozenGuard(name))
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, child.unload() if isinstance(child, E3VALayer) else new_module)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter, or several that were made with `modules_to_save=[]`: their lanes add up.

        Raises:
            ValueError: One of several adapters trains modules of its own beside the highway.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        own = [name for name in names if self.peft_config[name].modules_to_save]
        if len(names) > 1 and own:
            raise ValueError(
                f"adapters {names}: {own} have heads or norms of their own (modules_to_save), and a model can use only one "
                "of each at a time. Train adapters that shall be active together with modules_to_save=[]."
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names={kwargs['adapter_names']!r}: E3VA runs one set of adapters over the whole batch. Call "
                "set_adapter() and run one batch per adapter."
            )
        yield

    def _check_merge_allowed(self) -> None:
        raise cannot_merge()

    def unmerge_adapter(self) -> None:
        """Refuse: nothing can be merged.

        Raises:
            NotImplementedError: Always.
        """
        raise cannot_merge()

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        remove_hooks(model)
        _restore_input_gradients(model)
        return model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        head, own, rest = key.partition(f".{cls.prefix}")
        if not own:
            return key
        container, _, rest = rest.partition(".")
        return f"{head}{own}{container}.{rest.removeprefix(f'{adapter_name}.')}"

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected = model.state_dict()
        for key, value in mapped.items():
            if f".{cls.prefix}" not in key:
                continue
            if key not in expected or expected[key].shape != value.shape:
                got = "no such highway" if key not in expected else f"one of shape {tuple(expected[key].shape)}"
                raise ValueError(
                    f"the adapter has {key} of shape {tuple(value.shape)}, the base model {got}: it was trained on another "
                    "backbone, or on the same one with other out_features. Load it onto the base model named in its "
                    "adapter_config.json, or let e3va_peft.load_adapter(folder_or_repo) rebuild that."
                )
        return mapped


def _targets(model: nn.Module, config: E3VAConfig) -> list[Exit]:
    """Return the exits that a config names; all of them where it names none."""
    exits = find_exits(model)
    if any(found.name == "" for found in exits):
        cls = type(model).__name__
        raise ValueError(
            f"model={cls}: the model itself is the backbone's exit, and PEFT cannot replace a root module. Pass a model "
            f"that contains it: one with a head ({cls.removesuffix('Model')}ForImageClassification, ...), or your own "
            "nn.Module with the backbone as an attribute."
        )
    if not exits:
        supported = {name: family.exit_classes for name, family in registered_backbones().items()}
        raise ValueError(
            f"model={type(model).__name__}: holds no backbone that E3VA knows. Supported: "
            + "; ".join(f"{name} ({', '.join(classes)})" for name, classes in supported.items())
            + ". Another one is a small class: see e3va_peft.register_backbone."
        )
    if config.target_modules is not None:
        chosen = [found for found in exits if _names(config.target_modules, found.name)]
        unknown = [] if isinstance(config.target_modules, str) else list(config.target_modules)
        unknown = [name for name in unknown if not any(_names([name], found.name) for found in exits)]
        if unknown or not chosen:
            raise ValueError(
                f"target_modules={config.target_modules!r}: {unknown or 'nothing'} is an exit of a backbone in this "
                f"{type(model).__name__}; its exits are {[found.name for found in exits]}. Leave target_modules out to "
                "adapt them all, or load onto the class of model that the adapter was trained on."
            )
        exits = chosen
    if config.exclude_modules:
        kept = [found for found in exits if not _names(config.exclude_modules, found.name)]
        if not kept:
            raise ValueError(
                f"exclude_modules={config.exclude_modules!r}: leaves no backbone to adapt; the exits are "
                f"{[found.name for found in exits]}."
            )
        exits = kept
    return exits


def _names(patterns: list[str] | str, name: str) -> bool:
    """Whether PEFT's rule for names matches: a regular expression, or equality up to leading parents."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _check_exit(found: Exit) -> None:
    """Refuse an exit that has nothing to adapt, or that another PEFT method has already changed."""
    if not any(found.site.depth):
        raise ValueError(
            f"{found.name}: the deepest output that is asked for is the stem, in front of every block, so there is nothing "
            "to adapt. Ask the backbone for a deeper stage (out_features)."
        )
    for name, module in found.module.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"{found.name}.{name} is already adapted by {type(module).__name__}. E3VA sends no gradient into the "
                "backbone, so that adapter would never train. unload() or merge it first."
            )


def _describe_base(model: nn.Module, exits: list[Exit]) -> BaseModel:
    """Write down what has to be known of the base model to build it again."""
    backbones = {}
    if not getattr(model, "name_or_path", ""):
        for name, module in base_modules(model):
            source = getattr(module, "name_or_path", "")
            if source and any(found.name.startswith(f"{name}.") for found in exits):
                backbones.setdefault(name, source)
    outermost = {name: path for name, path in backbones.items() if not any(name.startswith(f"{o}.") for o in backbones)}
    return BaseModel(getattr(model, "config", None), type(model).__name__, outermost)


def _check_label_count(model: nn.Module, config: E3VAConfig, exits: list[Exit]) -> None:
    """Refuse to load a trained head onto a base model with another number of classes."""
    trained = (config.auto_mapping or {}).get("num_labels")
    present = getattr(getattr(model, "config", None), "num_labels", None)
    norms = {name for found in exits for name in found.site.norms}
    heads = [name for name in config.modules_to_save or () if name not in norms]
    if heads and trained is not None and present is not None and trained != present:
        raise ValueError(
            f"num_labels={present}: the base model has {present} classes, the adapter's head was trained for {trained}. "
            f"Build the base with num_labels={trained}, or let e3va_peft.load_adapter(folder_or_repo) rebuild base, head "
            "and image processor."
        )


def _everything_outside(model: nn.Module, exits: list[Exit]) -> list[str]:
    """Return the names of the maximal modules that hold no exit, plus the output norms inside exits."""
    skipped = {name for found in exits for name in (*found.site.frozen, *found.site.unused)}
    names: list[str] = []
    seen: set[int] = set()

    def visit(prefix: str, module: nn.Module) -> None:
        bare = [name for name, _ in module.named_parameters(recurse=False)]
        if bare and not isinstance(module, _CONTAINERS):
            warnings.warn(
                f"the parameters {bare} sit directly on {prefix or type(model).__name__}, beside the backbone, where PEFT "
                "cannot save them: they stay frozen. Put them into a module of their own to train them.",
                stacklevel=2,
            )
        for key, item in base_children(module):
            name = child(prefix, key)
            if name in skipped or any(name == found.name for found in exits) or id(item) in seen:
                continue
            if isinstance(item, _CONTAINERS) or any(found.name.startswith(f"{name}.") for found in exits):
                visit(name, item)
            elif _learns(item):
                seen.add(id(item))
                names.append(name)

    visit("", model)
    inside = [name for found in exits for name in found.site.norms if name in found.tail]
    return names + inside


def _learns(module: nn.Module) -> bool:
    """Whether training changes a module: it has parameters, or running statistics (a loss's constants are neither)."""
    return any(True for _ in module.parameters()) or any(hasattr(m, "running_mean") for m in module.modules())


def _resolve(model: nn.Module, exits: list[Exit], requested: list[str]) -> list[str]:
    """Turn the names a user gave for `modules_to_save` into full names."""
    modules = dict(base_modules(model))
    resolved: list[str] = []
    for name in requested:
        matches = [full for full in modules if full == name or full.endswith(f".{name}")]
        if not matches:
            close = difflib.get_close_matches(name, modules, n=3)
            hint = f" Did you mean {close}?" if close else ""
            raise ValueError(f"modules_to_save={name!r}: no module of this {type(model).__name__} has that name.{hint}")
        for full in matches:
            _check_saved_module(full, modules[full], exits)
        resolved += [full for full in matches if full not in resolved]
    return resolved


def _check_saved_module(name: str, module: nn.Module, exits: list[Exit]) -> None:
    """Refuse to save and train what is inside the frozen region, holds it, or cannot be wrapped."""
    for found in exits:
        if found.contains(name) and name not in found.tail:
            raise ValueError(
                f"modules_to_save={name!r}: is inside the frozen backbone, where no gradient enters, so it would never train. "
                f"Of {found.name}, only {sorted(found.tail) or 'nothing'} can be trained whole; beside it, anything."
            )
        if found.name.startswith(f"{name}."):
            raise ValueError(f"modules_to_save={name!r}: contains the frozen backbone {found.name}. Name its other parts.")
    if isinstance(module, _CONTAINERS):
        parts = [child(name, key) for key, _ in module.named_children()]
        raise ValueError(f"modules_to_save={name!r}: is a {type(module).__name__}, which PEFT cannot wrap. Name {parts}.")


def _check_suffixes(model: nn.Module, exits: list[Exit], names: list[str]) -> None:
    """Refuse a name that by PEFT's rule, `endswith`, would also mean another module outside the backbone."""
    for key, _ in base_modules(model):
        inside = any(key == name or key.startswith(f"{name}.") for name in names)
        if inside or any(found.contains(key) for found in exits):
            continue
        for name in names:
            if key.endswith(name):
                raise ValueError(
                    f"modules_to_save={name!r}: PEFT matches these names by their ending, so this would also mean {key!r}. "
                    f"Name both, leave modules_to_save out to train everything outside the backbone, or rename the "
                    f"attribute {name!r} of your model."
                )


def _wrap_saved_module(model: nn.Module, name: str, adapter_name: str, active: bool, inference_mode: bool) -> None:
    """Give an adapter its own trained copy of a module, as PEFT does, but under its exact name."""
    parent = model.get_submodule(name.rpartition(".")[0])
    key = name.rpartition(".")[2]
    module = parent.get_submodule(key)
    if isinstance(module, ModulesToSaveWrapper):
        module.update(adapter_name)
        return
    wrapper = ModulesToSaveWrapper(module, adapter_name)
    wrapper.set_adapter(adapter_name if active else [], inference_mode=inference_mode)
    setattr(parent, key, wrapper)


class _IgnoredInputGradients:
    """Stands for `enable_input_require_grads` on a wrapped model: E3VA needs no gradient at the input."""

    def __init__(self, was_enabled: bool) -> None:
        self.was_enabled = was_enabled

    def __call__(self) -> None:
        """Do nothing. PEFT and Trainer call this when gradient checkpointing is on; it would crash Swin."""


def _ignore_input_gradients(model: nn.Module) -> None:
    if not hasattr(model, "enable_input_require_grads") or "enable_input_require_grads" in model.__dict__:
        return
    was_enabled = bool(getattr(model, "_require_grads_hooks", None))
    if was_enabled:
        model.disable_input_require_grads()  # type: ignore[operator]
    model.enable_input_require_grads = _IgnoredInputGradients(was_enabled)  # type: ignore[assignment]


def _restore_input_gradients(model: nn.Module) -> None:
    ignored = model.__dict__.pop("enable_input_require_grads", None)
    if ignored is not None and ignored.was_enabled:
        model.enable_input_require_grads()  # type: ignore[operator]


def register() -> None:
    """Register E3VA with PEFT, once. Where PEFT ships the method itself, leave PEFT's in place and say so."""
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type())
    if known is None:
        register_peft_method(name="e3va", config_cls=E3VAConfig, model_cls=E3VAModel)
    elif known.__module__ != __name__:
        warnings.warn(
            f"PEFT registers E3VA itself ({known.__module__}). Use its classes; e3va_peft's stay unregistered.",
            stacklevel=2,
        )


def record_metrics(model: PeftModel, metrics: Mapping[str, float], adapter_name: str | None = None) -> None:
    """Note results of an adapter for its model card, which the next save writes.

    Args:
        model: The model.
        metrics: Name -> value, e.g. `{"mean_iou": 0.75}`; what is no number is left out.
        adapter_name: The adapter; the active one by default.
    """
    config = model.peft_config[adapter_name or model.active_adapters[0]]
    config.base.metrics |= {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
