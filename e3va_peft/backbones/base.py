"""`Backbone`: the declaration of a family of backbones, with all that E3VA has to know about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from e3va_peft.frozen_pass import Grid
    from e3va_peft.lane import Lane

BLOCK = ("block",)  # one tap: the sum of a block's branches
STREAM = "stream"  # a tap of every family: what enters a block


@dataclass(frozen=True)
class Branch:
    """A branch of a block, read before its residual add.

    Attributes:
        path: Module, relative to the block.
        read: Its output, or its first input.
        computed_by: Module that computes the branch from its normed input, where `path` only ends it; None where no
            one module does. Methods that run beside a branch (AdaptFormer) need it, the highway does not.
    """

    path: str
    read: Literal["input", "output"] = "output"
    computed_by: str | None = ""


def in_turn(modules: Sequence[Callable[..., Any]], x: Tensor, grid: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Run modules one behind the other; the first gets all arguments. Of a tuple, the first is passed on."""
    for i, module in enumerate(modules):
        output = module(x) if i else module(x, *args, **kwargs)
        x = output[0] if isinstance(output, tuple) else output
    return x


def in_turn_channels_first(
    modules: Sequence[Callable[..., Any]], x: Tensor, grid: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """(B, H, W, C) -> (B, H', W', C'): the same for modules on maps (B, C, H, W)."""
    return in_turn(modules, x.movedim(-1, 1), grid, *args, **kwargs).movedim(1, -1)


def merge_two_by_two(
    modules: Sequence[Callable[..., Any]], x: Tensor, grid: Grid, *args: Any, **kwargs: Any
) -> Tensor:
    """(B, H W, C) -> (B, H/2 W/2, C'): join two by two tokens, as a Swin does, and run modules on them in turn.

    Values and gradients are, to the bit, those of the four strided slices that transformers takes. But the gradient of
    a slice is a whole map, mostly of zeros, where that of this one copy is a copy.
    """
    x = x.unflatten(1, (grid.height, grid.width))
    x = F.pad(x, (0, 0, 0, grid.width % 2, 0, grid.height % 2)) if grid.width % 2 or grid.height % 2 else x
    pairs = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, 2, W/2, 2, C)
    return in_turn(modules, pairs.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2), grid)


@dataclass(frozen=True)
class Merging:
    """The frozen downsampling between two stages.

    Attributes:
        paths: Its modules in the order in which they run, relative to the exit; `{stage}` is the stage in front of it,
            `{next}` the one behind. The stream enters the first as its first argument and leaves the last.
        run: (modules, x, grid, *args, **kwargs) -> Tensor: does the same outside of the backbone, on x with its
            channels last; grid is that of the stage in front. `None` runs the modules in turn.
        parts: Names, like `paths`, of the modules that `run` is given, where it shall do by itself what the first of
            `paths` does between its own; empty: those of `paths`.
        forward: With parts, the qualified name of the method that `run` stands for: a module with another `forward`
            runs as it is.
    """

    paths: tuple[str, ...]
    run: Callable[..., Tensor] | None = None
    parts: tuple[str, ...] = ()
    forward: str = ""


@dataclass(frozen=True)
class Host:
    """Surroundings of an exit. Paths are relative to the exit: `../embeddings` is a module beside it.

    Attributes:
        classes: Qualified names of the class at `path`; none: any.
        path: An ancestor of the exit that tells which host this is.
        frozen: Modules before the exit that belong to the frozen stream.
        norms: Output norms of what leaves the exit, which are trained; `{feature}` stands for each of the host's
            `out_features`.
        unused: Modules beside the exit whose result nobody reads; `*` stands for any child. They stay frozen.
        cuts: The host returns no stage (no block, of one stage) behind the deepest of its `out_features`.
        norms_if: Whether the norms are used, of the module at `path`; otherwise they are unused.
    """

    classes: tuple[str, ...] = ()
    path: str = ".."
    frozen: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    cuts: bool = False
    norms_if: Callable[[Any], bool] = lambda host: True


