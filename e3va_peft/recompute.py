"""Taps that are not kept: backward runs the frozen backbone once more and uses each as it appears. Pure torch.

The lane is a sum, so the gradient at a stage is the same for all its adapters and needs none of their taps. Backward
first carries it through all patch mergings, and only then runs the backbone again: one tap is alive at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from e3va_peft.fused import Gradients, compute_dtype, no_autocast
from e3va_peft.highway import Highway, Stage
from e3va_peft.storage import read_at_once

Keep = Callable[[int, int, Tensor], Sequence[Tensor]]
PARTS, MIN_TOKENS = 8, 512  # an MLP widens tokens four times: an eighth of them weighs as the stream


class Recompute:
    """Everything that backward has to know of one forward to run it again.

    Args:
        highways: The active highways.
        run: (args, kwargs, keep): runs the frozen backbone again and calls keep(stage, index, tap) for each tap.
        args: Arguments of the forward. What of them is a tensor is kept.
        kwargs: Keyword arguments.
    """

    def __init__(
        self,
        highways: Sequence[Highway],
        run: Callable[[Sequence[Any], Mapping[str, Any], Keep], None],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.highways, self.run = highways, run
        values, self.spec = tree_flatten((tuple(args), dict(kwargs)))
        self.values = [None if isinstance(value, Tensor) else value for value in values]
        tensors = [value for value in values if isinstance(value, Tensor)]
        self.places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
        self.stages: list[Stage] = [stage for highway in highways for stage in highway.stages]  # type: ignore[misc]
        self.dtype = compute_dtype(self.stages[0].u1)
        self.state = State(tensors)
        self.grads: dict[tuple[int, int], tuple[int, Tensor]] = {}  # stage, first adapter -> last, gradient of the sum
        self.tensors = tensors

    def handle(self) -> Tensor:
        """Return the tensor that sums are attached to. It is not kept here: its graph holds this object."""
        tensors, self.tensors = self.tensors, []
        return _Handle.apply(self, *tensors, *(factor for stage in self.stages for factor in stage.factors))

    def attach(self, step: Tensor, handle: Tensor, stage: int, first: int, last: int) -> Tensor:
        """Tie the sum of some adapters (B, N, C) to the gradients that backward will compute."""
        return _Attached.apply(step, handle, self, (stage, first), last)

    def gradients(self, saved: Sequence[Tensor]) -> list[Tensor | None]:
        """Run the backbone again and return the gradients of all factors; None of a stage that the loss is not of."""
        values = list(self.values)
        for place, tensor in zip(self.places, saved, strict=False):
            values[place] = tensor
        args, kwargs = tree_unflatten(values, self.spec)
        factors = saved[len(self.places) :]
        per_stage = [factors[i : i + 6] for i in range(0, len(factors), 6)]
        results = [[torch.zeros_like(factor) for factor in stage] for stage in per_stage]
        segments = [Segment(*key, last, grad) for key, (last, grad) in self.grads.items()]
        self.grads = {}

        def keep(stage: int, index: int, tap: Tensor) -> Sequence[Tensor]:
            for segment in segments:
                if segment.stage == stage and segment.first <= index < segment.last:
                    self._add(segment, tap, per_stage, results)
            return ()

        with self.state.restored(), torch.no_grad():
            self.run(args, kwargs, keep)
        if missing := [(segment.stage, segment.first) for segment in segments if not segment.done]:
            raise RuntimeError(
                f"the second run of the backbone, in backward, did not read the taps of {missing} (stage, adapter): "
                "their gradients are not known. Call backward before what removes hooks (unload()) or skips blocks."
            )
        reached = {segment.stage for segment in segments}
        count = len(results) // len(self.highways)  # stages
        return [grad if i % count in reached else None for i, stage in enumerate(results) for grad in stage]

    def _add(
        self, segment: Segment, tap: Tensor, factors: Sequence[Sequence[Tensor]], results: list[list[Tensor]]
    ) -> None:
        """Add the next tap of a segment to the gradients of its adapters, and write them down behind the last."""
        stages = len(factors) // len(self.highways)
        part = slice(segment.first, segment.last)
        with no_autocast(tap):
            for i in range(len(self.highways)):
                at = i * stages + segment.stage
                own = [factor[part] for factor in factors[at]]
                device = own[0].device
                if len(segment.running) == i:
                    segment.running.append(Gradients(own, segment.grad.to(device), self.dtype))
                running = segment.running[i]
                stage = self.stages[at]
                running.add(*read_at_once(tap.to(device), stage.storage, self.dtype, stage.norm))
                if running.complete:
                    for result, value in zip(results[at], running.result(), strict=True):
                        result[part] = value
        if segment.running[-1].complete:
            segment.done, segment.running = True, []


@dataclass
class Segment:
    """Consecutive adapters of a stage whose sum was one step of the lane.

    Attributes:
        stage: The stage.
        first: Index of the first adapter.
        last: Index behind the last.
        grad: Gradient of their sum (B, N, C).
        running: Gradients that their taps have added to so far, of each highway.
        done: All of them have.
    """

    stage: int
    first: int
    last: int
    grad: Tensor
    running: list[Gradients] = field(default_factory=list)
    done: bool = False


class State:
    """Surroundings of a forward: autocast, and the state of the random number generators."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.autocast = {
            device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in {"cpu", *(tensor.device.type for tensor in tensors)}
            if torch.amp.is_autocast_available(device)
        }
        self.random = torch.get_rng_state()
        self.devices, self.device_states = get_device_states(*tensors)
        self.device_type = next((tensor.device.type for tensor in tensors if tensor.device.type != "cpu"), "cuda")

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Bring it back for the time of a `with` statement."""
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(self.devices, device_type=self.device_type))
            torch.set_rng_state(self.random)
            if self.devices:
                set_device_states(self.devices, self.device_states, device_type=self.device_type)
            for device, (enabled, dtype) in self.autocast.items():
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            yield


@contextmanager
def in_parts(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let modules that map each token by itself see a part of them at a time, for the time of a `with` statement.

    The widened tokens of an MLP are most of what a frozen backbone holds at once, and backward holds gradients too.
    Modules that may draw random numbers, which parts would draw otherwise, or that are compiled stay whole.
    """
    changed = [
        module
        for module in modules
        if not any(part.training or part._compiled_call_impl is not None for part in module.modules())
    ]
    with forwards_replaced({module: partial(_in_parts, module.forward) for module in changed}):
        yield


