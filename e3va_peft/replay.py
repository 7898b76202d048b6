"""Sources of a frozen pass other than the running backbone.

`Capture` takes one down, `Replay` gives it back, and `Once` does both: the backbone runs once for several adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from e3va_peft.frozen_pass import FrozenPass, Grid, MergingCall
from e3va_peft.fused import compute_dtype
from e3va_peft.recompute import forwards_replaced
from e3va_peft.recorder import Current, Live, Recorder

if TYPE_CHECKING:
    from e3va_peft.lane import Lane
    from e3va_peft.layer import E3VALayer

Run = partial[Any]  # of the exit; its arguments are the name of a method and the exit's own


class Leaf(NamedTuple):
    """A leaf of a tree of outputs.

    Attributes:
        shape: Of one image, where it is a tensor.
        dtype: Likewise.
        value: What it is where it is none.
    """

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    value: Any = None

    def unknown(self, batch: int, device: torch.device) -> Any:
        """Return it for a batch: NaN (or zero) in a single element that is shown everywhere, or its value."""
        if self.shape is None or self.dtype is None:
            return self.value
        value = float("nan") if self.dtype.is_floating_point else 0
        return torch.full((), value, dtype=self.dtype, device=device).expand(batch, *self.shape)


class Tree(NamedTuple):
    """Outputs without their tensors."""

    spec: TreeSpec
    leaves: tuple[Leaf, ...]

    @classmethod
    def of(cls, value: Any, batch: int) -> Tree:
        """Describe outputs.

        Raises:
            ValueError: A tensor does not have the images of the batch in its first dimension.
        """
        leaves, spec = tree_flatten(value)
        for leaf in leaves:
            if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] != batch):
                raise ValueError(
                    f"the backbone returns a tensor of shape {tuple(leaf.shape)} for {batch} images: it does not "
                    "split into images, so it cannot be cached. Train without a cache."
                )
        parts = (Leaf(tuple(x.shape[1:]), x.dtype) if isinstance(x, Tensor) else Leaf(None, None, x) for x in leaves)
        return cls(spec, tuple(parts))

    def fill(self, leaves: Sequence[Any]) -> Any:
        """Put leaves in."""
        return tree_unflatten(list(leaves), self.spec)


@dataclass
class Blueprint:
    """Everything in a frozen pass that is not a tensor of its images: the same for all images of one size.

    Attributes:
        grids: Stage -> how its tokens lie in the image.
        calls: Stage -> further arguments and keywords of the patch merging behind it.
        outputs: The outputs of the exit.
        skipped: Modules in front of the live blocks -> their outputs.
        behind: The live blocks and the patch merging between -> their outputs, where these split into images.
        live: Whether there are live blocks.
        stages: Those of the layer, by which it knows that the record is its own.
    """

    grids: dict[int, Grid] = field(default_factory=dict)
    calls: dict[int, tuple[tuple[Any, ...], Mapping[str, Any]]] = field(default_factory=dict)
    outputs: Tree | None = None
    skipped: dict[str, Tree] = field(default_factory=dict)
    behind: dict[str, Tree] = field(default_factory=dict)
    live: bool = False
    stages: Any = None

    def given(self, model: nn.Module, tensors: Mapping[str, Any], batch: int) -> AbstractContextManager[None]:
        """Return a context in which the backbone of a model is read from a record, see `Replay`."""
        return SOURCE.set(Replay(self, tensors, batch))


class Captured(Exception):
    """A frozen pass has been taken down: nothing behind the backbone needs to run."""


class Watching(Recorder):
    """A recorder of a run without a lane, which notes what enters the first live block."""

    entry: Tensor | None = None

    def enter_live(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Note the stream once."""
        if self.entry is None:
            self.entry = self.channels_last(args[0].detach())
        return args


class Taken(NamedTuple):
    """Notes of one run of the frozen backbone.

    Attributes:
        frozen: Its record up to the live blocks, with whole taps: (stage, index) -> (tap,). Its outputs are all of the
            backbone's.
        entry: What enters the first live block, where there is one.
        skipped: Modules in front of the live blocks -> their outputs.
    """

    frozen: FrozenPass
    entry: Tensor | None
    skipped: dict[str, Any]


def take(layer: E3VALayer, run: Run, image: Any, live: Live | None) -> Taken:
    """Run the frozen backbone as it is, without a lane, and take down what highways read and what it returns."""
    frozen, start = FrozenPass(), live.start if live else (len(layer.depth), 0)

    def keep(stage: int, index: int, tap: Tensor) -> Sequence[Tensor]:
        return (tap,) if (stage, index) < start else ()

    recorder = Watching(frozen, layer.exit, layer.family, keep, lambda stage: None, image)
    skipped: dict[str, Any] = {}
    with recorder.running(), torch.no_grad(), _noting(layer.exit, around_live(layer)[0], skipped):
        frozen.outputs = run()
    recorder.check_versions()
    frozen.taps = {place: kept for place, kept in frozen.taps.items() if kept}
    frozen.mergings = {stage: call for stage, call in frozen.mergings.items() if stage < start[0]}
    frozen.ends = {stage: x for stage, x in frozen.ends.items() if stage < start[0]}
    frozen.tail = None if live else frozen.tail
    return Taken(frozen, recorder.entry, skipped)


