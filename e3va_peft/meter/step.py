"""Cost of one training step: bytes kept for backward, peak of live bytes, milliseconds.

Bytes are counted from the storages of the tensors themselves, so they are the same in every run. They leave out what
an allocator adds (rounding, fragmentation, the CUDA context) and the scratch space inside a kernel: expect
`torch.cuda.max_memory_allocated`, which is reported beside them on a GPU, to be somewhat larger.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

MIB = 2**20

Batch: TypeAlias = Mapping[str, Any] | tuple[Any, ...] | Tensor
Kind = Literal["parameters", "gradients", "optimizer", "activations"]


@dataclass(frozen=True)
class StepReport:
    """The cost of one training step. Memory in bytes, times in milliseconds.

    Attributes:
        saved_bytes: Kept by autograd between forward and backward: each storage once and whole, parameters and buffers
            excluded. What an `autograd.Function` hides in an attribute of `ctx` is not seen here, but is in the peak.
        peak_bytes: Peak of live tensor bytes over forward, backward and optimizer step.
        peak_parameters: Part of the peak: parameters and buffers.
        peak_gradients: Part of the peak: gradients of parameters.
        peak_optimizer: Part of the peak: optimizer state.
        peak_activations: Part of the peak: everything else, that is the batch, activations, their gradients, and the
            temporaries of the optimizer.
        trainable_parameters: Number of elements in parameters that require a gradient.
        forward_ms: Median time of forward and loss.
        backward_ms: Median time of backward.
        optimizer_ms: Median time of the optimizer step.
        cuda_peak_bytes: Peak of what CUDA's caching allocator had handed out during the timed steps, summed over the
            devices of the parameters: all that was allocated before is in it, but not the optimizer's state and the
            gradients that the meter sets aside meanwhile. CUDA's own record of the peak is reset. None without CUDA.
    """

    saved_bytes: int
    peak_bytes: int
    peak_parameters: int
    peak_gradients: int
    peak_optimizer: int
    peak_activations: int
    trainable_parameters: int
    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    cuda_peak_bytes: int | None = None

    @property
    def step_ms(self) -> float:
        """Time of a step in ms: forward, backward and optimizer step."""
        return self.forward_ms + self.backward_ms + self.optimizer_ms

    def to_dict(self) -> dict[str, int | float | None]:
        """Return all fields and `step_ms`, ready for JSON or a data frame."""
        return {**asdict(self), "step_ms": self.step_ms}

    def __str__(self) -> str:
        """Format for reading: MiB (2**20 bytes) and ms."""
        cuda = "" if self.cuda_peak_bytes is None else f"CUDA's own peak     {self.cuda_peak_bytes / MIB:10.2f} MiB\n"
        return (
            f"saved for backward  {self.saved_bytes / MIB:10.2f} MiB\n"
            f"peak of a step      {self.peak_bytes / MIB:10.2f} MiB"
            f" = {self.peak_parameters / MIB:.2f} parameters + {self.peak_gradients / MIB:.2f} gradients"
            f" + {self.peak_optimizer / MIB:.2f} optimizer + {self.peak_activations / MIB:.2f} activations\n"
            f"{cuda}"
            f"time of a step      {self.step_ms:10.2f} ms "
            f" = {self.forward_ms:.2f} forward + {self.backward_ms:.2f} backward + {self.optimizer_ms:.2f} optimizer\n"
            f"trainable           {self.trainable_parameters:10,} parameters"
        )


def measure_step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    *,
    loss_fn: Callable[[Any], Tensor] | None = None,
    autocast_dtype: torch.dtype | None = None,
    repeats: int = 5,
    warmup: int = 1,
) -> StepReport:
    """Measure memory and time of one training step, and leave everything as it was.

    The step is the one that a Trainer takes: `model.train()`, no gradients at the start, forward and loss (the outputs
    are dropped), backward, optimizer step with its state in place. Parameters, buffers, gradients, optimizer state,
    training mode and torch's random state are put back at the end, also after an exception. Do not call it between the
    forward and the backward of a step of your own: a step changes parameters in place.

    Args:
        model: Module to train, on its device.
        batch: Keyword arguments for `model`, or a tensor or tuple of positional arguments; on the model's device.
        optimizer: Optimizer over the trainable parameters of `model`.
        loss_fn: Maps the outputs of `model` to a scalar. By default the loss is `outputs.loss` or `outputs["loss"]`.
        autocast_dtype: Run forward and loss under autocast with this dtype.
        repeats: Number of timed steps; times are their medians.
        warmup: Number of steps before anything is measured. The first creates the optimizer's state.

    Raises:
        TypeError: If `batch` is neither a mapping nor a tuple nor a tensor, or the loss is not a tensor.
        ValueError: If `repeats` or `warmup` is below 1; `optimizer` holds no trainable parameter of `model`; the
            outputs hold no loss; or the loss is not one finite number that depends on a trainable parameter.
    """
    _check_counts(repeats=repeats, warmup=warmup)
    inputs = _arguments(batch)
    parameters = _parameters(model, optimizer)
    devices = _cuda_devices(parameters)
    forward = partial(_forward, model, inputs, loss_fn, parameters[0].device.type, autocast_dtype)
    step = partial(take_step, forward, optimizer, parameters, devices)
    aside = _bytes_on_cuda([*(p.grad for p in parameters), *tree_leaves(list(optimizer.state.values()))])
    with _untouched(model, optimizer, parameters, devices):
        _check_loss(forward())
        for _ in range(warmup):
            step()
        fixed = [*parameters, *model.buffers()]
        saved_bytes = count_saved(forward, fixed)
        peak = count_peak(step, parameters, fixed, optimizer, inputs).split()
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        times = [step() for _ in range(repeats)]
        cuda_peak = sum(torch.cuda.max_memory_allocated(device) for device in devices) - aside if devices else None
    forward_ms, backward_ms, optimizer_ms = (statistics.median(column) for column in zip(*times, strict=True))
    return StepReport(
        saved_bytes=saved_bytes,
        peak_bytes=sum(peak.values()),
        **{f"peak_{kind}": size for kind, size in peak.items()},
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        forward_ms=forward_ms,
        backward_ms=backward_ms,
        optimizer_ms=optimizer_ms,
        cuda_peak_bytes=cuda_peak,
    )


def _forward(
    model: nn.Module,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    loss_fn: Callable[[Any], Tensor] | None,
    device_type: str,
    autocast_dtype: torch.dtype | None,
) -> Tensor:
    """Run forward and loss."""
    with nullcontext() if autocast_dtype is None else torch.autocast(device_type, autocast_dtype):
        outputs = model(*inputs[0], **inputs[1])
        return _loss(outputs) if loss_fn is None else loss_fn(outputs)


def _bytes_on_cuda(leaves: Iterable[object]) -> int:
    storages = _storages(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda)
    return sum(storage.nbytes() for storage in storages.values())


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}: pass {name}=1 for the quickest measurement")


def _arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split a batch into positional and keyword arguments, detached: no gradient lands on the caller's tensors."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Tensor):
        args = (batch,)
    elif isinstance(batch, tuple):
        args = batch
    elif isinstance(batch, Mapping):
        kwargs = dict(batch)
    else:
        raise TypeError(
            f"batch must be a mapping, a tuple or a tensor, got {type(batch).__name__}: "
            "pass tuple(batch) for several positional arguments, (batch,) for one"
        )

    def detach(leaf: Any) -> Any:
        return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf

    detached: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(detach, (args, kwargs))
    return detached


def _parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters of the model and those that only the optimizer holds (of a loss, say), each once."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not trainable:
        raise ValueError(
            f"model ({type(model).__name__}) has no trainable parameter: set requires_grad on what is to be trained"
        )
    if {id(parameter) for parameter in trainable}.isdisjoint(id(parameter) for parameter in held):
        raise ValueError(
            f"optimizer ({type(optimizer).__name__}) holds none of the {len(trainable)} trainable parameters of model "
            f"({type(model).__name__}): build it from this model's parameters, after adapters were injected"
        )
    return list({id(parameter): parameter for parameter in [*model.parameters(), *held]}.values())


def _cuda_devices(parameters: Iterable[nn.Parameter]) -> set[torch.device]:
    return {parameter.device for parameter in parameters if parameter.is_cuda}


def _loss(outputs: Any) -> Any:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        keys = f" with keys {list(outputs)}" if isinstance(outputs, Mapping) else ""
        raise ValueError(
            f"the outputs of model hold no loss, got {type(outputs).__name__}{keys}: "
            "put labels into batch, or pass loss_fn"
        )
    return loss


def _check_loss(loss: Tensor) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss must be a tensor, got {type(loss).__name__}: return a scalar tensor from loss_fn")
    if loss.numel() != 1:
        raise ValueError(f"the loss must be a scalar, got shape {tuple(loss.shape)}: reduce it in loss_fn")
    if not loss.requires_grad:
        raise ValueError(
            "the loss depends on no trainable parameter, got requires_grad=False: "
            "train a parameter that the loss uses, and call outside torch.no_grad()"
        )
    if not loss.is_meta and not math.isfinite(loss.item()):
        raise ValueError(
            f"the loss must be finite, got {loss.item()}: check batch and weights, or use another autocast_dtype"
        )


def take_step(
    forward: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    devices: set[torch.device],
) -> tuple[float, float, float]:
    """Take one step from no gradients to no gradients; return ms of forward, backward and optimizer step."""

    def now() -> float:
        for device in devices:
            torch.cuda.synchronize(device)
        return time.perf_counter() * 1e3

    start = now()
    loss = forward()
    after_forward = now()
    loss.backward()
    after_backward = now()
    optimizer.step()
    after_optimizer = now()
    _drop_gradients(parameters)
    return after_forward - start, after_backward - after_forward, after_optimizer - after_backward


def _drop_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


@contextmanager
def _untouched(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    devices: set[torch.device],
) -> Iterator[None]:
    """Enter training mode without gradients; at the end put back everything that a step changes."""
    training = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    gradients = [parameter.grad for parameter in parameters]
    state = optimizer.state
    groups = [(group, dict(group)) for group in optimizer.param_groups]
    # Whole storages, and in host memory: ties and expanded views need no care, and the device sees nothing of it.
    contents = [
        (storage, torch.UntypedStorage(storage.nbytes()).copy_(storage))
        for storage in _storages([*parameters, *model.buffers()]).values()
        if storage.device.type != "meta"
    ]
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        try:
            _drop_gradients(parameters)
            model.train()
            # The steps work on a copy of the state; the original is set aside and never written.
            optimizer.state = defaultdict(dict, {key: copy.deepcopy(value) for key, value in state.items()})
            yield
        finally:
            optimizer.state = state
            for group, options in groups:
                group.clear()
                group.update(options)
            for module, mode in training:
                module.training = mode
            for module, tensors in buffers:
                module._buffers.update(tensors)
            for storage, content in contents:
                storage.copy_(content)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Return the unique storages by `id`: torch keeps one Python object per storage for as long as it lives."""
    storages = (plain.untyped_storage() for tensor in tensors for plain in _plain_tensors(tensor))
    return {id(storage): storage for storage in storages}