@contextmanager
def forwards_replaced(instead: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Run other functions instead of modules, for the time of a `with` statement."""
    before = {module: vars(module).get("forward") for module in instead}
    for module, function in instead.items():
        module.forward = function
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _in_parts(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(..., C) -> (..., C'): run a forward on up to PARTS parts of the tokens, each of at least MIN_TOKENS."""
    rows = x.reshape(1, -1, x.shape[-1])
    parts = min(PARTS, rows.shape[1] // MIN_TOKENS)
    if parts < 2 or torch.compiler.is_compiling():
        return forward(x)
    output, done = x, 0
    for part in rows.chunk(parts, 1):
        result = forward(part)
        if not done:
            output = result.new_empty(*x.shape[:-1], result.shape[-1])
        output.view(1, -1, result.shape[-1])[:, done : done + part.shape[1]] = result
        done += part.shape[1]
    return output


class _Handle(torch.autograd.Function):
    """A tensor without content that every sum of the lane hangs on: its backward comes when their gradients have."""

    @staticmethod
    def forward(ctx: Any, recompute: Recompute, *tensors: Tensor) -> Tensor:
        ctx.recompute = recompute
        ctx.save_for_backward(*tensors)
        return tensors[-1].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        recompute: Recompute = ctx.recompute
        return (None, *(None for _ in recompute.places), *recompute.gradients(ctx.saved_tensors))


class _Attached(torch.autograd.Function):
    """The sum of some adapters, whose gradient is only noted: `_Handle` does what is to be done with it."""

    @staticmethod
    def forward(
        ctx: Any, step: Tensor, handle: Tensor, recompute: Recompute, key: tuple[int, int], last: int
    ) -> Tensor:
        ctx.recompute, ctx.key, ctx.last = recompute, key, last
        ctx.handle = handle.dtype, handle.device
        return step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.recompute.grads[ctx.key] = ctx.last, grad
        dtype, device = ctx.handle
        return None, torch.zeros((), dtype=dtype, device=device), None, None, None
