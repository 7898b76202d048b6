"""Take frozen passes down with a model, and give them back to it: `Taker`, and the hooks that read a cached batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from e3va_peft.cache.layout import TAP, Layout, memory
from e3va_peft.cache.units import Pass, Returned, Units, as_it_was, seeded, set_mode
from e3va_peft.errors import UserError
from e3va_peft.exits import frozen_weights, layers_of
from e3va_peft.fingerprint import checksum, config_checksum
from e3va_peft.fused import own_parameters
from e3va_peft.hooks import Hook, refuse_placeholder
from e3va_peft.replay import SOURCE, Blueprint, Capture, Captured, Replay

RECORD = "frozen_pass"  # name of the rows in a batch
_OPEN: ContextVar[tuple[tuple[nn.Module, AbstractContextManager[None]], ...]] = ContextVar("e3va_open", default=())
_TOLERANCE = 1e-3  # of what a model says of a record and of the image itself, as a share of the largest value

Examples = Sequence[Mapping[str, Any]]


class Taker:
    """Runs the frozen backbone of a model on examples.

    Args:
        model: The model: with a highway beside its backbone, or with a frozen backbone (see `units.Units`).
        image: Name of the image in an example and among the model's arguments.
        storage: See `layout.Layout`.
        collate: Makes a batch, the model's keyword arguments, of examples.
        autocast: Dtype of autocast, if it is to be on.

    Raises:
        ValueError: It has several highways, or none and no frozen backbone.
    """

    def __init__(
        self,
        model: nn.Module,
        image: str,
        storage: str,
        collate: Callable[[list[Any]], Mapping[str, Any]],
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.image, self.storage, self.collate = model, image, storage, collate
        self.source: Beside | Units = Beside(model) if layers_of(model) else Units(model)
        if isinstance(self.source, Beside):
            _refuse_coarser(self.source.layer.adapters(), storage)
        self.device = next(model.parameters()).device
        self.autocast = autocast
        self.needed: set[str] | None = None
        self.leaves_out = True  # whether live blocks need not run, found out with `needed`
        self.learned: dict[tuple[int, int], tuple[Blueprint | Returned, Layout]] = {}  # by the size of images
        self.reads = _hook(model, image)

    def rows(self, examples: Examples) -> Tensor:
        """Examples of one size -> (B, bytes): their records."""
        size = self.size(examples[0])
        if not self.knows(size):
            taken = self._taken(examples)
            self._learn(size, taken, examples)
            return self.learned[size][1].pack(taken.tensors)
        blueprint, layout = self.learned[size]
        return layout.pack(self._taken(examples, blueprint).tensors)

    def size(self, example: Mapping[str, Any]) -> tuple[int, int]:
        """(H, W) of the image of an example.

        Raises:
            UserError: There is no image (C, H, W).
        """
        image: Any = example.get(self.image)
        if getattr(image, "ndim", 0) != 3:
            what = f"of shape {tuple(image.shape)}" if hasattr(image, "shape") else f"a {type(image).__name__}"
            raise UserError(
                f"image={self.image!r}: is {what} in the dataset's examples {sorted(example)}. A cache needs the "
                "image as the model takes it, (C, H, W); name its key with image=..."
            )
        return int(image.shape[-2]), int(image.shape[-1])

    def learn(self, example: Mapping[str, Any]) -> None:
        """Learn the layout of records of the size of an example."""
        self._learn(self.size(example), self._taken([example]), [example])

    def knows(self, size: tuple[int, int]) -> bool:
        """Whether the layout of records of images of a size is known."""
        return size in self.learned

    def _learn(self, size: tuple[int, int], taken: Capture | Pass, examples: Examples) -> None:
        behind = taken.blueprint.behind if isinstance(taken.blueprint, Blueprint) else {}
        if self.needed is None:
            self.needed = self._what_is_read(taken, examples)
            if behind:
                short = self._taken(examples, taken.blueprint).tensors
                # Else they are compiled, say, or something that a record holds reads what they make.
                self.leaves_out = all(n in short and torch.equal(short[n], taken.tensors[n]) for n in self.needed)
        if not self.leaves_out:
            behind.clear()
        layout = layout_of(self.source, taken, self.needed, self.storage)
        self.learned[size] = self.reads.sizes.setdefault(size, {})[self.storage] = taken.blueprint, layout

    def _batch(self, examples: Examples) -> dict[str, Any]:
        return dict(send_to_device(dict(self.collate([dict(example) for example in examples])), self.device))

    def _taken(self, examples: Examples, known: Any = None) -> Capture | Pass:
        with as_it_was(self.model), torch.no_grad(), self._precision(), seeded():
            return self.source.capture(self._batch(examples), known)

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.autocast) if self.autocast is not None else nullcontext()

    def _what_is_read(self, taken: Any, examples: Examples) -> set[str]:
        """Return the names of what the lane, the splice or the head reads of a frozen pass.

        Raises:
            UserError: The model says something else of the record than of the images.
        """
        batch = self._batch(examples)
        with as_it_was(self.model), torch.no_grad(), self._precision():
            read, found = self.source.read(taken, {**batch, self.image: _blank(batch[self.image].shape, self.model)})
            with seeded():
                expected = self.model(**batch)
        if not _agree(found, expected):
            raise UserError(
                f"model={type(self.model).__name__}: says something else when its backbone is read from a record than "
                "when it runs: it reads the image beside the backbone, or draws at random. Train without a cache."
            )
        return read

    def fingerprint(self) -> dict[str, Any]:
        """Everything of the model that decides what is in a record, by name."""
        own = {"storage": self.storage, "autocast": str(self.autocast) if self.autocast else None}
        return {**self.source.fingerprint(), "reads": sorted(self.needed or ()), **own}


class Beside:
    """The frozen backbone of a model with a highway. A record holds what the highway, the splice or the head reads.

    Args:
        model: The adapted model.

    Raises:
        ValueError: It has several such backbones.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = layers_of(model)
        if len(layers) != 1:
            raise ValueError(
                f"model={type(model).__name__}: has {len(layers)} backbones with a highway, and a cache needs one. "
                "Train without a cache."
            )
        self.model, self.layer = model, layers[0]
        self.norm, self.widths = self.layer.tap_norm, [stage.width for stage in self.layer.stages]

    def capture(self, batch: Mapping[str, Any], known: Blueprint | None = None) -> Capture:
        """Run the backbone of a batch and take down all that may be read of it.

        Args:
            batch: The model's arguments.
            known: The blueprint of images of this size, see `Capture`.
        """
        capture = Capture(known)
        with SOURCE.set(capture):
            try:
                self.model(**batch)
            except Captured:
                return capture
        raise ValueError(f"model={type(self.model).__name__}: its forward did not run the backbone.")

    def read(self, capture: Capture, batch: Mapping[str, Any]) -> tuple[set[str], Any]:
        """Find out what the model reads of a frozen pass, in training and in evaluation; it stays in evaluation mode.

        Args:
            capture: A frozen pass of a batch.
            batch: The batch; its images are not looked at.

        Returns:
            The names, and the model's outputs in evaluation.
        """
        own = {name: tensor.clone() for name, tensor in capture.tensors.items()}  # each in memory of its own
        always = {name for name in own if not name.startswith(("output.", "tail", "end."))}
        probe = _Probe(capture.blueprint, own, len(next(iter(own.values()))))
        watch = _Touched({name: tensor for name, tensor in own.items() if name not in always})
        outputs = None
        for training in (True, False):
            set_mode(self.model, training)
            with SOURCE.set(probe), watch, seeded():
                outputs = self.model(**batch)
        return (always | watch.touched) - probe.made, outputs

    def fingerprint(self) -> dict[str, Any]:
        """Everything of the backbone and of how it is read that decides what is in a record, by name."""
        layer = self.layer
        return {
            "backbone": checksum(frozen_weights(layer)),
            "config": config_checksum(layer.exit),
            "family": layer.family.name,
            "taps": list(layer.taps),
            "tap_norm": layer.tap_norm,
            "live_blocks": layer.live_blocks,
            "depth": list(layer.depth),
        }


