"""The wiring: taps that read inside the frozen backbone, and `E3VALayer`, the one module that is replaced."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from e3va_peft.backbones import Backbone, Run
from e3va_peft.config import BLOCK, BRANCHES, E3VAConfig
from e3va_peft.highway import Highway, Lane, Taps, under_autocast


class _CurrentTaps:
    """Where hooks find the `Taps` of the forward that they run in.

    Safe in threads (`nn.DataParallel`) through a `ContextVar`, which `torch.compile` cannot trace: while compiling it
    is a plain attribute.
    """

    def __init__(self) -> None:
        self._variable: ContextVar[Taps | None] = ContextVar("e3va_taps", default=None)
        self._while_compiling: Taps | None = None

    def get(self) -> Taps | None:
        return self._while_compiling if torch.compiler.is_compiling() else self._variable.get()

    @contextmanager
    def set(self, taps: Taps) -> Iterator[None]:
        if torch.compiler.is_compiling():
            self._while_compiling = taps
            try:
                yield
            finally:
                self._while_compiling = None
        else:
            token = self._variable.set(taps)
            try:
                yield
            finally:
                self._variable.reset(token)


_CURRENT = _CurrentTaps()


class Tap:
    """A hook that reads one branch. A class, because closures survive neither pickle nor deepcopy.

    It holds no module and no tensor: it writes what it sees, by key, into the `Taps` of the running forward, and does
    nothing outside of one.
    """

    def __init__(self, stage: int, index: int, read: Literal["input", "output"], half: bool = False) -> None:
        self.stage = stage
        self.index = index
        self.read = read
        self.half = half

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        """Read the module's first input or its output, as a forward pre-hook or a forward hook."""
        taps = _CURRENT.get()
        if taps is not None:
            value = args[0] if self.read == "input" else output
            value = value[0] if isinstance(value, tuple) else value
            taps.read(self.stage, self.index, value.detach(), self.half)


class MergingTap:
    """A hook that reads what enters frozen patch merging, and what leaves it."""

    def __init__(self, stage: int) -> None:
        self.stage = stage

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep the module's arguments and output for the lane.

        Raises:
            TypeError: It was not called as `StageSpec.merging` must be.
        """
        taps = _CURRENT.get()
        if taps is None:
            return
        if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            raise TypeError(
                f"stage {self.stage}: {type(module).__name__} was given as its patch merging, but was not called with "
                "the stream first and by position, or returned no tensor. StageSpec.merging must be a module that is "
                "called as merging(x, ...) and returns the merged stream."
            )
        frozen = None if under_autocast(args[0]) else output
        taps.read_merging(self.stage, args[0], (args[1:], kwargs), frozen)


class TailTap:
    """A pre-hook that reads what enters the exit's tail."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep the last block's output, to which the lane is added."""
        taps = _CURRENT.get()
        if taps is not None:
            taps.tail = args[0]


class FrozenGuard:
    """A pre-hook on frozen modules before the exit: eval mode always, and nothing in them may want a gradient."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Put the module into eval mode, and refuse it if it wants a gradient."""
        if module.training:
            module.eval()
        refuse_trainable(module, self.name)
        check_input_gradients(args)


def refuse_trainable(module: nn.Module, name: str) -> None:
    """Raise if anything in a frozen module wants a gradient while gradients are on: it would never get one.

    Raises:
        ValueError: A parameter of `module` has `requires_grad`. The message names it.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    for parameter_name, parameter in module.named_parameters():
        if parameter.requires_grad:
            raise ValueError(
                f"{name}.{parameter_name} has requires_grad=True, but no gradient enters the frozen backbone, so it "
                "would never train. Set requires_grad=False, or use another PEFT method for this module."
            )


def is_e3va_hook(hook: object) -> bool:
    """Whether a hook is one of ours."""
    return isinstance(hook, Tap | MergingTap | TailTap | FrozenGuard)


def remove_hooks(model: nn.Module) -> None:
    """Remove every hook of ours from a model and all its modules."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if is_e3va_hook(hook)]:
                del hooks[key]


