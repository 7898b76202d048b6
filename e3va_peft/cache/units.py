"""The frozen pass of a model without a highway: what its frozen blocks return."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from e3va_peft.backbones import child
from e3va_peft.exits import CONTAINERS, Exit, find_exits
from e3va_peft.fingerprint import checksum, config_checksum
from e3va_peft.recompute import forwards_replaced
from e3va_peft.replay import Captured, Tree


class Returned(NamedTuple):
    """The outputs of units without their tensors: the same for all images of one size.

    Attributes:
        trees: Name of a unit -> its outputs.
    """

    trees: Mapping[str, Tree]

    def given(self, model: nn.Module, tensors: Mapping[str, Tensor], batch: int) -> AbstractContextManager[None]:
        """Return a context in which the units return recorded tensors; NaN stands for those that are not given."""
        device, instead = next(iter(tensors.values())).device, {}
        for name, tree in self.trees.items():
            leaves = [
                tensors.get(place(name, i), leaf.unknown(batch, device)) for i, leaf in enumerate(tree.leaves)
            ]  # fmt: skip
            instead[model.get_submodule(name)] = partial(_return, tree.fill(leaves))
        return forwards_replaced(instead)


class Pass(NamedTuple):
    """A frozen pass: tensors of the images, by name, and the rest."""

    tensors: dict[str, Tensor]
    blueprint: Returned


class Units:
    """The frozen modules of a model whose backbone gets no gradient but in its output norms, as in `head-only`.

    The units are the blocks, and what is frozen before and between them. A record holds those of their outputs on
    which the model's outputs depend; the backbone's own code around them, its output norms and the head run as ever.

    Args:
        model: The model.

    Raises:
        ValueError: It has no backbone that is known, or trains something else in it.
    """

    norm = "none"

    def __init__(self, model: nn.Module) -> None:
        exits = find_exits(model)
        if not exits:
            raise ValueError(
                f"model={type(model).__name__}: has no backbone that E3VA knows, so there is nothing to cache. See "
                "`e3va backbones`."
            )
        self.model, self.exits = model, exits
        for name, tensor in self.weights():
            if tensor.requires_grad:
                raise ValueError(
                    f"model={type(model).__name__}: trains {name}, so what its backbone says of an image changes. A "
                    "cache needs a frozen one: adapt it by get_peft_model(model, E3VAConfig()), or train the head "
                    "alone."
                )
        self.names = tuple(name for found in exits for name in _units(model, found))
        self.widths = [stage.width for found in exits for stage in found.family.stages(found.module)]
        self.needed: set[str] | None = None

    def capture(self, batch: Mapping[str, Any], known: Returned | None = None) -> Pass:
        """Run the model, in evaluation, and take down what its units return.

        Args:
            batch: Its arguments.
            known: The blueprint of images of this size: only what `read` found to be read is taken down then.

        Raises:
            ValueError: A unit's output does not split into images.
        """
        outputs: dict[str, Any] = {}

        def note(module: nn.Module, args: tuple[Any, ...], output: Any, name: str) -> None:
            outputs[name] = output
            if known is not None and self.needed is not None and self.needed <= outputs.keys():
                raise Captured  # the head does not need to run

        self.model.eval()
        with ExitStack() as stack:
            for name in self.names:
                hook = partial(note, name=name)
                stack.callback(self.model.get_submodule(name).register_forward_hook(hook).remove)
            stack.enter_context(suppress(Captured))
            self.model(**batch)
        count = len(next(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)))
        trees = {name: Tree.of(output, count) for name, output in outputs.items()}
        tensors = {
            place(name, i): leaf.detach()
            for name, output in outputs.items()
            for i, leaf in enumerate(tree_leaves(output))
            if isinstance(leaf, Tensor)
        }
        return Pass(tensors, Returned(trees))

    def read(self, taken: Pass, batch: Mapping[str, Any]) -> tuple[set[str], Any]:
        """Find out on which tensors of a frozen pass the model's outputs depend, in training and in evaluation.

        Args:
            taken: A frozen pass of a batch.
            batch: The batch; its images are not looked at.

        Returns:
            The tensors' names, and the model's outputs in evaluation, computed from these alone.
        """
        own = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in taken.tensors.items()}
        count = len(next(iter(own.values())))
        read = {name for name, x in own.items() if not x.requires_grad}
        asked = [name for name in own if name not in read]
        for training in (True, False):
            set_mode(self.model, training)
            with torch.enable_grad(), taken.blueprint.given(self.model, own, count), seeded():
                leaves = [x for x in tree_leaves(self.model(**batch)) if isinstance(x, Tensor) and x.requires_grad]
                ones = [torch.ones_like(leaf) for leaf in leaves]
                found = torch.autograd.grad(leaves, [own[name] for name in asked], ones, allow_unused=True)
            read |= {name for name, grad in zip(asked, found, strict=True) if grad is not None}
        names = taken.blueprint.trees
        self.needed = {name for name in names if any(place(name, i) in read for i in range(len(names[name].leaves)))}
        kept = {name: taken.tensors[name] for name in read}
        with taken.blueprint.given(self.model, kept, count), seeded():
            return read, self.model(**batch)

    def fingerprint(self) -> dict[str, Any]:
        """Everything of the backbone that decides what is in a record, by name."""
        return {
            "backbone": checksum(self.weights()),
            "config": [config_checksum(found.module) for found in self.exits],
            "family": [found.family.name for found in self.exits],
        }

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over what decides a frozen pass: the parameters and buffers of the frozen part, by name."""
        for found in self.exits:
            if found.family.methods:  # beside the modules of the stream stand a class token, positions
                yield from found.module.named_parameters(found.name, recurse=False)
            for part in found.parts:
                for name, tensor in self.model.get_submodule(part).state_dict(keep_vars=True).items():
                    if isinstance(tensor, Tensor) and not is_within(child(part, name), _trained(found)):
                        yield child(part, name), tensor


def place(name: str, leaf: int) -> str:
    """Name of a tensor among the outputs of a unit."""
    return f"output.{name}.{leaf}"


def _trained(found: Exit) -> tuple[str, ...]:
    """Names of the modules of a backbone that every method trains."""
    return (*found.site.norms, *found.tail)


def _units(model: nn.Module, found: Exit) -> Iterator[str]:
    """Iterate over the names of the largest frozen modules that hold no block and nothing trained, blocks included."""
    stages = found.family.stages(found.module)
    apart = {child(found.name, block) for stage in stages for block in stage.blocks} | set(_trained(found))

    def visit(name: str, module: nn.Module) -> Iterator[str]:
        if name in _trained(found):
            return
        if isinstance(module, CONTAINERS) or any(is_within(other, [name]) for other in apart - {name}):
            for key, item in module.named_children():
                yield from visit(child(name, key), item)
        elif any(True for _ in module.parameters()):
            yield name

    for part in found.parts:
        yield from visit(part, model.get_submodule(part))


def is_within(name: str, modules: Collection[str]) -> bool:
    """Whether a name is that of a module among some, or inside of one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _return(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output


def set_mode(model: nn.Module, training: bool) -> None:
    """Set a model's mode, without batch norms, which cannot train on one image."""
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Bring modes and buffers (running statistics of batch norms) back at the end of a `with` statement."""
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


@contextmanager
def seeded() -> Iterator[None]:
    """Draw the same random numbers within each such `with` statement, and leave those behind it as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