def _plain_tensors(tensor: Any) -> Iterator[Tensor]:
    """Iterate over the tensors that hold a tensor's numbers: one that wraps others has a made-up storage itself."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, name))
        return
    yield tensor
    if (state := getattr(tensor, "quant_state", None)) is not None:  # bitsandbytes keeps scales beside 4-bit weights
        yield from (value for value in state.as_dict().values() if isinstance(value, Tensor))


@dataclass(eq=False)
class _Saved:
    """Stands for one tensor in the graph: when the graph lets go of it, so does the count."""

    tensor: Tensor


def count_saved(forward: Callable[[], Tensor], fixed: list[Tensor]) -> int:
    """Count the bytes that autograd holds at the end of a forward, without the storages of `fixed`."""
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        alive.add(saved)
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = forward()
    storages = _storages(saved.tensor for saved in alive)
    del loss  # until here it held the graph
    excluded = _storages(fixed)
    return sum(storage.nbytes() for key, storage in storages.items() if key not in excluded)


def live_bytes(function: Callable[[], object], model: nn.Module) -> list[int]:
    """Run a function once and return how many bytes of tensors are alive after each operation of it.

    The parameters and buffers of `model` are left out. The maximum is the peak; as a curve it shows what a training
    step holds, and when it lets go.

    Args:
        function: What to run: inference, or a training step.
        model: Module that it uses.
    """
    meter = _LiveBytes()
    meter.track([*model.parameters(), *model.buffers()], "parameters")
    weights = meter.totals.pop()
    with _collector_off(), meter:
        function()
    return [total - weights for total in meter.totals]


@contextmanager
def _collector_off() -> Iterator[None]:
    """Keep the garbage collector out: tensors in reference cycles die when it runs, so two calls may differ."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def count_peak(
    step: Callable[[], object],
    parameters: list[nn.Parameter],
    fixed: list[Tensor],
    optimizer: torch.optim.Optimizer,
    batch: object,
) -> _LiveBytes:
    """Take a step and return the meter that watched it."""
    meter = _LiveBytes()
    meter.track(fixed, "parameters")
    meter.track(tree_leaves(list(optimizer.state.values())), "optimizer")
    meter.track(tree_leaves(batch), "activations")
    hooks = [
        parameter.register_post_accumulate_grad_hook(meter.label_gradient)
        for parameter in parameters
        if parameter.requires_grad
    ]
    try:
        with _collector_off(), meter:
            step()
    finally:
        for hook in hooks:
            hook.remove()
    return meter


