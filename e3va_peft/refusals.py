"""Refusals of everything that cannot work in a given model, before anything is changed."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from e3va_peft.backbones import child
from e3va_peft.config import E3VAConfig
from e3va_peft.exits import (
    CONTAINERS,
    Exit,
    base_modules,
    base_of,
    find_exits,
    frozen_weights,
    layers_of,
    learns,
    unsaved_outside,
)
from e3va_peft.fingerprint import KINDS, VECTORS, are_plain, checksum, described, noted, tensors_checksum
from e3va_peft.fused import wraps_quantized
from e3va_peft.hooks import Hook, guard_of, is_offloaded
from e3va_peft.layer import AdaptedMethod, has_units
from e3va_peft.saved import will_be_sharded

_SHOWN = 12  # digits of a checksum in a message
_MOST_PARAMETERS, _MOST_SHARE = 3 * 10**7, 4  # of a highway, and as a multiple of its backbone's


def named(model: nn.Module, part: str) -> list[tuple[str, nn.Module]]:
    """Return (full name, module) of a part of a model and of all in it, as it was before PEFT wrapped any."""
    return list(base_modules(dict(base_modules(model))[part], part))


def check_twins(exits: list[Exit]) -> None:
    """Refuse a backbone under two names: PEFT would wrap it under the first, and the model may call the other."""
    seen: dict[int, str] = {}
    for found in exits:
        if id(found.module) in seen:
            raise ValueError(
                f"the backbone {seen[id(found.module)]!r} is registered again as {found.target!r}; it can be wrapped "
                "under one name only, and by the other it would run without the highway. Register it once."
            )
        seen[id(found.module)] = found.target


def check_exit(model: nn.Module, found: Exit) -> None:
    """Refuse an exit that has nothing to adapt, or that somebody else has already changed."""
    for method in found.family.methods:
        own = vars(found.module).get(method)
        if own is not None and not isinstance(own, AdaptedMethod):
            raise ValueError(
                f"{found.target}: {type(found.module).__name__} has a {method} of its own on the instance, which the "
                "adapted one would replace. Remove it, or make a subclass with it."
            )
    if not any(found.site.depth):
        raise ValueError(
            f"{found.target}: the deepest output that is asked for is the stem, in front of every block, so there is "
            "nothing to adapt. Ask the backbone for a deeper stage (out_features)."
        )
    stages = found.family.stages(found.module)
    blocks = [block for stage in stages for block in stage.blocks]
    for block in blocks:
        found.family.tap_points(found.module, block)
    own = guard_of(model)
    if not any(layer.exit is found.module and layer.owner is own for layer in layers_of(model)) and any(
        isinstance(hook, Hook)
        for block in blocks
        for part in found.module.get_submodule(block).modules()
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    ):
        raise ValueError(
            f"{found.target}: blocks of this {type(found.module).__name__} are adapted already, in another model or "
            "backbone that shares them. Give each a backbone of its own (copy.deepcopy), or unload() the other one."
        )
    for name, module in ((part, module) for part in found.parts for part, module in named(model, part)):
        if isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"{name} is already adapted by {type(module).__name__}. E3VA sends no gradient into the "
                "backbone, so that adapter would never train. unload() or merge it first."
            )


def check_highway_size(model: nn.Module, found: Exit, config: E3VAConfig) -> None:
    """Refuse a highway that would take more room than anybody means, before it is built."""
    stages = zip(found.family.stages(found.module), found.site.depth, strict=False)
    width, blocks = max((stage.width, depth) for stage, depth in stages)
    size = blocks * 2 * config.r * (width + max(1, round(config.bottleneck_ratio * width)))
    own = sum(p.numel() for name in found.parts for p in dict(base_modules(model))[name].parameters())
    if size > max(_MOST_PARAMETERS, _MOST_SHARE * own):
        raise ValueError(
            f"r={config.r}, bottleneck_ratio={config.bottleneck_ratio}: the highway would have more than {size:.1e} "
            f"parameters beside {own:.1e} of the backbone {found.target}. Lower them; the paper's has r=16 and 0.5."
        )


def check_merging(found: Exit) -> None:
    """Refuse patch merging by layers of bitsandbytes that round activations as well: the lane passes through it."""
    mergings = {
        name: found.module.get_submodule(name) for s in found.family.stages(found.module) for name in s.merging
    }
    rounding = [name for name, module in mergings.items() if any(hasattr(p, "SCB") for p in module.parameters())]
    names = [child(found.name, name) for name in rounding]
    if names:
        raise ValueError(
            f"load_in_8bit=True: bitsandbytes rounds what enters the patch merging {names}, and the lane, which "
            f"passes through, would drown in that. Add llm_int8_skip_modules={names} to the BitsAndBytesConfig, or "
            "use load_in_4bit=True or a TorchAoConfig: only weights are rounded there."
        )


def check_offloaded(model: nn.Module, exits: list[Exit], saved: list[str]) -> None:
    """Refuse to adapt what accelerate has offloaded: it has no weights to copy, and no device for a highway."""
    parts = [*(part for found in exits for part in found.parts), *saved]
    names = [name for part in parts for name, module in named(model, part) if is_offloaded(module)]
    if names:
        raise ValueError(
            f"device_map: {len(names)} modules ({', '.join(names[:2])}, ...) are offloaded to the CPU or disk, where "
            "E3VA can neither copy them nor train beside them. Give them a device (device_map={'': 0}, a larger "
            "max_memory) or load fewer bits (quantization_config); for inference, adapt the model first and then "
            "offload it (accelerate.cpu_offload)."
        )


def check_label_count(model: nn.Module, config: E3VAConfig, exits: list[Exit]) -> None:
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


def check_nesting(model: nn.Module, names: list[str]) -> None:
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


def check_saved_module(name: str, module: nn.Module, exits: list[Exit]) -> None:
    """Refuse to save and train what is inside the frozen region, holds it, or cannot be wrapped."""
    for found in exits:
        if found.contains(name) and name not in found.tail:
            raise ValueError(
                f"modules_to_save={name!r}: is inside the frozen backbone, where no gradient enters, so it would "
                f"never train. Of {found.target}, only {sorted(found.tail) or 'nothing'} can be trained whole; beside "
                "it, anything."
            )
        if found.is_within(name):
            raise ValueError(
                f"modules_to_save={name!r}: contains the frozen backbone {found.target}. Name its other parts."
            )
    if isinstance(module, CONTAINERS):
        parts = [child(name, key) for key, _ in module.named_children()]
        raise ValueError(
            f"modules_to_save={name!r}: is a {type(module).__name__}, which PEFT cannot wrap. Name {parts}."
        )


def check_quantized(model: nn.Module, names: list[str]) -> None:
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


def check_suffixes(model: nn.Module, exits: list[Exit], names: list[str]) -> None:
    """Refuse a name that by PEFT's rule, `endswith`, would also mean another module outside the backbone."""
    unused = {name for found in exits for name in found.site.unused}
    for key, module in base_modules(model):
        inside = any(key == name or key.startswith(f"{name}.") for name in names)
        if inside or key in unused or not learns(module) or any(found.contains(key) for found in exits):
            continue
        for name in names:
            if key.endswith(name):
                raise ValueError(
                    f"modules_to_save={name!r}: PEFT matches these names by their ending, so this would also mean "
                    f"{key!r}. Name both, leave modules_to_save out to train everything outside the backbone, or "
                    f"rename the attribute {name!r} of your model."
                )


