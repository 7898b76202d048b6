"""What the highway has to know about a family of backbones, as one small class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

if TYPE_CHECKING:
    from e3va_peft.highway import Lane


@dataclass(frozen=True)
class TapPoint:
    """Where a branch can be read: the output of `module`, or its first input.

    Attributes:
        module: What is read.
        read: Which side of it.
        branch: Module that computes the branch from its normed input, where `module` only ends it. Baselines that run
            beside a branch need it, the highway does not.
    """

    module: nn.Module
    read: Literal["input", "output"] = "output"
    branch: nn.Module | None = None


@dataclass(frozen=True)
class StageSpec:
    """One stage: blocks of one width.

    Attributes:
        width: Channels C.
        blocks: For each block its tap points, by tap name (`"attention"`, `"mlp"`).
        merging: The frozen downsampling behind the stage, called as `merging(x, ...)`, or None.
    """

    width: int
    blocks: tuple[Mapping[str, TapPoint], ...]
    merging: nn.Module | None = None


@dataclass(frozen=True)
class Site:
    """What surrounds an exit in a given model; names are relative to the root model.

    Attributes:
        depth: Blocks to adapt in each stage, up to the deepest output that anything asks for.
        frozen: Modules before the exit that belong to the frozen stream (the embeddings).
        norms: Output norms that are applied to what leaves the exit. They are trained.
        unused: Modules beside the exit whose result nobody reads. They stay frozen.
    """

    depth: tuple[int, ...]
    frozen: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


class Backbone(ABC):
    """A family of backbones. Subclass it, then `register_backbone(YourFamily())`.

    Attributes:
        name: The family's name, as in the list of supported backbones.
        exit_classes: Class names of the *exit*: the smallest module that holds the whole loop over the blocks and
            returns the finished output. Names and not classes, so that nothing of transformers is imported.
        tail: Names of the modules inside the exit that run behind the last block, in their order, the output norm
            first. They run again with gradient; the first one's input must be the last block's output.
    """

    name: ClassVar[str]
    exit_classes: ClassVar[tuple[str, ...]]
    tail: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def stages(self, exit: nn.Module) -> tuple[StageSpec, ...]:
        """Describe the stages of an exit, in the order in which they run."""

    @abstractmethod
    def site(self, exit: nn.Module, name: str, ancestors: Sequence[tuple[str, nn.Module]]) -> Site:
        """Describe what surrounds an exit.

        Args:
            exit: The exit.
            name: Its name in the model.
            ancestors: (name, module) from the root, whose name is "", down to the exit's parent.
        """

    @abstractmethod
    def splice(self, outputs: Any, run: Run) -> Any:
        """Write the lane into every output of the exit that a head can read, and return the outputs.

        Args:
            outputs: The exit's `ModelOutput`, all of it frozen.
            run: The lane, at the beginning, and what belongs to this call.
        """


@dataclass(frozen=True)
class Run:
    """One forward of an adapted exit, between the frozen stream and its outputs.

    Attributes:
        exit: The exit.
        lane: The lane, to be advanced in the order of stages and blocks.
        depth: Blocks that were adapted in each stage (`Site.depth`).
        tail: The modules named in `Backbone.tail`, trained copies where there are any.
        tail_input: What entered the first of them, (B, N, C); empty without a tail.
        kwargs: Keyword arguments of the exit's call, which may decide what an output is.
    """

    exit: nn.Module
    lane: Lane
    depth: tuple[int, ...]
    tail: Mapping[str, nn.Module]
    tail_input: Tensor
    kwargs: Mapping[str, Any]


def add(x: Tensor, z: Tensor) -> Tensor:
    """Add the lane to a frozen tensor of the same shape, in the frozen tensor's dtype."""
    return (x + z).to(x.dtype)


def in_own_dtype(module: nn.Module, x: Tensor) -> Tensor:
    """Run a module in the dtype of its parameters (PEFT keeps trained copies in fp32) and return x's dtype."""
    dtype = next((p.dtype for p in module.parameters()), x.dtype)
    return module(x.to(dtype)).to(x.dtype)


def child(parent: str, name: str) -> str:
    """Name of a child module, `parent.name`, also below the root, whose name is empty."""
    return f"{parent}.{name}" if parent else name


def is_a(module: nn.Module, *class_names: str) -> bool:
    """Whether a module's class or one of its bases has one of these names."""
    return any(cls.__name__ in class_names for cls in type(module).__mro__)


def deepest_output(backbone: nn.Module) -> int:
    """Index of the deepest feature map that a transformers backbone returns, 0 being the stem."""
    return max(list(backbone.stage_names).index(name) for name in backbone.out_features)  # type: ignore[arg-type,union-attr]


def splice_hidden_states(outputs: Any, run: Run) -> None:
    """Splice the hidden states of a plain vision transformer: state l is `x_l` plus the lane behind block l.

    Hidden states that nobody asked for are None and are left out, and so are those behind the last adapted block.
    """
    if outputs.hidden_states is None:
        return
    hidden = list(outputs.hidden_states)
    for block in range(1, run.depth[0] + 1):
        if hidden[block] is not None:
            hidden[block] = add(hidden[block], run.lane.advance(block))
    outputs.hidden_states = tuple(hidden)