def _refuse_coarser(highways: Mapping[str, nn.Module], storage: str) -> None:
    """Refuse a cache that shows an adapter less of its taps than it will read after training."""
    for name, highway in highways.items():
        if storage == "int4" != highway.tap_storage:
            raise UserError(
                f"storage='int4': adapter {name!r} has tap_storage={highway.tap_storage!r}, so that after training on "
                "taps in 4 bits it would read others. Give it tap_storage='int4', or take storage='int8'."
            )


def layout_of(source: Beside | Units, taken: Capture | Pass, read: Collection[str], storage: str) -> Layout:
    """Return the layout of records, of what is read of a frozen pass."""
    tensors = {name: tensor for name, tensor in taken.tensors.items() if name in read}
    return Layout(tensors, storage, source.norm, source.widths)


class FromCache(Hook):
    """A pre-hook, with keywords, on the model: where a batch holds records, the backbone is read from them.

    Attributes:
        sizes: (H, W) of an image -> storage -> how its record is to be read.
    """

    def __init__(self, image: str) -> None:
        self.image = image
        self.sizes: dict[tuple[int, int], dict[str, tuple[Blueprint | Returned, Layout]]] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take the records out of the arguments."""
        _close(module)  # what an interrupt, behind which no hook is called, left open
        rows, image = kwargs.pop(RECORD, None), kwargs.get(self.image)
        refuse_placeholder(args, {})
        if rows is None:
            if isinstance(image, Tensor) and image.dtype == torch.bool:
                raise ValueError(
                    f"{RECORD}: is missing from the batch of a cached dataset, whose {self.image} is a placeholder. "
                    "The Trainer drops what the model's forward does not name: set remove_unused_columns=False in "
                    "TrainingArguments, and let the data collator pass it on."
                )
            return None
        if not isinstance(image, Tensor) or image.dim() != 4:
            raise ValueError(f"{self.image}: is missing from a batch that has {RECORD}. Pass on both.")
        blueprint, layout = self._find(image, rows)
        for layer in layers_of(module) if layout.storage == "int4" else ():
            _refuse_coarser({name: layer.adapters()[name] for name in layer.active_adapters}, layout.storage)
        context = blueprint.given(module, layout.unpack(rows), len(rows))
        context.__enter__()
        _OPEN.set((*_OPEN.get(), (module, context)))
        return args, {**kwargs, self.image: _blank(image.shape, module)}

    def _find(self, image: Tensor, rows: Tensor) -> tuple[Blueprint | Returned, Layout]:
        size = (image.shape[-2], image.shape[-1])
        for blueprint, layout in self.sizes.get(size, {}).values():
            if layout.bytes == rows.shape[1]:
                return blueprint, layout
        raise ValueError(
            f"{RECORD}: records of {rows.shape[1]} bytes of images of {size[0]}x{size[1]} px are not of a cache that "
            "was opened for this model. Images of one batch must have one size: padding changes what a backbone sees. "
            "Call e3va_peft.cached(dataset, model, ...) in this process; use batches of one image, or of equal sizes."
        )


class Forget(Hook):
    """A hook, always called, that ends what `FromCache` began."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forget the records of the batch."""
        _close(module)