def backbone_fingerprint(
    model: nn.Module, adapter_name: str, saved: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Note the frozen weights that an adapter reads.

    Args:
        model: The adapted model.
        adapter_name: The adapter.
        saved: See `fingerprint.described`.

    Returns:
        See `fingerprint.noted`.
    """
    layers = [layer for layer in layers_of(model) if adapter_name in layer.adapters()]
    if has_units(model):
        return None
    parts = [frozen_weights(layer) for layer in layers]

    def sum_of(kind: str) -> str:
        sums = [_remembered(layer, part, kind) for layer, part in zip(layers, parts, strict=True)]
        return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()

    return noted(sum_of, [pair for part in parts for pair in part], saved)


def outside_fingerprints(
    model: nn.Module, config: E3VAConfig, saved: Mapping[str, Any] | None = None
) -> dict[str, dict[str, str]]:
    """Note the parameters beside the backbone that an adapter neither brings nor trains, such as a head.

    Args:
        model: The adapted model.
        config: The adapter's.
        saved: An earlier result that it is compared with.

    Returns:
        Module -> see `fingerprint.described`; without those that are not all at hand as plain tensors.
    """
    if has_units(model):
        return {}
    base = base_of(model)
    found = unsaved_outside(base, config.target_modules or (), config.modules_to_save or ())
    return {
        name: described(partial(tensors_checksum, tensors), tensors, None if saved is None else saved[name])
        for name, tensors in found.items()
        if are_plain(tensors) and (saved is None or name in saved)
    }


def base_fingerprint(model: PeftModel, saved: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Note the frozen parameters below the adapter of another of PEFT's methods, such as LoRA.

    Args:
        model: The adapted model.
        saved: See `fingerprint.described`.

    Returns:
        See `backbone_fingerprint`; once the model is sharded, what was noted before.
    """
    base = model.get_base_model()
    unused = tuple(f"{name}." for found in find_exits(base) for name in found.site.unused)
    own = (str(model.base_model.prefix), "modules_to_save.", "original_module.")
    frozen = [
        (name, parameter)
        for name, parameter in base.named_parameters()
        if not name.startswith(unused) and not any(part in name for part in own)
    ]
    note = noted(partial(_remembered, base, frozen), frozen, saved)
    if saved is None:
        note = base.__dict__["_noted_base"] = note or base.__dict__.get("_noted_base")
    return note


def _remembered(layer: nn.Module, weights: Sequence[tuple[str, Tensor]], kind: str) -> str:
    """Return a checksum of a module's frozen weights, computed again only where one moved or was written.

    What is written by `.data` is known by a sample of its values.
    """
    state = tuple(
        (tensor.data_ptr(), None if tensor.is_inference() else tensor._version, _sample(tensor))
        for _, tensor in weights
    )
    known: Any = layer.__dict__.get("_fingerprint")
    if known is None or known[0] != state or any(version is None for _, version, _ in state):
        known = layer.__dict__["_fingerprint"] = (state, {})
    sums: dict[str, str] = known[1]
    if kind not in sums:
        sums[kind] = checksum(weights, kind)
    return sums[kind]


def _sample(tensor: Tensor) -> float:
    return float(tensor.detach().flatten()[:: max(1, tensor.numel() // 64)].double().sum())


def check_backbone(saved: Mapping[str, Any], model: nn.Module, adapter_name: str, name: str) -> None:
    """Refuse an adapter whose backbone was another one. See `check_fingerprint`.

    Args:
        saved: What `backbone_fingerprint` noted when the adapter was saved.
        model: The model that it is loaded into.
        adapter_name: Its name there.
        name: What its base was called.
    """
    place = "backbone from auto_mapping in its adapter_config.json"
    if not will_be_sharded():  # then processes may have no weights yet
        check_fingerprint(saved, backbone_fingerprint(model, adapter_name, saved), name, place)


def check_outside(saved: Mapping[str, Any], model: nn.Module, config: E3VAConfig, to_train: bool = False) -> None:
    """Refuse a model whose head, or what else the adapter does not bring, is another than it was trained with.

    It is a warning where transformers has another version, which may have given weights another layout. What cannot be
    compared, or is not in this model at all, passes.

    Args:
        saved: What `outside_fingerprints` noted when the adapter was saved.
        model: The model that it is loaded into.
        config: The adapter's, as it is loaded.
        to_train: It may well get another head then: a warning.

    Raises:
        ValueError: Some module beside the backbone has other values.
    """
    if not saved or will_be_sharded():  # then processes may have no weights yet
        return
    found = outside_fingerprints(model, config, saved)
    other = {name: sums for name, now in found.items() if (sums := _other_sums(saved[name], now))}
    if not other:
        return
    first, (before, after) = next(iter(other.items()))
    known, now = saved[first], found[first]
    message = (
        f"the adapter does not bring {list(other)}, because its modules_to_save leaves them out, and was trained "
        f"beside other values of them: {first} had the SHA-256 {before} (transformers {known.get('transformers')}), "
        f"and has {after} (transformers {now['transformers']}). Perhaps they are random, because the base model has "
        "no weights for them."
    )
    if to_train or known.get("transformers") != now["transformers"]:
        warnings.warn(message, stacklevel=2)
        return
    raise ValueError(
        f"{message} Load them into the model first, or train with them in modules_to_save. If these are meant, remove "
        "outside from auto_mapping in its adapter_config.json."
    )


def check_fingerprint(saved: Mapping[str, Any], found: Mapping[str, Any] | None, name: str, place: str) -> None:
    """Refuse an adapter whose frozen weights were others.

    Weights in fp32 on one side and rounded on the other are compared as they are rounded, and quantised ones by norms
    and biases, which are not. Where they were rounded in two ways they cannot be, and where transformers has another
    version it may have given the same weights other names: these are warnings.

    Args:
        saved: What was noted when the adapter was saved.
        found: The same of the model that it is loaded into, to be compared with `saved`.
        name: What its base was called.
        place: What to remove from which file if the model is meant.

    Raises:
        ValueError: The frozen weights are others.
    """
    if found is None:
        return
    if "dtype" not in found:  # quantised weights on one side
        saved, found = saved[VECTORS], found[VECTORS]
    if found.keys().isdisjoint(KINDS) and KINDS.keys() <= saved.keys():  # which one of an early version has not
        warnings.warn(
            f"the adapter was trained on weights of {name!r} in {saved.get('dtype')}, and this model has them in "
            f"{found['dtype']}: whether they are the same cannot be told. Load the base in the former to compare.",
            stacklevel=2,
        )
    sums = _other_sums(saved, found)
    if sums is None:
        return
    message = (
        f"the adapter was trained on the backbone weights {sums[0]} of {name!r} (SHA-256, transformers "
        f"{saved.get('transformers')}), and this model has {sums[1]} (transformers {found['transformers']}): it would "
        "read other features than it learned from."
    )
    if saved.get("transformers") != found["transformers"]:
        warnings.warn(f"{message} If only the versions differ, save it again with this one.", stacklevel=2)
        return
    raise ValueError(f"{message} Load it onto the base that it was trained on. If this one is meant, remove {place}.")


def _other_sums(saved: Mapping[str, Any], found: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the beginnings of both checksums where weights are known to be others than those that were noted."""
    sums = [(str(saved.get(kind))[:_SHOWN], found[kind][:_SHOWN]) for kind in KINDS if kind in found]
    return next(((before, after) for before, after in sums if before != after), None)
