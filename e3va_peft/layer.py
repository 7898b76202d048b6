"""The wiring: `E3VALayer`, which runs a frozen exit, lets the lane read it, and writes the lane into its outputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from e3va_peft.backbones import Backbone, ExitCall
from e3va_peft.backbones.base import BLOCK, STREAM, TapPoint, adapted_blocks, submodule
from e3va_peft.config import E3VAConfig
from e3va_peft.frozen_pass import FrozenPass
from e3va_peft.fused import Merging
from e3va_peft.highway import Highway
from e3va_peft.hooks import (
    FRONT,
    Beyond,
    Front,
    ImageGuard,
    LiveInput,
    Note,
    Tap,
    check_input,
    image_size,
    refuse_offloaded,
    refuse_trainable,
    remove_hooks,
)
from e3va_peft.lane import Lane, most_exact
from e3va_peft.recompute import Keep, Recompute, in_parts
from e3va_peft.recorder import Live, Recorder, Stop
from e3va_peft.replay import SOURCE, Once, Replay

METHOD_CHILD = "e3va"  # name of the layer in a module whose methods are the exit

# What hosts read from the module that they take for the exit. What computes is not among it: it would run the base.
_READABLE = (
    "config",
    "get_input_embeddings",
    "gradient_checkpointing_enable",
    "gradient_checkpointing_disable",
)
_DATA = (str, int, float, bool, type(None), Enum, torch.dtype, torch.device)


class AdaptedMethod:
    """Stands on a module for one of its methods, and runs it with the lane written into what it returns."""

    def __init__(self, host: nn.Module, name: str) -> None:
        self.host = host
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method; arguments and outputs are its own."""
        layer = getattr(self.host, METHOD_CHILD)
        if layer.exit is not self.host:  # a replica, whose layer does not know it yet
            layer._host = [self.host]
        return layer(*args, e3va_method=self.name, **kwargs)


class AdaptedReplicate:
    """Stands on a module for the method by which `nn.DataParallel` makes replicas: theirs are methods of their own."""

    def __init__(self, layer: E3VALayer) -> None:
        self.layer = layer

    def __call__(self) -> nn.Module:
        """Return a replica, whose layer is made apart and becomes its child as any other."""
        host = self.layer.exit
        replica = type(host)._replicate_for_data_parallel(host)
        stand_on(replica, self.layer)
        return replica


def stand_on(host: nn.Module, layer: E3VALayer) -> None:
    """Replace the methods of a module that are the exit of its backbone, without changing its class."""
    for name in layer.family.methods:
        setattr(host, name, AdaptedMethod(host, name))
    host._replicate_for_data_parallel = AdaptedReplicate(layer)  # type: ignore[method-assign]


