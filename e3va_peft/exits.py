"""Where the exits of backbones are in a model, and what is outside of them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from e3va_peft.backbones import Backbone, Site, child, family_of
from e3va_peft.backbones.base import submodule
from e3va_peft.layer import METHOD_CHILD, E3VALayer

CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def base_of(model: Any) -> Any:
    """Return the model below a PEFT model's adapters; a model without any is its own."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@dataclass(frozen=True)
class Exit:
    """An exit that was found in a model.

    Attributes:
        name: Name of the exit; where it is a method, of the module whose method it is.
        module: The exit, or that module.
        family: Its family.
        site: Its surroundings.
    """

    name: str
    module: nn.Module
    family: Backbone
    site: Site

    @property
    def target(self) -> str:
        """Its name in `target_modules`: the module's, or `module.method`."""
        return child(self.name, self.family.methods[0]) if self.family.methods else self.name

    @property
    def place(self) -> str:
        """Name of the module that is, or will be, its layer."""
        return child(self.name, METHOD_CHILD) if self.family.methods else self.name

    @property
    def tail(self) -> dict[str, str]:
        """Full name -> own name of the modules inside the exit that may be trained."""
        present = [name for name in self.family.tail if learns(submodule(self.module, name))]
        return {child(self.name, name): name for name in present}

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the modules that make up the frozen stream."""
        return self.site.frozen if self.family.methods else (self.name, *self.site.frozen)

    def contains(self, name: str) -> bool:
        """Whether a module is inside the frozen stream."""
        return any(name == part or name.startswith(f"{part}.") for part in self.parts)

    def of_stream(self, name: str) -> bool:
        """Whether the parameters that sit directly on a module are of the frozen stream."""
        return self.contains(name) or (bool(self.family.methods) and name == self.name)

    def is_within(self, name: str) -> bool:
        """Whether the exit is a module or inside of it."""
        return not name or f"{self.name}.".startswith(f"{name}.")


def base_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the children of a module as they were before PEFT wrapped any, under each of their names."""
    for name, item in module._modules.items():
        if item is not None and not (isinstance(item, E3VALayer) and item.is_method):
            yield name, unwrap(item)


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside PEFT's wrappers for saved modules and inside ours for exits."""
    while True:
        if isinstance(module, E3VALayer):
            module = module.exit
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
        if family is None or any(not found.name or name.startswith(f"{found.name}.") for found in exits):
            continue
        exits.append(Exit(name, module, family, family.site(module, name, modules)))
    return exits


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
    skipped = {name for found in exits for name in (*found.parts, *found.site.unused, *found.tail)}
    skipped |= {name for found in exits if found not in chosen for name in found.site.norms}
    methods = {found.name for found in exits if found.family.methods}  # their module holds a head as well
    names: list[str] = []
    seen: dict[int, str] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        bare = [name for name, _ in module.named_parameters(recurse=False)]
        if bare and not isinstance(module, CONTAINERS) and prefix not in methods:
            warnings.warn(
                f"the parameters {bare} sit directly on {prefix or type(model).__name__}, beside the backbone, "
                "where PEFT cannot save them: they stay frozen. Put them into a module of their own to train them.",
                stacklevel=2,
            )
        for key, item in base_children(module):
            name = child(prefix, key)
            if name in skipped:
                continue
            if id(item) in seen:
                raise ValueError(
                    f"the module {seen[id(item)]!r} is registered again as {name!r}; PEFT can wrap it under one name "
                    "only, and the other would use the frozen original. Register it once, or give modules_to_save "
                    "without it."
                )
            if isinstance(item, CONTAINERS) or any(found.is_within(name) for found in exits):
                visit(name, item)
            elif learns(item):
                seen[id(item)] = name
                names.append(name)

    visit("", model)
    inside = [name for found in chosen for name in found.site.norms if name in found.tail]
    return names + inside


def trained_inside(model: nn.Module) -> list[nn.Parameter]:
    """Return the trained parameters inside a model's backbones, adapters included, but not behind the last block."""
    base = base_of(model)
    exits = find_exits(base)
    highways = tuple(f"{found.place}." for found in exits)
    tails = tuple(f"{name}." for found in exits for name in (*found.tail, child(found.place, "e3va_tail")))

    def is_inside(name: str) -> bool:
        of_stream = any(found.of_stream(name.rpartition(".")[0]) for found in exits)
        return (of_stream or name.startswith(highways)) and not name.startswith(tails)

    return [p for name, p in base.named_parameters() if p.requires_grad and is_inside(name)]


def unsaved_outside(model: nn.Module, targets: Collection[str], saved: Collection[str]) -> dict[str, list[Tensor]]:
    """Return the parameters of a base model that an adapter reads or feeds, and neither freezes as backbone nor saves.

    Args:
        model: The base model, wrapped or not.
        targets: Names of the exits that are adapted.
        saved: Names of the modules that the adapter saves.

    Returns:
        Name of the maximal module without such an exit -> its parameters, of a bare parameter its own.
    """
    present = find_exits(model)
    chosen = [found for found in present if found.target in targets]
    skipped = [*saved, *(name for found in present for name in found.site.unused)]
    groups: dict[str, list[Tensor]] = {}
    for prefix, module in base_modules(model):
        if any(prefix == name or prefix.startswith(f"{name}.") for name in skipped):
            continue
        if any(found.of_stream(prefix) for found in chosen):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            parts = child(prefix, key).split(".")
            names = (".".join(parts[: i + 1]) for i in range(len(parts)))
            name = next(name for name in names if not any(found.is_within(name) for found in chosen))
            groups.setdefault(name, []).append(parameter)
    return groups


def learns(module: nn.Module | None) -> bool:
    """Whether training changes a module: it has parameters, or running statistics (a loss's constants are neither)."""
    if module is None:
        return False
    return any(True for _ in module.parameters()) or any(hasattr(m, "running_mean") for m in module.modules())


def layers_of(model: nn.Module) -> list[E3VALayer]:
    """Return the layers of a model, one for each of its backbones."""
    return [module for module in model.modules() if isinstance(module, E3VALayer)]


def frozen_weights(layer: E3VALayer) -> list[tuple[str, Tensor]]:
    """Return the parameters and buffers that decide what a layer's frozen pass is, by name."""
    states = [module.state_dict(keep_vars=True) for module in (*layer.frozen, *layer.front.values())]
    if layer.is_method:  # beside the modules of the stream stand a class token, positions
        states.append(dict(layer.exit.named_parameters(recurse=False)))
    pairs = (pair for state in states for pair in state.items())
    return [(name, value) for name, value in pairs if "e3va_" not in name and isinstance(value, Tensor)]
