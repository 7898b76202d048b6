"""Hooks that read inside the frozen backbone: they write to the recorder of the forward that runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from e3va_peft.recorder import Stop, listening

FRONT: ContextVar[Mapping[str, Front]] = ContextVar("e3va_front", default={})  # noqa: B039  never changed, replaced


class Front(NamedTuple):
    """Note of a frozen module in front of an exit.

    Attributes:
        image: (H, W) of its image; None where it was given none.
        wanting: Whether its input wants a gradient, see `wants_gradient`.
        trainable: Name of its first parameter that wants one; "" if none does.
        origin: How it made its output, once it has.
    """

    image: tuple[int, int] | None
    wanting: Literal["", "leaf", "computed"]
    trainable: str
    origin: Origin | None = None


class Origin:
    """Call by which a frozen module in front of an exit made a tensor, to make it again. It keeps no tensor alive.

    Args:
        module: The module.
        args: Its arguments.
        kwargs: Likewise, by keyword.
        output: The tensor.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        values, self._spec = tree_flatten((args, dict(kwargs)))
        self._values = [ref(value) if isinstance(value, Tensor) else value for value in values]
        self._versions = [_version(value) for value in (output, *values)]
        self._module, self._output = ref(module), ref(output)

    def of(self, tensor: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None:
        """Return module, arguments and keywords that make a tensor; None where it is another, or they went."""
        values = [value() if isinstance(value, ref) else value for value in self._values]
        gone = any(v is None for v, held in zip(values, self._values, strict=True) if isinstance(held, ref))
        module = self._module()
        if self._output() is not tensor or module is None or gone:
            return None
        if self._versions != [_version(value) for value in (tensor, *values)]:  # changed in place since
            return None
        args, kwargs = tree_unflatten(values, self._spec)
        return module, args, kwargs


def _version(value: Any) -> int | None:
    """Count how often a tensor was changed in place; None of what cannot say."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


class Hook:
    """A hook of ours. A class, because closures survive neither pickle nor deepcopy.

    It holds no module and no tensor: it writes what it sees, by key, into the recorder of the running forward, and
    does nothing outside of one.
    """


class Tap(Hook):
    """A hook that reads one branch of a block.

    Args:
        stage: Index of the stage.
        index: Index of the adapter that reads it.
        read: The module's first input (a forward pre-hook) or its output (a forward hook).
        parts: Number of branches that add up to the tap.
        name: Block and branch that it reads, for messages.
    """

    def __init__(
        self, stage: int, index: int, read: Literal["input", "output"], parts: int = 1, name: str = ""
    ) -> None:
        self.stage = stage
        self.index = index
        self.read = read
        self.parts = parts
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> Any:
        """Read the branch; in a live block, return it with the adapter's answer added."""
        recorder = listening()
        if recorder is None:
            return None
        seen = args if self.read == "input" else output
        first, rest = (seen[0], seen[1:]) if isinstance(seen, tuple) else (seen, None)
        if self.read == "input" and isinstance(first, tuple):
            first = first[0]
        changed = recorder.read(self.stage, self.index, self.parts, first, self.name)
        if changed is None or rest is None:
            return changed
        return (changed, *rest)


class LiveInput(Hook):
    """A pre-hook, with keywords, on a block that may be live: the lane enters the first of them, see `Recorder`."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Change and keep the arguments."""
        recorder = listening()
        return None if recorder is None else (recorder.enter_live(module, args, kwargs), kwargs)


class Beyond(Hook):
    """A pre-hook on blocks behind the last that is adapted: no gradient passes them, and no second run needs them."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Detach the stream."""
        recorder = listening()
        if recorder is None:
            return None
        if recorder.stops:
            raise Stop
        return (args[0].detach(), *args[1:]) if args[0].requires_grad else None


class Note(Hook):
    """A hook or pre-hook that hands what a module is given, and returns, to a method of the recorder.

    Args:
        take: The method, unbound.
        key: Its first arguments.
    """

    def __init__(self, take: Callable[..., None], *key: Any) -> None:
        self.take = take
        self.key = key

    def __call__(self, module: nn.Module, *seen: Any) -> None:
        """Hand it over."""
        recorder = listening()
        if recorder is not None:
            self.take(recorder, *self.key, *seen)


class FrozenGuard(Hook):
    """A pre-hook on frozen modules before the exit: eval mode always, and a note of what they saw for the exit."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Put the module into eval mode, and note what it is given."""
        if module.training:
            module.eval()
        if not torch.compiler.is_compiling():
            wanting = next((name for name, p in module.named_parameters() if p.requires_grad), "")
            FRONT.set({**FRONT.get(), self.name: Front(image_size(args), wants_gradient(args), wanting)})


PLACEHOLDERS: set[str] = set()
"""Names of the images for which, in datasets that this process has cached, something of bools stands."""


class ImageGuard(Hook):
    """A pre-hook, with keywords, on the base model: no placeholder of a cached dataset is taken for an image."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse it, see `refuse_placeholder`."""
        refuse_placeholder(args, kwargs)


def guard_of(model: nn.Module) -> ImageGuard | None:
    """Return the guard of a base model, by which its layers know it; a copy of both has a copy of it."""
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, ImageGuard)), None)