class Capture:
    """A source that runs the frozen backbone as it is, takes down what the highway reads, and stops the forward.

    Args:
        known: The blueprint of images of this size: live blocks that it knows the outputs of do not run then, and NaN
            stands for all that they make.

    Attributes:
        tensors: Name -> tensor with the images in front: `tap.STAGE.ADAPTER`, `merging.STAGE` (what enters it),
            `end.STAGE`, `tail`, `live` (what enters the first live block), `output.LEAF`.
        blueprint: The rest.
    """

    def __init__(self, known: Blueprint | None = None) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.blueprint = known or Blueprint()

    def fill(self, layer: E3VALayer, lane: Lane, run: Run, image: Any, live: Live | None) -> None:
        """Run and take down.

        Raises:
            Captured: Always.
            ValueError: A part of the record does not split into images.
        """
        learns, behind = self.blueprint.outputs is None, dict[str, Tree | None]()
        instead = {name: partial(_unknown, tree) for name, tree in self.blueprint.behind.items()}
        live_names = around_live(layer)[1] if learns else ()
        with _replaced(layer.exit, instead), _noting(layer.exit, live_names, behind, _tree):
            frozen, entry, skipped = take(layer, run, image, live)
        found = {f"tap.{stage}.{index}": tap for (stage, index), (tap,) in frozen.taps.items()}
        found |= {f"merging.{stage}": call.x for stage, call in frozen.mergings.items()}
        found |= {f"end.{stage}": x for stage, x in frozen.ends.items()}
        found |= {name: x for name, x in (("tail", frozen.tail), ("live", entry)) if x is not None}
        leaves = tree_flatten(frozen.outputs)[0]
        found |= {f"output.{i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        batch = next(iter(found.values())).shape[0]
        self.tensors = {name: tensor.detach() for name, tensor in found.items()}
        if learns:
            self.blueprint = Blueprint(
                dict(frozen.grids),
                {stage: (call.args, call.kwargs) for stage, call in frozen.mergings.items()},
                Tree.of(frozen.outputs, batch),
                {name: Tree.of(output, batch) for name, output in skipped.items()},
                {name: tree for name, tree in behind.items() if tree is not None} if all(behind.values()) else {},
                live is not None,
                layer.stages,
            )
        raise Captured


class Replay:
    """A source that gives a frozen pass back: the backbone does not run, but for its live blocks.

    Args:
        blueprint: Of the images' size.
        tensors: As in `Capture.tensors`; of a tap what is kept of it (`storage.keep`). An output that is not among
            them is not read by anything, and NaN stands for it; where it is made by live blocks, it is theirs.
        batch: Number of images.
    """

    def __init__(self, blueprint: Blueprint, tensors: Mapping[str, Any], batch: int) -> None:
        self.blueprint, self.tensors, self.batch = blueprint, tensors, batch

    def fill(self, layer: E3VALayer, lane: Lane, run: Run, image: Any, live: Live | None) -> None:
        """Fill the record of a lane."""
        frozen, blueprint = lane.frozen, self.blueprint
        lane.replays = True
        frozen.grids |= blueprint.grids
        for name, value in self.tensors.items():
            kind, *place = name.split(".")
            if kind == "tap":
                frozen.taps[int(place[0]), int(place[1])] = value
            elif kind == "merging":
                frozen.mergings[int(place[0])] = MergingCall(value, *blueprint.calls[int(place[0])], None)
        for stage in sorted(frozen.mergings):
            lane.leave(stage)
        assert blueprint.outputs is not None
        if live is None:
            device = next(iter(self.tensors.values()))[0].device
            leaves = [leaf.unknown(self.batch, device) for leaf in blueprint.outputs.leaves]
        else:
            entry, skipped = self.tensors["live"], blueprint.skipped
            instead = {name: partial(_unknown, tree) for name, tree in skipped.items()}
            leaves = tree_flatten(_run_live(layer, lane, run, image, live, entry, instead))[0]
        frozen.tail = self.tensors.get("tail", frozen.tail)
        frozen.ends |= {int(name[4:]): value for name, value in self.tensors.items() if name.startswith("end.")}
        own = [self.choose(f"output.{i}", leaf) for i, leaf in enumerate(leaves)]
        frozen.outputs = blueprint.outputs.fill(own)

    def choose(self, name: str, leaf: Any) -> Any:
        """Return a leaf of the outputs: as it was recorded, or else as it is without the record."""
        return self.tensors.get(name, leaf)


class Once:
    """A source that runs the frozen backbone once for the same inputs: after that, it is read from its record.

    A record holds whole taps and all outputs, exactly, until other inputs come.

    Args:
        places: Layer -> where it is in its model. Layers of several models at one place share a record.
    """

    def __init__(self, places: Mapping[E3VALayer, int]) -> None:
        self.places = places
        self.records: dict[Hashable, tuple[Any, Taken]] = {}

    def fill(self, layer: E3VALayer, lane: Lane, run: Run, image: Any, live: Live | None) -> None:
        """Fill the record of a lane as a run of the backbone would."""
        recorded, entry, skipped = self._taken(layer, run, image, live)
        frozen = lane.frozen
        lane.replays = lane.storage == "recompute"  # the taps are there: backward needs no second run
        frozen.grids |= recorded.grids
        frozen.taps |= {
            place: (tap,) if lane.replays else lane.keep(*place, tap) for place, (tap,) in recorded.taps.items()
        }
        frozen.mergings |= recorded.mergings
        for stage in sorted(recorded.mergings):
            lane.leave(stage)
        if live is None:
            frozen.tail, frozen.ends = recorded.tail, dict(recorded.ends)
            frozen.outputs = _copied(recorded.outputs)  # heads and users may change in place what they are given
        else:
            assert entry is not None
            instead = {name: partial(_copy_of, output) for name, output in skipped.items()}
            frozen.outputs = _run_live(layer, lane, run, image, live, entry, instead)

    def _taken(self, layer: E3VALayer, run: Run, image: Any, live: Live | None) -> Taken:
        """Return the record of the inputs, made if they are not those of the last one."""
        key = self.places.get(layer, layer), type(layer.exit), layer.depth, layer.taps, layer.live
        inputs = image, torch.is_inference_mode_enabled(), compute_dtype(next(layer.exit.parameters())), run.args
        known = self.records.get(key)
        if known is not None and _same(known[0], inputs):
            return known[1]
        self.records.pop(key, None)  # its memory goes before more is needed
        inputs = _copied(inputs)  # they may be changed in place, by the run or by who brings the next images
        taken = take(layer, run, image, live)
        if live is not None:
            taken.frozen.outputs = None  # the live blocks make others
        self.records[key] = inputs, taken
        return taken


SOURCE: Current[Capture | Replay | Once] = Current("e3va_source")


def around_live(layer: E3VALayer) -> tuple[list[str], list[str]]:
    """Names of the blocks, and of the patch merging between: in front of the live blocks, and from there on."""
    if layer.live is None:
        return [], []
    stage, block = layer.live
    names = [name for own in layer.stages for name in (*own.blocks, *own.merging)]
    first = names.index(layer.stages[stage].blocks[block])
    return names[:first], names[first:]


def _replaced(exit: nn.Module, instead: Mapping[str, Callable[..., Any]]) -> AbstractContextManager[None]:
    """Run other functions instead of modules of an exit, for the time of a `with` statement."""
    return forwards_replaced({exit.get_submodule(name): function for name, function in instead.items()})


def _output(x: Tensor, output: Any) -> Any:
    return output


def _tree(x: Tensor, output: Any) -> Tree | None:
    """Describe what a module made of a stream; None where that does not split into images."""
    try:
        return Tree.of(output, len(x))
    except ValueError:
        return None


@contextmanager
def _noting(
    exit: nn.Module, names: Sequence[str], noted: dict[str, Any], note: Callable[[Tensor, Any], Any] = _output
) -> Iterator[None]:
    """Write down what modules return, or what `note` says of it, for the time of a `with` statement."""
    hooks = [
        exit.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: noted.__setitem__(name, note(args[0], output))
        )
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _run_live(
    layer: E3VALayer, lane: Lane, run: Run, image: Any, live: Live, entry: Tensor, instead: Mapping[str, Any]
) -> Any:
    """Run the exit with nothing in front of its live blocks, which `entry` enters.

    Args:
        layer: The layer.
        lane: The lane, at the live blocks.
        run: Runs the exit.
        image: (H, W) of the image, where it was seen.
        live: The live blocks.
        entry: What enters the first of them.
        instead: Modules in front of them -> what to run instead.
    """
    scratch = FrozenPass()
    live = live._replace(enter=lambda x: lane.enter(entry))
    recorder = Recorder(scratch, layer.exit, layer.family, _unread, lambda stage: None, image, live)
    with _replaced(layer.exit, instead), recorder.running(), torch.set_grad_enabled(lane.grad):
        outputs = run()
    recorder.check_versions()
    lane.frozen.tail, lane.frozen.ends = scratch.tail, scratch.ends
    return outputs


def _unknown(tree: Tree, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return what a module would, of the stream x, with NaN for each tensor."""
    return tree.fill([leaf.unknown(len(x), x.device) for leaf in tree.leaves])


def _copy_of(output: Any, *args: Any, **kwargs: Any) -> Any:
    return _copied(output)


def _copied(value: Any) -> Any:
    """Return outputs or arguments with copies of their tensors."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)


def _same(left: Any, right: Any) -> bool:
    """Whether arguments are equal, to the bit."""
    (own, spec), (others, other_spec) = tree_flatten(left), tree_flatten(right)
    return spec == other_spec and all(map(_equal, own, others))


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return (left.dtype, left.device) == (right.dtype, right.device) and torch.equal(left, right)
    return left is right or (type(left) is type(right) and isinstance(left, Hashable) and left == right)


def _unread(*args: Any) -> Sequence[Tensor]:
    """Keep nothing of what enters a block that does not run."""
    return ()