class E3VALayer(nn.Module, BaseTunerLayer):
    """The exit of a frozen backbone with highways beside it.

    Its forward is the method: base without gradient -> record -> lane on the highways -> splice into a copy of the
    outputs; with live blocks the lane is written into the stream in front of the first of them. The base stays in eval
    mode whatever `.train()` says. An exit that is a module is replaced by the layer; for one that is a method, the
    layer is a child of the module, whose methods are replaced.

    Args:
        exit: The exit, or the module whose methods it is.
        family: The exit's family.
        depth: Blocks to adapt in each stage.
        config: Of the first adapter. All that join it share its taps, tap_norm and live_blocks.
        front: The frozen modules in front of the exit, by the names by which their guards note what they see.

    Raises:
        ValueError: There are fewer blocks than shall be live.
    """

    adapter_layer_names: tuple[str, ...] = ("e3va_highway", "e3va_tail")

    def __init__(
        self,
        exit: nn.Module,
        family: Backbone,
        depth: Sequence[int],
        config: E3VAConfig,
        front: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.family = family
        self.is_method = bool(family.methods)
        if self.is_method:
            self._host = [exit]  # in a list: it is the layer's parent and must not be its child as well
            stand_on(exit, self)
        else:
            self.base_layer = exit
        self.depth = tuple(depth)
        self.taps = family.taps(config.taps)
        self.tap_norm, self.live_blocks = config.tap_norm or family.tap_norm, config.live_blocks
        self.checkpoint_live_blocks = config.checkpoint_live_blocks
        self.live = first_live(self.depth, config.live_blocks)
        self.front = dict(front or {})  # in a dict: they are not the layer's children
        self.takes_return_dict = not self.is_method and hasattr(exit, "config") and takes(exit.forward, "return_dict")
        self.e3va_highway = nn.ModuleDict()  # adapter -> Highway
        self.e3va_tail = nn.ModuleDict()  # adapter -> trained copies of the modules behind the last block
        self._active_adapter = []
        self.merged_adapters = []
        self.owner: ImageGuard | None = None  # of the model that it was made for
        self.stages = family.stages(exit)
        self._register_hooks()
        self.training = exit.training
        for part in self.frozen:
            part.eval()

    @property
    def exit(self) -> nn.Module:
        """The exit, or the module whose methods it is."""
        return self._host[0] if self.is_method else self.base_layer

    def adapters(self, container: str = "e3va_highway") -> dict[str, nn.Module]:
        """The members of a container, adapter -> module, also where regional compilation has wrapped it."""
        held = getattr(self, container)
        return dict(getattr(held, "_orig_mod", held).items())

    @property
    def frozen(self) -> list[nn.Module]:
        """The modules that run without gradient."""
        if not self.is_method:
            return [self.exit]
        parts = [submodule(self.exit, name) for name in self.family.frozen]
        return [part for part in parts if part is not None]

    def _frozen_by_name(self) -> list[tuple[str, nn.Module]]:
        """The frozen modules, those in front of the exit included, by the names that a message has."""
        return [*self.front.items(), *((type(part).__name__, part) for part in self.frozen)]

    def _register_hooks(self) -> None:
        exit = self.exit
        for i, stage in enumerate(self.stages):
            depth = self.depth[i] if i < len(self.depth) else 0
            for block in stage.blocks[depth:]:
                exit.get_submodule(block).register_forward_pre_hook(Beyond())
            if not depth:
                continue
            exit.get_submodule(stage.blocks[0]).register_forward_pre_hook(Note(Recorder.note_grid, i))
            for j, block in enumerate(stage.blocks[:depth]):
                points = self.family.tap_points(exit, block)
                live = self.live is not None and (i, j) >= self.live
                summed = self.taps == BLOCK or (live and self.taps == (STREAM,))
                chosen = tuple(points) if summed else self.taps
                points[STREAM] = TapPoint(exit.get_submodule(block), "input", None)
                if live:  # before a tap reads what the lane has entered
                    exit.get_submodule(block).register_forward_pre_hook(LiveInput(), with_kwargs=True)
                    exit.get_submodule(block).register_forward_hook(Note(Recorder.leave_live))
                for k, name in enumerate(chosen):
                    index, parts = (j, len(chosen)) if summed else (j * len(self.taps) + k, 1)
                    tap = Tap(i, index, points[name].read, parts, f"{block}: {name}")
                    if tap.read == "input":
                        points[name].module.register_forward_pre_hook(tap)
                    else:
                        points[name].module.register_forward_hook(tap)
            if self.family.ends:
                end = self.family.ends.format(stage=i)
                exit.get_submodule(end).register_forward_pre_hook(Note(Recorder.note_end, i, end))
            if stage.merging and i + 1 < len(self.depth):
                first, last = stage.merging[0], stage.merging[-1]
                enter, leave = Note(Recorder.enter_merging, i, first), Note(Recorder.leave_merging, i, last)
                exit.get_submodule(first).register_forward_pre_hook(enter, with_kwargs=True)
                exit.get_submodule(last).register_forward_hook(leave)
        if self.family.tail:
            exit.get_submodule(self.family.tail[0]).register_forward_pre_hook(Note(Recorder.note_tail))

    def update_layer(self, adapter_name: str, config: E3VAConfig, tail: Sequence[str] = ()) -> None:
        """Add an adapter: a highway, and trained copies of the modules named in `tail`.

        Raises:
            ValueError: The adapters before it read other taps, or in another way, or have other live blocks.
        """
        for field, chosen, own in (
            ("taps", self.family.taps(config.taps), self.taps),
            ("tap_norm", config.tap_norm or self.family.tap_norm, self.tap_norm),
            ("live_blocks", config.live_blocks, self.live_blocks),
            ("checkpoint_live_blocks", config.checkpoint_live_blocks, self.checkpoint_live_blocks),
        ):
            if chosen != own:
                raise ValueError(
                    f"{field}={getattr(config, field)!r}: adapter {adapter_name!r} joins adapters that have {own!r}. "
                    f"All adapters of one model share their {field}; use the same, or unload() first."
                )
        widths = [stage.width for stage in self.stages][: len(self.depth)]
        counts = [blocks * len(self.taps) for blocks in self.depth]
        self.e3va_highway[adapter_name] = Highway(
            widths, counts, config.r, config.bottleneck_ratio, config.init_weights, config.tap_storage, self.tap_norm
        )
        if tail:
            copies = {name: copy.deepcopy(getattr(self.exit, name)) for name in tail}
            for module in copies.values():
                remove_hooks(module)
            self.e3va_tail[adapter_name] = nn.ModuleDict(copies)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, *args: Any, e3va_method: str = "", **kwargs: Any) -> Any:
        """Run the exit and write the active highways' lane into a copy of its outputs.

        Args:
            args: The exit's arguments.
            e3va_method: Where the exit is a method: which one.
            kwargs: The exit's keyword arguments.
        """
        source = SOURCE.get()
        if isinstance(source, Replay) and source.blueprint.stages is not self.stages:
            source = None  # of another model, whose forward an interrupt ended
        if torch.compiler.is_compiling() and (source is not None or self._recomputes):
            return _outside(self, *args, e3va_method=e3va_method, **kwargs)
        active = [name for name in self.active_adapters if name in self.adapters()]
        front = self._take_front()
        if self.disable_adapters or not active:
            if source is not None and not isinstance(source, Once):
                raise ValueError(
                    "no adapter is active: the batch comes from a cache, which holds what adapters read and not the "
                    "images that the base model would need. Give it batches of the dataset itself."
                )
            return self._run(e3va_method, args, kwargs)
        image = self._guard((*args, *kwargs.values()), front)
        as_tuple = False
        if self.takes_return_dict:
            as_tuple = kwargs.pop("return_dict", getattr(self.exit.config, "return_dict", True)) is False
        call = ExitCall(self.exit, e3va_method, self.depth, self._tail(active), None, args, kwargs)
        call_args, call_kwargs = self.family.prepare(call)
        if self.takes_return_dict:
            call_kwargs = {**call_kwargs, "return_dict": True}
        lane = self._lane(active, self.family.shown(call))
        live = None
        if self.live is not None:
            start = self.live[0], self.live[1] * len(self.taps)
            checkpointed = lane.grad and self.checkpoint_live_blocks and not self._compiles_live_blocks
            live = Live(start, lane.enter, lane.answer, checkpointed)
            call_args = tuple(map(_detached, call_args))
            call_kwargs = {name: _detached(value) for name, value in call_kwargs.items()}
        run = partial(self._run, e3va_method, call_args, call_kwargs)
        if source is not None:
            source.fill(self, lane, run, image, live)
            return self._splice(lane, call, as_tuple)
        if lane.grad and lane.storage == "recompute":
            made = [seen.origin.of(args[0]) for seen in front.values() if args and seen.origin is not None]
            recompute = self._recompute(lane, e3va_method, call_args, call_kwargs, next(filter(None, made), None))
            lane.recompute = recompute, recompute.handle()
        recorder = Recorder(lane.frozen, self.exit, self.family, lane.keep, lane.leave, image, live)
        with recorder.running(), torch.set_grad_enabled(lane.grad and live is not None):
            lane.frozen.outputs = run()
        recorder.check_versions()
        return self._splice(lane, call, as_tuple)

    def _splice(self, lane: Lane, call: ExitCall, as_tuple: bool) -> Any:
        """Write the lane into a copy of the outputs that the record holds."""
        call = replace(call, tail_input=lane.frozen.tail, ends=lane.frozen.ends)
        outputs = self.family.splice(lane.frozen.outputs, lane, call)
        lane.end()
        return outputs.to_tuple() if as_tuple else outputs

    @property
    def _recomputes(self) -> bool:
        """Whether backward shall run the exit again, which no graph can say that ends with the forward."""
        highways = [cast(Highway, h) for name, h in self.adapters().items() if name in self.active_adapters]
        wanted = torch.is_grad_enabled() and any(highway.trainable for highway in highways)
        return wanted and not self.disable_adapters and most_exact(highways) == "recompute"

    @property
    def _compiles_live_blocks(self) -> bool:
        """Whether regional compilation has wrapped live blocks: then the compiler decides what they keep."""
        live = list(adapted_blocks(self.stages, self.depth))[-self.live_blocks :]
        return any(is_compiled(self.exit.get_submodule(name)) for name in live)

    def _recompute(
        self,
        lane: Lane,
        method: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        made: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None,
    ) -> Recompute:
        """Note how to run the exit again: from what a module in front was given, where it made its first argument."""
        if made is None:
            return Recompute(lane.highways, partial(self._run_again, method), args, kwargs)
        module, *inputs = made

        def run(args: Sequence[Any], kwargs: Mapping[str, Any], keep: Keep) -> None:
            (own, named), *rest = args
            token = FRONT.set(FRONT.get())
            try:
                first = module(*own, **named)
            finally:
                FRONT.reset(token)  # what its guards note is of no forward
            self._run_again(method, (first[0] if isinstance(first, tuple) else first, *rest), kwargs, keep)

        return Recompute(lane.highways, run, (inputs, *args[1:]), kwargs)

    def _run_again(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any], keep: Keep) -> None:
        """Run the frozen blocks once more, in backward, for what enters the taps of those that are not live."""
        frozen = FrozenPass()
        stops = self.live is not None or sum(self.depth) < sum(len(stage.blocks) for stage in self.stages)
        stops = stops and not has_units(self.exit)  # whose own hooks must run in pairs
        forget: Callable[[int], Any] = frozen.mergings.pop
        recorder = Recorder(frozen, self.exit, self.family, keep, forget, stops=stops)
        if "output_hidden_states" in kwargs:
            kwargs = {**kwargs, "output_hidden_states": False}
        with recorder.running(), in_parts(self._tokenwise()), suppress(Stop):
            self._run(method, args, kwargs)

    def _tokenwise(self) -> list[nn.Module]:
        """Return the modules of `Backbone.tokenwise` in the blocks that run eagerly."""
        if not self.family.tokenwise:
            return []
        blocks = [self.exit.get_submodule(name) for name in adapted_blocks(self.stages, self.depth)]
        eager = [block for block in blocks if not is_compiled(block)]
        return [part for block in eager if (part := submodule(block, self.family.tokenwise)) is not None]

    def _take_front(self) -> Mapping[str, Front]:
        """Notes of the frozen modules in front for this forward; they are forgotten."""
        if torch.compiler.is_compiling():
            return {}
        noted = FRONT.get()
        FRONT.set({name: seen for name, seen in noted.items() if name not in self.front})
        return {name: noted[name] for name in self.front if name in noted}

    def _guard(self, inputs: Sequence[Any], front: Mapping[str, Front]) -> tuple[int, int] | None:
        """Keep the frozen stream in eval mode and without gradient; return (H, W) of the image, where one was seen."""
        for part in self.frozen:
            if part.training:
                part.eval()
            refuse_trainable(part, type(part).__name__)
        if self.is_method:
            refuse_trainable(self.exit, type(self.exit).__name__, recurse=False)
        if self.live is not None and torch.is_grad_enabled() and getattr(self.exit, "grad_checkpointing", False):
            raise ValueError(
                f"{type(self.exit).__name__}: its own checkpointing is on, which would run live blocks again without "
                "the highway. Call set_grad_checkpointing(False): E3VA checkpoints them by itself."
            )
        check_input(inputs, front)
        return image_size(inputs) or next((seen.image for seen in front.values() if seen.image), None)

    def _run(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the exit as it is without us."""
        if self.is_method:
            return getattr(type(self.exit), method)(self.exit, *args, **kwargs)
        return self.exit(*args, **kwargs)

    def _lane(self, active: Sequence[str], shown: bool) -> Lane:
        highways = [cast(Highway, self.adapters()[name]) for name in active]
        grad = torch.is_grad_enabled() and any(highway.trainable for highway in highways)
        apart = grad or SOURCE.get() is not None  # patch merging runs when its stage does not
        mergings = []
        for stage in self.stages[: len(self.depth) - 1]:
            names, run = self.family.runner(stage)
            sharded = apart and any(is_sharded(self.exit, name) for name in stage.merging)
            mergings.append(Merging([self.exit.get_submodule(name) for name in names], run, sharded))
        refuse_offloaded(highways, [module for spec in mergings for module in spec.modules], grad)
        return Lane(
            highways, FrozenPass(), self.depth, len(self.taps), mergings, grad, shown, self.live, self.family.onto
        )

    def _tail(self, active: Sequence[str]) -> dict[str, nn.Module]:
        """Return the modules behind the last block: the active adapter's copies, and the frozen ones for the rest."""
        tail = {name: getattr(self.exit, name, None) for name in self.family.tail}
        for name, copies in self.adapters("e3va_tail").items():
            if name in active:
                tail.update(copies.items())  # type: ignore[operator]
        return {name: module for name, module in tail.items() if module is not None}

    def train(self, mode: bool = True) -> E3VALayer:
        """Set the training mode of the highway; the frozen stream stays in eval mode, and may want no gradient.

        Raises:
            ValueError: With `mode`, something in the frozen stream has `requires_grad`.
        """
        super().train(mode)
        for part in self.frozen:
            part.eval()
        for name, part in self._frozen_by_name() if mode else ():  # here too: a forward that is compiled cannot look
            refuse_trainable(part, name)
        return self

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; several add up in one lane.

        Raises:
            ValueError: Several are asked for, and one of them has its own copy of the output norm.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        own = [name for name in names if name in self.e3va_tail]
        if len(names) > 1 and own:
            raise ValueError(
                f"adapters {names}: {own} have output norms of their own, so their lanes cannot share one exit. Train "
                "adapters that shall be active together with modules_to_save=[]."
            )
        super().set_adapter(names, inference_mode=inference_mode)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the exit without hooks, with the active adapter's copies of the tail, as PEFT does for heads.

        Raises:
            NotImplementedError: With `merge`.
        """
        if merge:
            raise cannot_merge()
        exit, training = self.exit, self.training
        remove_hooks(exit)
        for name in self.active_adapters:
            if name in self.e3va_tail:
                for key, module in self.e3va_tail[name].items():  # type: ignore[operator]
                    setattr(exit, key, module)
        if self.is_method:
            for name in (*self.family.methods, "_replicate_for_data_parallel"):
                delattr(exit, name)
        for part in self.frozen:
            part.train(training)
        return exit

    def get_base_layer(self) -> nn.Module:
        """Return the exit, or the module whose methods it is."""
        return self.exit

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        parameter = next((p for p in base_layer.parameters() if p.is_floating_point()), None)
        return (None, None) if parameter is None else (parameter.device, parameter.dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to its base: each part of it to its own place, which a device map may have spread."""
        highway = cast(Highway, self.e3va_highway[adapter_name])
        tail = self.e3va_tail[adapter_name].items() if adapter_name in self.e3va_tail else ()  # type: ignore[operator]
        own = device if device is not None else next(highway.parameters()).device
        super()._move_adapter_to_device_of_base_layer(adapter_name, own)  # for the dtype
        if device is not None:
            return
        places = [self.exit.get_submodule(stage.blocks[0]) for stage in self.stages]
        pairs = [
            *zip(highway.stages, places, strict=False),
            *((copy, getattr(self.exit, name)) for name, copy in tail),
        ]
        for part, place in pairs:
            if not any(parameter.is_meta for parameter in part.parameters()):  # else PEFT has yet to load it
                part.to(next(place.parameters()).device)

    def __getattr__(self, name: str) -> Any:
        """Forward what hosts read from what they take for the exit: its config and other data, not what computes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
        value = getattr(self.base_layer, name)
        if name in _READABLE or isinstance(value, _DATA):
            return value
        raise AttributeError(
            f"{name}: is not read from an adapted {type(self.base_layer).__name__}, because it would run or show the "
            "frozen base, without the highway. Call the module itself, or take it from get_base_layer()."
        )

    def __repr__(self) -> str:
        return "e3va." + super().__repr__()


@torch.compiler.disable(reason="tap_storage='recompute' runs the backbone again in backward; a cache does not run it")
def _outside(layer: E3VALayer, *args: Any, **kwargs: Any) -> Any:
    """Run a layer outside of the graph that is being compiled."""
    return layer(*args, **kwargs)


def first_live(depth: Sequence[int], live_blocks: int) -> tuple[int, int] | None:
    """Return (stage, block) of the first live block, counted from the end over all stages; None without any.

    Raises:
        ValueError: There are fewer blocks.
    """
    if live_blocks > sum(depth):
        raise ValueError(
            f"live_blocks={live_blocks}: the backbone has {sum(depth)} blocks to adapt, {tuple(depth)} in its stages. "
            f"Choose from 0 to {sum(depth)}."
        )
    places = [(stage, block) for stage, blocks in enumerate(depth) for block in range(blocks)]
    return places[-live_blocks] if live_blocks else None


def _detached(value: Any) -> Any:
    """Return an argument of the exit, without gradient if it is a tensor: none goes further back than live blocks."""
    return value.detach() if isinstance(value, Tensor) else value


def is_sharded(exit: nn.Module, name: str) -> bool:
    """Whether FSDP takes the weights of a frozen module away before backward, or has not gathered them for forward.

    It does where a unit of FSDP2 is inside the exit: no output of it wants a gradient, so backward does not gather it,
    and a forward that is read from a record does not run it.

    Raises:
        ValueError: The module is such a unit itself, or holds one.
    """
    if has_units(exit.get_submodule(name)):
        stage = type(exit.get_submodule(name.rpartition(".")[0])).__name__.removeprefix("FSDP")
        raise ValueError(
            f"{name}: FSDP shards this patch merging or a part of it as a unit of its own, "
            "so its weights are gone when the lane has to pass. Make whole stages units: "
            f"transformer_cls_names_to_wrap={[stage]}."
        )
    parents = [exit.get_submodule(".".join(name.split(".")[:i])) for i in range(name.count(".") + 1)]
    return any(has_units(parent, recurse=False) for parent in parents)


def has_units(module: nn.Module, recurse: bool = True) -> bool:
    """Whether FSDP2 shards a module, or with `recurse` a part of it, as a unit of its own."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule  # here: PyTorch may be built without it

    return any(isinstance(part, FSDPModule) for part in (module.modules() if recurse else (module,)))


def is_compiled(block: nn.Module) -> bool:
    """Whether a block is compiled by itself, by regional compilation or by its method `compile`."""
    return hasattr(block, "_orig_mod") or block._compiled_call_impl is not None


def takes(function: Callable[..., Any], keyword: str) -> bool:
    """Whether a function can be called with a keyword."""
    parameters = inspect.signature(function).parameters
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def cannot_merge() -> NotImplementedError:
    """Build the error for every way to ask for merged weights."""
    return NotImplementedError(
        "E3VA cannot be merged: the highway runs beside the backbone and reads its activations, so no weights of the "
        "backbone could stand for it. Keep the adapter (it is small), or call unload() to get the base model back."
    )