@dataclass
class _Entry:
    nbytes: int
    kind: Kind
    reference: weakref.ref[torch.UntypedStorage]


class _LiveBytes(TorchDispatchMode):
    """Count the bytes of the storages that are alive, each once, and remember their split at the peak.

    Holds no tensor: weak references to storages tell when they die. Storages count with their size at first sight; a
    later resize, which hardly anything but FSDP does, is ignored.

    Attributes:
        totals: Live bytes after each operation, in the order in which they ran.

    Source: the technique of `torch.distributed._tools.mem_tracker`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.totals: list[int] = []
        self._live: dict[int, _Entry] = {}
        self._total = 0
        self._peak = 0
        self._at_peak: list[_Entry] = []

    def track(self, leaves: Iterable[object], kind: Kind) -> None:
        """Count the tensors among `leaves` whose storage is new."""
        for key, storage in _storages(leaf for leaf in leaves if isinstance(leaf, Tensor)).items():
            if key not in self._live:
                reference = weakref.ref(storage, partial(self._forget, key))
                self._live[key] = _Entry(storage.nbytes(), kind, reference)
                self._total += storage.nbytes()
        self.totals.append(self._total)
        if self._total > self._peak:
            self._peak = self._total
            self._at_peak = list(self._live.values())

    def label_gradient(self, parameter: Tensor) -> None:
        """Relabel a parameter's gradient, also at a peak already seen: it was computed before it was accumulated."""
        if parameter.grad is not None:
            self.track([parameter.grad], "gradients")
            self._live[id(parameter.grad.untyped_storage())].kind = "gradients"

    def split(self) -> dict[Kind, int]:
        """Return the bytes of each kind at the peak."""
        split: dict[Kind, int] = {"parameters": 0, "gradients": 0, "optimizer": 0, "activations": 0}
        for entry in self._at_peak:
            split[entry.kind] += entry.nbytes
        return split

    def _forget(self, key: int, _reference: object) -> None:
        self._total -= self._live.pop(key).nbytes

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Inputs too: a tensor that a module or loss_fn keeps for itself is part of the step once it is used.
        self.track(tree_leaves((args, kwargs, result)), "activations")
        return result