def _close(model: nn.Module) -> None:
    """Close the contexts that a model's forward has opened, and those inside of it."""
    opened = _OPEN.get()
    first = next((i for i, (module, _) in enumerate(opened) if module is model), len(opened))
    _OPEN.set(opened[:first])
    for _, context in reversed(opened[first:]):
        with suppress(ValueError):  # it was opened in another context, such as that of an asyncio task
            context.__exit__(None, None, None)


def _hook(model: nn.Module, image: str) -> FromCache:
    """Return the hook of a model, put there if it has none."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, FromCache) and hook.image == image:
            return hook
    reads = FromCache(image)
    model.register_forward_pre_hook(reads, with_kwargs=True, prepend=True)  # in front of `ImageGuard`
    model.register_forward_hook(Forget(), always_call=True)
    return reads


class _Probe(Replay):
    """A replay that finds out which outputs the live blocks make."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tensors = {name: [value] if name.startswith(TAP) else value for name, value in self.tensors.items()}
        self.made: set[str] = set()

    def choose(self, name: str, leaf: Any) -> Any:
        """Return a leaf of the outputs: as the live blocks made it, or as it was recorded."""
        if self.blueprint.live and isinstance(leaf, Tensor) and not leaf.isnan().any():
            self.made.add(name)
            return leaf
        return super().choose(name, leaf)


class _Touched(TorchDispatchMode):
    """Notes which of some tensors any operation reads."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {memory(tensor)[0]: name for name, tensor in tensors.items()}
        self.touched: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_flatten((args, kwargs))[0]:
            if isinstance(value, Tensor) and (name := self.names.get(memory(value)[0])):
                self.touched.add(name)
        return func(*args, **(kwargs or {}))


def _blank(shape: Sequence[int], model: nn.Module) -> Tensor:
    """Return an image that nobody looks at: one zero, shown everywhere."""
    parameter = next(p for p in own_parameters(model).values() if p.is_floating_point())
    return torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(*shape)


def _agree(found: Any, expected: Any) -> bool:
    left, right = tree_flatten(found)[0], tree_flatten(expected)[0]
    for a, b in zip(left, right, strict=True):
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape:
            return False
        if a.numel() and not (a.double() - b.double()).abs().max() <= _TOLERANCE * b.double().abs().max() + 1e-6:
            return False
    return True