class FrozenOutput(FrozenGuard):
    """A hook, with keywords, on the same modules: a note of how they made what they return."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # type: ignore[override]
        """Note it."""
        if torch.compiler.is_compiling():
            return
        output = output[0] if isinstance(output, tuple) else output
        seen = FRONT.get().get(self.name)
        if seen is not None and isinstance(output, Tensor):
            FRONT.set({**FRONT.get(), self.name: seen._replace(origin=Origin(module, args, kwargs, output))})


def refuse_placeholder(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse what stands for the image in the examples of a cached dataset, where the backbone would read it.

    Raises:
        ValueError: One of the arguments is one.
    """
    if not PLACEHOLDERS:  # no dataset was cached, and what is of bools is the user's own
        return
    images = (*args, *(value for name, value in kwargs.items() if name in PLACEHOLDERS))
    if any(isinstance(value, Tensor) and value.dim() == 4 and value.dtype == torch.bool for value in images):
        raise ValueError(
            "the image is the placeholder of a cached dataset, and its record is not read: a cache serves the model "
            "that was given to e3va_peft.cached, called by keywords as the Trainer does, model(**batch). Call "
            "e3va_peft.cached(dataset, model, ...) for this model too: in one folder the records are filled once."
        )


def image_size(args: Iterable[Any]) -> tuple[int, int] | None:
    """Return (H, W) of the first argument that is an image (B, 3, H, W)."""
    image = next((value for value in args if isinstance(value, Tensor) and value.dim() == 4), None)
    return None if image is None else (image.shape[-2], image.shape[-1])


def wants_gradient(inputs: Iterable[Any]) -> Literal["", "leaf", "computed"]:
    """Whether an input wants a gradient: one that a module in front has *computed*, or a *leaf*, such as an image."""
    wanting = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    if not wanting:
        return ""
    return "computed" if any(value.grad_fn is not None for value in wanting) else "leaf"


def check_input(inputs: Iterable[Any], front: Mapping[str, Front]) -> None:
    """Refuse an input of the frozen stream that some module computed with gradient; warn about a leaf's.

    Args:
        inputs: Of the exit.
        front: Notes of the frozen modules in front of it.

    Raises:
        ValueError: A module that made the input wants a gradient, or something in a frozen module does.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    for name, seen in front.items():
        if seen.trainable:
            raise ValueError(would_never_train(f"{name}.{seen.trainable}"))
    leaf = any(seen.wanting == "leaf" for seen in front.values())
    own = "" if leaf else wants_gradient(inputs)  # what is computed from a leaf in front has a graph as well
    if own == "computed" or any(seen.wanting == "computed" for seen in front.values()):
        raise ValueError(
            "a module in front of the backbone wants a gradient, but E3VA sends none through the backbone, so it "
            "would never train. Leave it out of modules_to_save, or use another PEFT method."
        )
    if leaf or own == "leaf":
        warnings.warn(
            "the input of the backbone requires a gradient, but E3VA sends none through it: it will stay None. For "
            "saliency maps or adversarial examples use the base model (disable_adapter()) or another PEFT method.",
            UserWarning,
            stacklevel=3,
        )


def would_never_train(name: str) -> str:
    """Say that a parameter of the frozen stream wants a gradient."""
    return (
        f"{name} has requires_grad=True, but no gradient enters the frozen backbone, so it would never train. Set "
        "requires_grad=False, or use another PEFT method for this module."
    )


def refuse_trainable(module: nn.Module, name: str, recurse: bool = True) -> None:
    """Raise if anything in a frozen module wants a gradient while gradients are on: it would never get one.

    Raises:
        ValueError: A parameter of `module` has `requires_grad`, or is a view of one that has. The message names it.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    for parameter_name, parameter in module.named_parameters(recurse=recurse):
        if parameter.requires_grad:
            if not parameter.is_leaf:
                raise ValueError(
                    f"{name}.{parameter_name} is a view of a parameter that wants a gradient: FSDP 1 flattens frozen "
                    "and trained weights into one. Use FSDP 2: fsdp_version=2 in Accelerate's plugin, "
                    "fsdp_config={'version': 2} in TrainingArguments."
                )
            raise ValueError(would_never_train(f"{name}.{parameter_name}"))


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a module's own weights on the CPU or disk, and loads them for its forward only."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))


def refuse_offloaded(highways: Sequence[nn.Module], mergings: Sequence[nn.Module], grad: bool) -> None:
    """Refuse an adapted model that was offloaded since, where that would lose gradients or weights.

    Args:
        highways: The active highways.
        mergings: The frozen patch merging that the lane passes through.
        grad: Whether a gradient is wanted.

    Raises:
        ValueError: A highway shall train but is offloaded, or patch merging in less than fp32 is.
    """
    if grad and any(is_offloaded(part) for highway in highways for part in highway.modules()):
        raise ValueError(
            "the highway is offloaded, so its gradients would be lost with the copy of its weights that a forward "
            "loads. Offload the model for inference only, under torch.no_grad(); train it on its device."
        )
    for part in (part for module in mergings for part in module.modules() if is_offloaded(part)):
        if any(parameter.dtype != torch.float32 for parameter in part.parameters(recurse=False)):
            raise ValueError(
                f"{type(part).__name__} of the patch merging is offloaded and not in fp32, which the lane passes "
                "through it in. Leave the patch merging on a device, or offload the model in fp32."
            )


def remove_hooks(model: nn.Module) -> None:
    """Remove every hook of ours from a model and all its modules, with all that PyTorch notes about hooks."""
    for module in model.modules():
        for hooks, notes in (
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
                del hooks[key]
                for note in notes:
                    note.pop(key, None)