class E3VALayer(nn.Module, BaseTunerLayer):
    """The exit of a frozen backbone with highways beside it.

    Its forward is the method: base under `no_grad` -> taps -> lane on the highways -> splice into the outputs. The
    base layer stays in eval mode whatever `.train()` says.

    Args:
        base_layer: The exit.
        backbone: The exit's family.
        depth: Blocks to adapt in each stage.
        taps: Names of the taps that are read in each block; the same for all adapters.
        takes_image: Whether nothing frozen stands before the exit, so that it has to look at its input itself.
    """

    adapter_layer_names: tuple[str, ...] = ("e3va_highway", "e3va_tail")

    def __init__(
        self,
        base_layer: nn.Module,
        backbone: Backbone,
        depth: Sequence[int],
        taps: Sequence[str],
        takes_image: bool = False,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.backbone = backbone
        self.depth = tuple(depth)
        self.taps = tuple(taps)
        self.takes_image = takes_image
        self.e3va_highway = nn.ModuleDict()  # adapter -> Highway
        self.e3va_tail = nn.ModuleDict()  # adapter -> trained copies of the modules behind the last block
        self._active_adapter = []
        self.merged_adapters = []
        base_layer.eval()
        self._register_taps()

    def _register_taps(self) -> None:
        half = self.taps == BLOCK
        for i, (stage, depth) in enumerate(zip(self.backbone.stages(self.base_layer), self.depth, strict=False)):
            for j, block in enumerate(stage.blocks[:depth]):
                for k, name in enumerate(BRANCHES if half else self.taps):
                    point = block[name]
                    tap = Tap(i, j if half else j * len(self.taps) + k, point.read, half)
                    if point.read == "input":
                        point.module.register_forward_pre_hook(tap)
                    else:
                        point.module.register_forward_hook(tap)
            if stage.merging is not None:
                stage.merging.register_forward_hook(MergingTap(i), with_kwargs=True)
        if self.backbone.tail:
            getattr(self.base_layer, self.backbone.tail[0]).register_forward_pre_hook(TailTap())

    def update_layer(self, adapter_name: str, config: E3VAConfig, tail: Sequence[str] = ()) -> None:
        """Add an adapter: a highway, and trained copies of the modules named in `tail`.

        Raises:
            ValueError: The adapters before it read other taps.
        """
        if tuple(config.taps) != self.taps:
            raise ValueError(
                f"taps={tuple(config.taps)}: adapter {adapter_name!r} joins adapters that read {self.taps}. All "
                "adapters of one model share the taps; use the same ones, or unload() first."
            )
        widths = [stage.width for stage in self.backbone.stages(self.base_layer)][: len(self.depth)]
        counts = [blocks * len(self.taps) for blocks in self.depth]
        self.e3va_highway[adapter_name] = Highway(
            widths, counts, config.r, config.bottleneck_ratio, config.init_weights, config.tap_storage
        )
        if tail:
            copies = {name: copy.deepcopy(getattr(self.base_layer, name)) for name in tail}
            for module in copies.values():
                remove_hooks(module)
            self.e3va_tail[adapter_name] = nn.ModuleDict(copies)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the exit and write the active highways' lane into its outputs. Arguments and outputs are the exit's."""
        active = [name for name in self.active_adapters if name in self.e3va_highway]
        if self.disable_adapters or not active:
            return self.base_layer(*args, **kwargs)
        refuse_trainable(self.base_layer, type(self.base_layer).__name__)
        if self.takes_image:
            check_input_gradients((*args, *kwargs.values()))
        config = getattr(self.base_layer, "config", None)
        as_dict = {} if config is None else {"return_dict": True}  # an exit of a user's own may know no return_dict
        return_dict = kwargs.pop("return_dict", getattr(config, "return_dict", True))
        highways = [cast(Highway, self.e3va_highway[name]) for name in active]
        keep = torch.is_grad_enabled() and any(highway.trainable for highway in highways)
        taps = Taps(highways, len(self.taps), keep)
        with _CURRENT.set(taps), torch.no_grad():
            outputs = self.base_layer(*args, **as_dict, **kwargs)
        run = Run(
            exit=self.base_layer,
            lane=Lane(taps, [stage.merging for stage in self.backbone.stages(self.base_layer)]),
            depth=self.depth,
            tail=self._tail(active),
            tail_input=torch.empty(0) if taps.tail is None else taps.tail,
            kwargs=kwargs,
        )
        outputs = self.backbone.splice(outputs, run)
        return outputs if return_dict is not False else outputs.to_tuple()

    def _tail(self, active: Sequence[str]) -> dict[str, nn.Module]:
        """Return the modules behind the last block: the active adapter's copies, and the frozen ones for the rest."""
        tail = {name: getattr(self.base_layer, name, None) for name in self.backbone.tail}
        for name in active:
            if name in self.e3va_tail:
                tail.update(self.e3va_tail[name].items())  # type: ignore[operator]
        return {name: module for name, module in tail.items() if module is not None}

    def train(self, mode: bool = True) -> E3VALayer:
        """Set the training mode of the highway; the frozen stream stays in eval mode."""
        super().train(mode)
        self.base_layer.eval()
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

    def unload(self) -> nn.Module:
        """Return the exit without taps, with the active adapter's copies of the tail, as PEFT does for heads."""
        remove_hooks(self.base_layer)
        for name in self.active_adapters:
            if name in self.e3va_tail:
                for key, module in self.e3va_tail[name].items():  # type: ignore[operator]
                    setattr(self.base_layer, key, module)
        self.base_layer.train(self.training)
        return self.base_layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: see `cannot_merge`."""
        raise cannot_merge()

    def unmerge(self) -> None:
        """Refuse: see `cannot_merge`."""
        raise cannot_merge()

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        parameter = next((p for p in base_layer.parameters() if p.is_floating_point()), None)
        return (None, None) if parameter is None else (parameter.device, parameter.dtype)

    def __getattr__(self, name: str) -> Any:
        """Forward public attributes to the exit: heads read `config` and the like from what they take for it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return "e3va." + super().__repr__()


def cannot_merge() -> NotImplementedError:
    """Build the error for every way to ask for merged weights."""
    return NotImplementedError(
        "E3VA cannot be merged: the highway runs beside the backbone and reads its activations, so no weights of the "
        "backbone could stand for it. Keep the adapter (it is small), or call unload() to get the base model back."
    )


def check_input_gradients(inputs: Sequence[Any]) -> None:
    """Refuse an input of the backbone that some module in front of it computed with gradient; warn about a leaf's.

    Raises:
        ValueError: What made the input wants a gradient, which E3VA does not send.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    wanting = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    if any(value.grad_fn is not None for value in wanting):
        raise ValueError(
            "a module in front of the backbone wants a gradient, but E3VA sends none through the backbone, so it "
            "would never train. Leave it out of modules_to_save, or use another PEFT method."
        )
    if wanting:
        warnings.warn(
            "the input of the backbone requires a gradient, but E3VA sends none through it: it will stay None. For "
            "saliency maps or adversarial examples use the base model (disable_adapter()) or another PEFT method.",
            UserWarning,
            stacklevel=3,
        )
