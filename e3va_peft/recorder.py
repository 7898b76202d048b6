"""The recorder that hooks write to while an adapted exit runs: it fills the record of the frozen pass."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from threading import Lock
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import _checkpoint_without_reentrant_generator as checkpointing

from e3va_peft.backbones.base import Backbone, GridSource
from e3va_peft.frozen_pass import FrozenPass, Grid, MergingCall
from e3va_peft.fused import under_autocast

T = TypeVar("T")


class Current(Generic[T]):
    """A value that hooks find while it is set.

    Safe in threads (`nn.DataParallel`) through a `ContextVar`. `torch.compile` cannot trace setting one: what is set
    while tracing is a plain attribute, which all threads share until it is reset. Which of the two is remembered when
    it is *set*, because what reads it may be compiled alone (`nn.Module.compile()`, regional compilation). Up to
    PyTorch 2.12 a graph cannot read a `ContextVar` either: while nothing is set in any thread, it does not have to.
    """

    def __init__(self, name: str) -> None:
        self._variable: ContextVar[T | None] = ContextVar(name, default=None)
        self._traced: T | None = None
        self._tracing = False
        self._times = 0  # that it is set outside of a graph now, in all threads
        self._somewhere = False  # whether that is so at all, which a graph may depend on
        self._lock = Lock()

    @property
    def apart(self) -> bool:
        """Whether what is being compiled is not all that runs while the value is set."""
        return torch.compiler.is_compiling() and not self._tracing

    def get(self) -> T | None:
        """Return the value, None where none is set."""
        if self._tracing:
            return self._traced
        return self._variable.get() if self._somewhere else None

    @contextmanager
    def set(self, value: T) -> Iterator[None]:
        """Set the value for the time of a `with` statement."""
        if torch.compiler.is_compiling():
            self._traced, self._tracing = value, True
            try:
                yield
            finally:
                self._traced, self._tracing = None, False
        else:
            token = self._variable.set(value)
            self._count(1)
            try:
                yield
            finally:
                self._count(-1)
                self._variable.reset(token)

    def _count(self, change: int) -> None:
        with self._lock:
            self._times += change
            self._somewhere = self._times > 0


@torch.compiler.disable
def outside(function: Callable[[int], None], stage: int) -> None:
    """Call a function outside of the graph that is being compiled."""
    function(stage)


class Stop(Exception):
    """Everything that a second run of the frozen backbone is for has been seen."""


class Live(NamedTuple):
    """The live blocks of a forward.

    Attributes:
        start: (stage, index of its first adapter) of the first of them.
        enter: Writes the lane into what enters it.
        answer: (stage, index, tap) -> what is added to the stream where a tap is read.
        checkpointed: Keep what enters a block for backward, and run it again there.
    """

    start: tuple[int, int]
    enter: Callable[[Tensor], Tensor]
    answer: Callable[[int, int, Tensor], Tensor]
    checkpointed: bool


class Recorder:
    """Fills the record of a frozen pass, and tells when a stage has ended.

    Args:
        frozen: The record.
        exit: The exit that runs.
        family: Its family.
        keep: (stage, index, tap) -> what is kept of a tap.
        leave: Called with a stage when the patch merging behind it has run.
        image: (H, W) of the image, where it was seen.
        live: The live blocks, where there are any.
        stops: Stop the run where the live blocks begin, or behind the last block to adapt.
    """

    def __init__(
        self,
        frozen: FrozenPass,
        exit: nn.Module,
        family: Backbone,
        keep: Callable[[int, int, Tensor], Sequence[Tensor]],
        leave: Callable[[int], None],
        image: tuple[int, int] | None = None,
        live: Live | None = None,
        stops: bool = False,
    ) -> None:
        self.frozen = frozen
        self.exit = exit
        self.family = family
        self.keep = keep
        self.leave = leave
        self.image = image
        self.live = live
        self.stops = stops
        self.entered_live = False
        self.checkpoints: list[Generator[None, None, None]] = []  # of the live blocks that are running
        self.listens = True  # not while the lane itself runs the backbone's modules
        self.parts: dict[tuple[int, int], list[Tensor]] = {}
        self.entered: dict[int, tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = {}
        self.versions: list[tuple[Tensor, int, str]] = []

    def channels_last(self, x: Tensor) -> Tensor:
        """Return a view of the stream with its channels last."""
        return x.movedim(1, -1) if self.family.channels == "first" else x

    def as_stream(self, x: Tensor) -> Tensor:
        """Turn what has its channels last back into what the stream is."""
        return x.movedim(-1, 1) if self.family.channels == "first" else x

    def read(self, stage: int, index: int, parts: int, value: Tensor, name: str) -> Tensor | None:
        """Take a tap, or one of several parts that add up; in a live block, return the value that replaces it."""
        key = (stage, index)
        if key in self.frozen.taps:
            raise RuntimeError(
                f"{name}: was read twice in one forward, so one call's tap would stand for the other's. A module "
                "that blocks share, or that a block calls more than once, cannot be read."
            )
        live = self.live is not None and key >= self.live.start
        own = value if live else value.detach()
        tap = self.channels_last(own)
        shape = tap.shape
        tap = tap.flatten(1, -2) if tap.dim() > 3 else tap
        if parts > 1:
            before = self.parts.setdefault(key, [])
            self.note_version(tap, name) if not live else None
            before.append(tap)
            if len(before) < parts:
                return None
            self.check_versions()
            tap = torch.stack(before).sum(0) if len(before) > 2 else before[0] + before[1]
            del self.parts[key]
        if live:
            assert self.live is not None
            self.frozen.taps[key] = ()
            answer = self.live.answer(stage, index, tap).to(value.device).reshape(shape)
            return (value + self.as_stream(answer)).to(value.dtype)
        kept = self.keep(stage, index, tap)
        if any(part is tap for part in kept):
            self.note_version(tap, name)
        self.frozen.taps[key] = kept
        return None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Listen for the time of a `with` statement."""
        try:
            with CURRENT.set(self):
                yield
        finally:
            for checkpoint in self.checkpoints[::-1]:  # of blocks that raised
                checkpoint.close()
            self.checkpoints.clear()

    def enter_live(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Write the lane into what enters the first live block, and begin to checkpoint each."""
        if self.stops:
            raise Stop
        if self.live is None:
            return args
        if not self.entered_live:
            self.entered_live = True
            x = self.live.enter(self.channels_last(args[0]))
            args = (self.as_stream(x), *args[1:])
        if self.live.checkpointed and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            again = nullcontext(), Again(self.live._replace(checkpointed=False), self.exit, self.family)
            checkpoint = checkpointing(module, True, lambda: again, "default", False, True, *args, **kwargs)
            next(checkpoint)
            self.checkpoints.append(checkpoint)
        return args

    def leave_live(self, *seen: Any) -> None:
        """End the checkpoint of a live block."""
        if self.checkpoints:
            next(self.checkpoints.pop(), None)

    def note_version(self, value: Tensor, name: str) -> None:
        """Remember the state of a tensor that is a view of the backbone's own."""
        if not torch.compiler.is_compiling() and not value.is_inference():
            self.versions.append((value, value._version, name))

    def check_versions(self) -> None:
        """Refuse what was changed in place since it was read.

        Raises:
            RuntimeError: A module behind the tap works in place. The message names the tap.
        """
        for value, version, name in self.versions:
            if value._version != version:
                raise RuntimeError(
                    f"{name}: its tap was changed in place after it was read, so the highway would read something "
                    "else than the branch. Make what follows it work out of place (inplace=False, x = x * s for "
                    "x.mul_(s))."
                )
        self.versions.clear()

    def enter_merging(self, stage: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take what enters the patch merging behind a stage that is not live."""
        if self.live is not None and stage >= self.live.start[0]:
            return
        if not args or not isinstance(args[0], Tensor):
            raise TypeError(
                f"{name}: was given as the patch merging behind stage {stage}, but was not called with the stream "
                "first and by position. Merging.paths must be modules that are called as module(x, ...)."
            )
        x = self.channels_last(args[0].detach())
        self.note_version(x, name)
        self.entered[stage] = x, args[1:], kwargs

    def leave_merging(self, stage: int, name: str, args: tuple[Any, ...], output: Any) -> None:
        """Take what leaves it, and let the lane pass too while the stage's modules are there to run."""
        output = output[0] if isinstance(output, tuple) else output
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{name}: was given as the patch merging behind stage {stage}, but returned no tensor. The last of "
                "Merging.paths must be a module that returns the merged stream."
            )
        if stage not in self.entered:  # between live blocks
            return
        self.check_versions()
        x, given, kwargs = self.entered.pop(stage)
        frozen = None if under_autocast(x) else self.channels_last(output.detach())
        self.frozen.mergings[stage] = MergingCall(x, given, kwargs, frozen)
        self.listens = False
        try:
            # Up to PyTorch 2.13 a graph that is compiled apart from the exit loses the gradient that begins in it.
            outside(self.leave, stage) if CURRENT.apart else self.leave(stage)
        finally:
            self.listens = True

    def note_end(self, stage: int, name: str, args: tuple[Any, ...]) -> None:
        """Take what enters the module at the end of a stage: the output of the stage's last block."""
        x = self.channels_last(self.own(args[0]))
        self.note_version(x, name)
        self.frozen.ends[stage] = x

    def note_tail(self, args: tuple[Any, ...]) -> None:
        """Take what enters the exit's tail: the last block's output, to which the lane is added."""
        self.frozen.tail = self.own(args[0])

    def own(self, x: Tensor) -> Tensor:
        """Return a tensor of the stream without gradient, or as it is where it may come from a live block."""
        return x.detach() if self.live is None else x

    def note_grid(self, stage: int, args: tuple[Any, ...]) -> None:
        """Work out how the tokens of a stage lie in the image, as its first block is called."""
        prefix = self.family.prefix(self.exit)
        args = (self.channels_last(args[0]), *args[1:])
        height, width = self.family.grid(GridSource(args, self.image, self.exit, prefix))
        self.frozen.grids[stage] = Grid(prefix, height, width)


CURRENT: Current[Recorder] = Current("e3va_recorder")


def listening() -> Recorder | None:
    """Return the recorder of the running forward, None where there is none or it does not listen."""
    recorder = CURRENT.get()
    return recorder if recorder is not None and recorder.listens else None


class Again(AbstractContextManager[None]):
    """Lets a recorder listen to a live block that backward runs again; can be entered once for each backward."""

    def __init__(self, live: Live, exit: nn.Module, family: Backbone) -> None:
        self.live, self.exit, self.family = live, exit, family
        self.entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        recorder = Recorder(FrozenPass(), self.exit, self.family, _never, _never, live=self.live)
        recorder.entered_live = True
        context = CURRENT.set(recorder)
        context.__enter__()
        self.entered.append(context)

    def __exit__(self, *error: Any) -> None:
        self.entered.pop().__exit__(*error)


def _never(*args: Any) -> Any:
    raise AssertionError("a live block keeps no tap and leaves no stage")