@dataclass(frozen=True)
class GridSource:
    """Facts that are known where the first block of a stage is called.

    Attributes:
        args: The block's positional arguments; the first is the stream.
        image: (H, W) of the image that the backbone was given, where its frozen part saw it.
        exit: The exit.
        prefix: Tokens in front of those of the image.
    """

    args: tuple[Any, ...]
    image: tuple[int, int] | None
    exit: nn.Module
    prefix: int


def second_argument(source: GridSource) -> tuple[int, int]:
    """Take the grid (H, W) from a block's second argument."""
    height, width = source.args[1]
    return height, width


def map_size(source: GridSource) -> tuple[int, int]:
    """Take the grid from a stream that is a map, (B, H, W, C) here."""
    return source.args[0].shape[1], source.args[0].shape[2]


def patches(source: GridSource) -> tuple[int, int]:
    """Work the grid of a plain vision transformer out of the image, or take it as square where none was seen."""
    tokens = source.args[0].shape[1] - source.prefix
    if source.image is None:
        side = round(tokens**0.5)
        return side, tokens // side
    height, width = source.image
    rows = round((tokens * height / width) ** 0.5)
    if rows and tokens % rows == 0:
        return rows, tokens // rows
    shapes = [(r, tokens // r) for r in range(1, tokens + 1) if tokens % r == 0]  # patches that are not square
    return min(shapes, key=lambda shape: abs(math.log(shape[0] * width / (shape[1] * height))))


@dataclass(frozen=True)
class TapPoint:
    """Where a branch is read in a given block.

    Attributes:
        module: The module.
        read: Which side of it.
        branch: Module that computes the branch from its normed input; None where no one module does.
    """

    module: nn.Module
    read: Literal["input", "output"]
    branch: nn.Module | None


@dataclass(frozen=True)
class StageSpec:
    """One stage of a given exit: blocks of one width.

    Attributes:
        width: Channels C.
        blocks: Names of its blocks, relative to the exit.
        merging: Names of the modules of the downsampling behind it, none where there is none.
        merging_parts: Names of those that `Merging.run` is given, where it is others.
    """

    width: int
    blocks: tuple[str, ...]
    merging: tuple[str, ...] = ()
    merging_parts: tuple[str, ...] = ()


def adapted_blocks(stages: Sequence[StageSpec], depth: Sequence[int]) -> dict[str, int]:
    """Return the blocks to adapt, in the order in which they run: name relative to the exit -> stage."""
    pairs = zip(stages, depth, strict=False)
    return {name: i for i, (stage, blocks) in enumerate(pairs) for name in stage.blocks[:blocks]}


@dataclass(frozen=True)
class Site:
    """Surroundings of an exit in a given model; names are relative to the root model.

    Attributes:
        depth: Blocks to adapt in each stage, up to the deepest output that anything asks for.
        frozen: Modules before the exit, or for an exit that is a method in its module, that belong to the stream.
        norms: Output norms of what leaves the exit. They are trained.
        unused: Modules beside the exit whose result nobody reads. They stay frozen.
    """

    depth: tuple[int, ...]
    frozen: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExitCall:
    """One call of an adapted exit, between the frozen pass and its outputs.

    Attributes:
        exit: The exit, or the module whose method it is.
        method: The method; "" where the exit is the whole module.
        depth: Blocks that are adapted in each stage (`Site.depth`).
        tail: The modules named in `Backbone.tail`, trained copies where there are any.
        tail_input: Input of the first of them, (B, N, C); None without a tail.
        args: Positional arguments of the call.
        kwargs: Keyword arguments, which may decide what an output is.
        ends: Stage -> what entered the module at its end (`Backbone.ends`), channels last; empty without such modules.
    """

    exit: nn.Module
    method: str
    depth: tuple[int, ...]
    tail: Mapping[str, nn.Module]
    tail_input: Tensor | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    ends: Mapping[int, Tensor] = field(default_factory=dict)


def asked_for(call: ExitCall) -> bool:
    """Whether a transformers encoder shows its hidden states; also where that might be an argument by position."""
    config = getattr(call.exit, "config", None)
    asked = call.kwargs.get("output_hidden_states", getattr(config, "output_hidden_states", True))
    return bool(asked) or len(call.args) > 2


def no_change(call: ExitCall) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return the arguments of a call as they are."""
    return call.args, call.kwargs


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A family of backbones. Declare one, then `register_backbone(it)`; `check_backbone` tries it.

    The *exit* is the smallest module, or method of a module, that holds the whole loop over the blocks and returns the
    finished output. Classes are named by their qualified name, `package.module.Class`, so that nothing is imported;
    a subclass is of its base's family.

    Attributes:
        name: The family's name, as in the list of supported backbones.
        about: A few words about it, for that list.
        exits: Qualified names of the exit's classes.
        methods: Where the exit is a method of such a class: its names; each of them is adapted.
        blocks: Pattern of the blocks' names relative to the exit: `layers.{stage}.blocks.{block}`, or, of one stage,
            `layers.{block}`.
        width: Name of a norm in a block, whose size is the stage's width C.
        branches: Branches of a block, in the order in which they run: name -> where to read it.
        tap_norm: How adapters read a tap where `E3VAConfig.tap_norm` is None.
        tokenwise: Name of the module in a block that maps each token (..., C) by itself and widens it on the way, its
            MLP: a second run of the backbone gives it a part of the tokens at a time. "" where no one module does.
        merging: The downsampling between stages.
        channels: Where the channels of the stream are: *last* in (B, N, C) and (B, H, W, C), *first* in (B, C, H, W).
        prefix: Tokens in front of those of the image, of an exit.
        grid: Rows and columns of the image's tokens in a stage.
        frozen: Where the exit is a method: the frozen modules of its class that run before the tail.
        tail: Names of the modules inside the exit that run behind the last block, in their order, the output norm
            first. They run again with gradient; the first one's input must be the last block's output.
        ends: Where each stage ends in a norm inside the exit, so that outputs are behind it: its name,
            `stages.{stage}.layer_norm`. It stays frozen; what enters it must be the output of the stage's last block,
            and is there for the splice, which runs it again (`ExitCall.ends`).
        hosts: Surroundings of the exit, by the class of an ancestor. The first that fits is taken.
        shown: Whether the outputs of a call show the lane of stages before the last. It is kept for them, which takes
            memory; a splice that asks for it where it is not is refused.
        onto: Whether the splice writes the lane of these stages by `Lane.onto` alone, where patch merging has made the
            sum. Merging must not need what enters it or its output in backward: heads may change them in place.
        prepare: call -> (args, kwargs) of the frozen run, where the splice needs other outputs than were asked for.
        splice: (outputs, lane, call) -> a copy of the outputs with the lane in each that a head can read.
    """

    name: str
    about: str
    exits: tuple[str, ...]
    blocks: str
    width: str
    branches: Mapping[str, Branch]
    splice: Callable[[Any, Lane, ExitCall], Any]
    methods: tuple[str, ...] = ()
    tap_norm: str = "layer"
    tokenwise: str = ""
    merging: Merging | None = None
    channels: Literal["last", "first"] = "last"
    prefix: Callable[[Any], int] = lambda exit: 0
    grid: Callable[[GridSource], tuple[int, int]] = patches
    frozen: tuple[str, ...] = ()
    tail: tuple[str, ...] = ()
    ends: str = ""
    hosts: tuple[Host, ...] = field(default=(Host(),))
    shown: Callable[[ExitCall], bool] = asked_for
    onto: bool = False
    prepare: Callable[[ExitCall], tuple[tuple[Any, ...], Mapping[str, Any]]] = no_change

    def __reduce__(self) -> tuple[Callable[[str], Backbone], tuple[str]]:
        """Copy and pickle as the registered family of this name, because functions do not pickle."""
        return _registered, (self.name,)

    def taps(self, chosen: Sequence[str] | None) -> tuple[str, ...]:
        """Return the taps of a block in the order in which they run; all branches where none are chosen.

        Raises:
            ValueError: This family has no such branch.
        """
        if chosen is None:
            return tuple(self.branches)
        if tuple(chosen) == BLOCK:
            return BLOCK
        if unknown := sorted(set(chosen) - {STREAM, *self.branches}):
            raise ValueError(
                f"taps={tuple(chosen)!r}: {unknown} is not a branch of a {self.name} block. Choose among "
                f"{tuple(self.branches)} and {STREAM!r}, what enters the block, or {BLOCK}, the branches' sum; None "
                "means all branches."
            )
        return tuple(name for name in (STREAM, *self.branches) if name in chosen)

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is an exit of this family: of one of its classes, and with blocks where it has them."""
        return is_a(module, *self.exits) and bool(self._existing(module, "{stage}", self._first_blocks))

    @property
    def _first_blocks(self) -> str:
        return self.blocks.replace("{block}", "0")

    def stages(self, exit: nn.Module) -> tuple[StageSpec, ...]:
        """Describe the stages of an exit, in the order in which they run.

        Raises:
            ValueError: The exit is not laid out as declared.
        """
        found = []
        for stage in range(len(self._existing(exit, "{stage}", self._first_blocks))):
            pattern = self.blocks.replace("{stage}", str(stage))
            blocks = tuple(self._existing(exit, "{block}", pattern))
            norm: Any = submodule(exit, f"{blocks[0]}.{self.width}")
            if norm is None:
                raise ValueError(
                    f"{blocks[0]} ({type(exit.get_submodule(blocks[0])).__name__}): has no {self.width}, where the "
                    f"family {self.name!r} expects a norm. E3VA does not know this variant of the block."
                )
            if self.ends and submodule(exit, end := self.ends.format(stage=stage)) is None:
                raise ValueError(
                    f"{type(exit).__name__}: has no {end}, where the family {self.name!r} expects the end of a stage. "
                    "E3VA does not know this variant of the backbone."
                )
            found.append(StageSpec(norm.weight.shape[0], blocks, *self._merging(exit, stage)))
        return tuple(found)

    def _merging(self, exit: nn.Module, stage: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the modules of the downsampling behind a stage, and of those that `run` is given."""
        if self.merging is None:
            return (), ()
        paths, parts = (
            tuple(name.format(stage=stage, next=stage + 1) for name in names)
            for names in (self.merging.paths, self.merging.parts)
        )
        if any(submodule(exit, name) is None for name in paths):
            return (), ()
        module = exit.get_submodule(paths[0])
        forward = type(module).forward
        as_known = f"{forward.__module__}.{forward.__qualname__}" == self.merging.forward
        return paths, parts if as_known and "forward" not in vars(module) else ()  # there: patched, or with hooks

    def _existing(self, exit: nn.Module, hole: str, pattern: str) -> list[str]:
        """Return the names that a pattern gives with 0, 1, ... in its hole, as far as there are such modules."""
        names: list[str] = []
        while submodule(exit, name := pattern.replace(hole, str(len(names)))) is not None:
            names.append(name)
            if hole not in pattern:
                break
        return names

    def tap_points(self, exit: nn.Module, block: str) -> dict[str, TapPoint]:
        """Find where each branch of a block is read.

        Raises:
            ValueError: The block is not laid out as declared.
        """
        points = {}
        for name, branch in self.branches.items():
            module = submodule(exit, f"{block}.{branch.path}")
            if module is None:
                raise ValueError(
                    f"{block} ({type(exit.get_submodule(block)).__name__}): has no {branch.path}, where the family "
                    f"{self.name!r} reads its {name}. E3VA does not know this variant of the block."
                )
            computed_by = submodule(exit, f"{block}.{branch.computed_by}") if branch.computed_by else module
            points[name] = TapPoint(module, branch.read, None if branch.computed_by is None else computed_by)
        return points

    def runner(self, stage: StageSpec) -> tuple[tuple[str, ...], Callable[..., Tensor]]:
        """Return the names of the modules that run the merging behind a stage apart from it, and what runs them."""
        default = in_turn if self.channels == "last" else in_turn_channels_first
        if self.merging is None or (self.merging.parts and not stage.merging_parts):
            return stage.merging, default
        return stage.merging_parts or stage.merging, self.merging.run or default

    def site(self, exit: nn.Module, name: str, modules: Mapping[str, nn.Module]) -> Site:
        """Describe what surrounds an exit.

        Args:
            exit: The exit, or the module whose method it is.
            name: Its name in the model, whose own is "".
            modules: All modules of the model, by name.
        """
        depth = tuple(len(stage.blocks) for stage in self.stages(exit))
        inside = tuple(child(name, own) for own in self.frozen if submodule(exit, own) is not None)
        tail_norm = tuple(child(name, own) for own in self.tail[:1])
        for host in self.hosts:
            at = resolve_path(name, host.path)
            module = modules.get(at) if at is not None else None
            if module is None or (host.classes and not is_a(module, *host.classes)):
                continue
            if host.cuts:
                deepest = deepest_output(module)
                depth = (min(deepest, depth[0]),) if len(depth) == 1 else depth[:deepest]
            norms = tuple(expand_path(name, path, module, modules) for path in host.norms)
            flat = tuple(norm for group in norms for norm in group)
            unused = tuple(n for path in host.unused for n in expand_path(name, path, module, modules))
            if not host.norms_if(module):
                flat, unused = (), (*unused, *flat)
            frozen = tuple(n for path in host.frozen for n in expand_path(name, path, module, modules))
            return Site(depth, (*inside, *frozen), (*flat, *tail_norm), tuple(n for n in unused if n not in flat))
        return Site(depth, inside, tail_norm)


def _registered(name: str) -> Backbone:
    from e3va_peft.backbones import registered_backbones

    known = registered_backbones()
    if name not in known:
        raise KeyError(f"{name!r}: no such family here. Call register_backbone with its Backbone before unpickling.")
    return known[name]


def child(parent: str, name: str) -> str:
    """Name of a child module, `parent.name`, also below the root, whose name is empty."""
    return f"{parent}.{name}" if parent else name


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """Return a module by its path, also through what `torch.compile` wrapped, or None where there is none."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def resolve_path(name: str, path: str) -> str | None:
    """Resolve a path that is relative to the module `name`; None where it leads above the root."""
    parts = name.split(".") if name else []
    for step in path.split("/"):
        if step == "..":
            if not parts:
                return None
            parts.pop()
        else:
            parts += step.split(".")
    return ".".join(parts)


def expand_path(name: str, path: str, host: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Iterate over the names of existing modules that a path of a `Host` means."""
    features = getattr(host, "out_features", ()) if "{feature}" in path else ("",)
    for feature in features:
        at = resolve_path(name, path.replace("{feature}", feature))
        if at is None:
            continue
        parent = at.removesuffix(".*")
        if parent in modules:
            yield from [at] if parent == at else [child(parent, key) for key in modules[parent]._modules]


def is_a(module: nn.Module, *names: str) -> bool:
    """Whether a module's class or one of its bases has one of these qualified names."""
    return not _names(type(module)).isdisjoint(names)  # type: ignore[arg-type]  # mypy asks the instances for a hash


@cache
def _names(cls: type[Any]) -> frozenset[str]:
    """The qualified names of a class and of its bases."""
    return frozenset(f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)


def deepest_output(backbone: nn.Module) -> int:
    """Index of the deepest feature map that a transformers backbone returns, 0 being the stem."""
    return max(list(backbone.stage_names).index(name) for name in backbone.out_features)  # type: ignore[arg-type,union-attr]
