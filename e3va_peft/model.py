"""Injection: `E3VAModel(BaseTuner)`, and its state-dict keys."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn

from e3va_peft.card import KeepCard
from e3va_peft.config import E3VAConfig
from e3va_peft.exits import base_of, find_exits, layers_of
from e3va_peft.fingerprint import tensors_checksum
from e3va_peft.hooks import FrozenGuard, FrozenOutput, ImageGuard, guard_of, remove_hooks
from e3va_peft.layer import METHOD_CHILD, E3VALayer, cannot_merge
from e3va_peft.refusals import backbone_fingerprint, check_backbone, check_outside, outside_fingerprints
from e3va_peft.resolve import resolve
from e3va_peft.saved import SavedModule, shared_tensors, will_be_sharded


class E3VAModel(BaseTuner):
    """Puts E3VA highways beside the frozen backbones of a model.

    Not called by users: `peft.get_peft_model(model, E3VAConfig())` does.
    """

    prefix = "e3va_"
    tuner_layer_cls = E3VALayer
    target_module_mapping = {}  # noqa: RUF012  exits are found by class, not by architecture

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter. The config of a new one is copied, so that one config can serve many models.

        That of an adapter whose weights are loaded next is kept itself, as PEFT does, unless another model has it.

        The saved modules are wrapped here and not by PEFT, which matches their names by `endswith`: a head that holds
        another `head` would be wrapped twice.
        """
        config = self.peft_config[adapter_name]
        is_new = not config.inference_mode and config.auto_mapping is None
        if is_new or config.base is not None:
            config = self.peft_config[adapter_name] = copy.deepcopy(config)
        first = guard_of(model) is None
        guarded = model.register_forward_pre_hook(ImageGuard(), with_kwargs=True) if first else None
        had = [layer for layer in layers_of(model) if adapter_name in layer.adapters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:  # a refusal, out of memory, Ctrl-C
            self._put_back(model, adapter_name, had)
            if guarded is not None:
                guarded.remove()
            raise
        tails = {name for found in find_exits(model) for name in found.tail}
        for name in config.modules_to_save:
            if name not in tails:
                _wrap_saved_module(
                    model, name, adapter_name, adapter_name in self.active_adapters, config.inference_mode
                )
        _ignore_input_gradients(model)
        if will_be_sharded():  # a sharded model cannot be asked any more
            note_base(model, self.peft_config[adapter_name], adapter_name)
        if not is_new and hasattr(model, _LOADER):
            setattr(model, _LOADER, _CheckedLoader(model, adapter_name))

    def _put_back(self, model: nn.Module, adapter_name: str, had: Collection[E3VALayer]) -> None:
        """Take an adapter that came to an error out of the layers that had it not, and out layers that have none."""
        own = guard_of(model)
        for name, layer in list(model.named_modules()):
            parent, _, child = name.rpartition(".")
            if child == METHOD_CHILD and isinstance(layer, nn.Identity):  # which no layer has replaced
                delattr(model.get_submodule(parent), child)
            if not isinstance(layer, E3VALayer) or layer.owner is not own:
                continue
            if adapter_name in layer.adapters() and layer not in had:
                layer.delete_adapter(adapter_name)
            if not layer.adapters():
                exit = layer.unload_and_optionally_merge_module(False, False, None)
                for module in layer.front.values():
                    remove_hooks(module)
                self._replace_module(model.get_submodule(parent), child, exit, layer)

    def _prepare_adapter_config(self, peft_config: E3VAConfig, model_config: dict[str, Any]) -> E3VAConfig:
        """Resolve the names in the config and refuse what cannot work, before anything is changed.

        PEFT gets a copy: with the layers' places as one exact regular expression, and without saved modules, which
        `inject_adapter` wraps.
        """
        resolve(self.model, peft_config)
        chosen = [found for found in find_exits(self.model) if found.target in peft_config.target_modules]  # type: ignore[operator]
        for found in chosen:
            if found.family.methods and not hasattr(found.module, METHOD_CHILD):
                found.module.add_module(METHOD_CHILD, nn.Identity())  # which the layer will replace
        for_peft = copy.copy(peft_config)
        for_peft.target_modules = "|".join(re.escape(found.place) for found in chosen)
        for_peft.exclude_modules = for_peft.modules_to_save = None
        return for_peft

    def _create_and_replace(  # type: ignore[override]  # E3VA has no target_parameters
        self,
        peft_config: E3VAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        found = next(found for found in find_exits(self.model) if found.place == current_key)
        site, layer = found.site, target
        if not isinstance(layer, E3VALayer):
            names = () if found.family.methods else site.frozen  # a method's frozen modules run inside of it
            front = {name: self.model.get_submodule(name) for name in names}
            layer = E3VALayer(found.module, found.family, site.depth, peft_config, front)
            layer.owner = guard_of(self.model)
        saved = self.peft_config[adapter_name].modules_to_save
        try:
            layer.update_layer(adapter_name, peft_config, [own for full, own in found.tail.items() if full in saved])
        except BaseException:  # out of memory, Ctrl-C
            if layer is not target:
                layer.unload_and_optionally_merge_module(False, False, None)
            raise
        if layer is not target:
            for name, module in layer.front.items():
                module.register_forward_pre_hook(FrozenGuard(name))
                module.register_forward_hook(FrozenOutput(name), with_kwargs=True)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, E3VALayer) and child.is_method:
            delattr(parent, child_name)
        else:
            setattr(parent, child_name, new_module)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter, or several that were made with `modules_to_save=[]`: their lanes add up.

        Raises:
            ValueError: One of several adapters trains modules of its own beside the highway.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        own = [name for name in names if self.peft_config[name].modules_to_save]
        if len(names) > 1 and own:
            raise ValueError(
                f"adapters {names}: {own} have heads or norms of their own (modules_to_save), and a model can use "
                "only one of each at a time. Train adapters that shall be active together with modules_to_save=[]."
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; where it was the active one, the next is active in its place, with all modules it saves.

        Raises:
            ValueError: There is none of that name.
        """
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active and (now := self.active_adapters):  # PEFT leaves modules out that the deleted one did not save
            self.set_adapter(now, inference_mode=all(self.peft_config[name].inference_mode for name in now))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names={kwargs['adapter_names']!r}: E3VA runs one set of adapters over the whole batch. Call "
                "set_adapter() and run one batch per adapter; where they are to see the same images, within "
                "e3va_peft.backbone_once(model), which runs the backbone once for all."
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

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT annotates None and returns the model
        self, merge: bool = True, *args: Any, **kwargs: Any
    ) -> nn.Module:
        model = cast(nn.Module, super()._unload_and_optionally_merge(merge, *args, **kwargs))
        remove_hooks(model)
        _restore_input_gradients(model)
        vars(model).pop(_LOADER, None)
        return model

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        if isinstance(model, PeftModel):  # it is being saved, perhaps to be uploaded: PEFT has no hook for the card
            model._upload_modified_files = KeepCard(model)  # type: ignore[assignment]
        note_base(model, config, adapter_name)
        return super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)

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
        """Give the keys of a file the names that they have in the model; refuse a file that is not all of an adapter.

        Raises:
            ValueError: The file lacks weights of the adapter, has others besides, or has them in other sizes; they
                are not finite, or not those that were saved; or the adapter was trained on other frozen weights, or
                beside another head that it does not bring.
        """
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        containers = (*E3VALayer.adapter_layer_names, "modules_to_save")
        own = tuple(f".{container}.{adapter_name}." for container in containers)
        expected = {
            key.removeprefix(_PEFT_PREFIX): value
            for key, value in model.state_dict().items()
            if any(part in key for part in own)
        }
        _check_weights(expected, {key.removeprefix(_PEFT_PREFIX): value for key, value in mapped.items()})
        vars(base_of(model)).pop(_LOADER, None)
        saved = config.auto_mapping or {}
        # once: what is loaded under this name later, a checkpoint, is not what this config was saved with
        checksum, backbone, outside = (saved.pop(name, None) for name in ("weights", "backbone", "outside"))
        if checksum is not None and checksum != tensors_checksum(mapped.values()):
            raise ValueError(
                f"the adapter's weights are not those that were saved: their SHA-256 is not {str(checksum)[:12]}, as "
                "its adapter_config.json says. Restore the files that were saved together, or download them again. If "
                "you changed the weights on purpose, remove weights from auto_mapping there."
            )
        _warn_of_other_reading(saved.pop("reads", None) or {}, config)
        if backbone is not None:
            check_backbone(backbone, model, adapter_name, config.base_model_name_or_path or "its base")
        check_outside(outside or {}, model, config, to_train=not config.inference_mode)
        return mapped


def note_base(model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
    """Note the weights that an adapter's config will name when it is saved; once sharded, those of before stay."""
    config.base.backbone = backbone_fingerprint(model, adapter_name) or config.base.backbone
    config.base.outside |= outside_fingerprints(model, config)


def _warn_of_other_reading(saved: Mapping[str, Any], config: E3VAConfig) -> None:
    """Warn of an adapter that reads the frozen pass in another way than it was trained to."""
    now = {name: list(value) if isinstance(value, tuple) else value for name, value in config.reading().items()}
    other = [
        f"{name}={value!r} then, {now.get(name)!r} now"
        for name, value in saved.items()
        if value != now.get(name)
        and {str(value), str(now.get(name))} != {"exact", "recompute"}  # of the same function
    ]
    if other:
        warnings.warn(
            f"the adapter was trained to read the backbone in another way ({'; '.join(other)}), so it computes "
            "something else. Take the values of then, unless you train it further with those of now.",
            UserWarning,
            stacklevel=2,
        )


_PEFT_PREFIX = "base_model.model."  # which keys have in a PeftModel, and not where transformers loads the adapter
_LOADER = "_load_pretrained_model"  # by which transformers' own `model.load_adapter` loads weights


class _CheckedLoader:
    """Stands on a model for transformers' loader, once: PEFT's, which checks an adapter's weights, runs before it."""

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.model = model
        self.adapter_name = adapter_name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Load and check as PEFT does, then as transformers does."""
        vars(self.model).pop(_LOADER, None)
        state = dict(kwargs.get("state_dict") or {})
        for file in kwargs.get("checkpoint_files") or ():
            state |= load_file(file) if str(file).endswith(".safetensors") else {}  # pickles are transformers' own
        if state:
            weights = {key.removeprefix(_PEFT_PREFIX): value for key, value in state.items()}
            set_peft_model_state_dict(self.model, weights, self.adapter_name)
        return getattr(type(self.model), _LOADER)(*args, **kwargs)


def _check_weights(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """Raise a ValueError unless a file has exactly the weights of an adapter, and finite ones."""
    for key in sorted(found, key=lambda key: (f".{E3VAModel.prefix}" not in key, key)):  # the highway tells most
        if key in expected and expected[key].shape == found[key].shape:
            _check_numbers(key, expected[key], found[key])
            continue
        there = f"one of shape {tuple(expected[key].shape)}" if key in expected else "no such highway"
        if f".{E3VAModel.prefix}" in key or key in expected:
            raise ValueError(
                f"the adapter has {key} of shape {tuple(found[key].shape)}, the base model {there}: it was trained on "
                "another backbone, or on the same one with other out_features. Load it onto the base model "
                "named in its adapter_config.json, or let e3va_peft.load_adapter(folder_or_repo) rebuild that."
            )
        raise ValueError(
            f"the adapter has {key}, which is neither of its highway nor of what its adapter_config.json names in "
            "modules_to_save: it would change the frozen base model. Restore the files that were saved together."
        )
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ValueError(
            f"the adapter lacks {len(missing)} of its {len(expected)} weights, {missing[0]!r} among them, which would "
            "stay as they were before training. Restore the file that was saved, or download it again."
        )


def _check_numbers(key: str, expected: torch.Tensor, found: torch.Tensor) -> None:
    """Raise a ValueError unless weights are of the kind of number that they have in the model, and finite."""
    if expected.is_floating_point() != found.is_floating_point():
        wrong = f"is of {found.dtype}, and the model's is of {expected.dtype}"
    elif found.isfinite().all():
        return
    else:
        wrong = f"has {int((~found.isfinite()).sum())} of {found.numel()} numbers that are infinite or nan"
    raise ValueError(f"the adapter's {key} {wrong}. Restore the file that was saved, or download it again.")


def _wrap_saved_module(model: nn.Module, name: str, adapter_name: str, active: bool, inference_mode: bool) -> None:
    """Give an adapter its own trained copy of a module, as PEFT does, but under its exact name."""
    parent = model.get_submodule(name.rpartition(".")[0])
    key = name.rpartition(".")[2]
    module = parent.get_submodule(key)
    if isinstance(module, ModulesToSaveWrapper):
        module.update(adapter_name)
        return
    wrapper = SavedModule(module, adapter_name, shared_tensors(model, module))
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
