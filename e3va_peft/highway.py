"""The method: adapter -> stage -> highway, and the lane that runs on it. Pure torch: tensors in, tensors out.

Notation of the paper (arXiv 2306.09729): `C` width of a stage, `r` rank, `k` bottleneck, `N` tokens, `x` the frozen
residual stream, `z` the lane:

    adapter   A(t) = GELU(t U1 V1 + b1) U2 V2 + b2          dual low-rank
    lane      z_l  = z_{l-1} + A(attention_l) + A'(mlp_l)   or, with one tap per block, + A(attention_l + mlp_l)
    merging   z    = PM(x + z) - PM(x)                      PM: the backbone's own frozen patch merging

*Inferred*, because the paper gives neither code nor these details: k = C/2, the place of GELU, no LayerNorm inside the
adapter, the lane starting at zero, the initialisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from e3va_peft.storage import STORAGES, pack, unpack


def under_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _compute_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype a matmul with `parameter` runs in: autocast's where it is on, else the parameter's own."""
    return torch.get_autocast_dtype(parameter.device.type) if under_autocast(parameter) else parameter.dtype


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _bottleneck(tap: Tensor, u1: Tensor, v1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """(M, C) -> (M, r), (M, k): the first projection `p = t U1` and the pre-activation `h = p V1 + b1`."""
    p = tap @ u1
    return p, torch.addmm(b1, p, v1)


class _SumOfAdapters(torch.autograd.Function):
    """Sum of the adapters of consecutive taps, n x (M, C) -> (M, C), that keeps nothing but the taps.

    All adapters of a stage receive the same gradient, because the lane only adds them up. So the last factors of all
    of them are one matmul, forward and backward, and everything between tap and sum is computed again in backward.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.dtype = dtype
        return _sum_of_adapters(dtype, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: each access unpacks them again
        parameters, taps = _split(saved)
        dtype = ctx.dtype
        with _no_autocast(grad):
            u1, v1, b1, u2, v2 = (p.to(dtype) for p in parameters[:5])
            n, r, width = v2.shape
            grad = grad.to(dtype).reshape(-1, width)  # (M, C)
            grad_reduced = grad @ v2.reshape(n * r, width).T  # (M, n * r)
            reduced, grad_u1, grad_v1, grad_b1, grad_u2 = [], [], [], [], []
            for i, tap in enumerate(taps):
                t = unpack(tap, width, dtype).reshape(-1, width)
                grad_q = grad_reduced[:, i * r : (i + 1) * r]
                p, h = _bottleneck(t, u1[i], v1[i], b1[i])
                activated = F.gelu(h)
                reduced.append(activated @ u2[i])
                grad_u2.append(grad_q.T @ activated)  # transposed: a third faster with the thin factor on the left
                grad_h = torch.ops.aten.gelu_backward(grad_q @ u2[i].T, h)
                grad_b1.append(grad_h.sum(0))
                grad_v1.append(p.T @ grad_h)
                grad_u1.append((grad_h @ v1[i].T).T @ t)  # transposed
            grad_v2 = (torch.cat(reduced, dim=1).T @ grad).reshape(n, r, width)
            grad_b2 = grad.sum(0).expand(n, width)
            grads = [
                torch.stack(grad_u1).mT,
                torch.stack(grad_v1),
                torch.stack(grad_b1),
                torch.stack(grad_u2).mT,
                grad_v2,
                grad_b2,
            ]
        kept = [g.to(p.dtype) for g, p in zip(grads, parameters, strict=True)]
        return (None, *kept, *(None for _ in saved[len(kept) :]))


def _split(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Sequence[Tensor]]]:
    """Split what a `_SumOfAdapters` works on: the six stacked factors, and what is kept of each tap."""
    parameters, kept = tensors[:6], tensors[6:]
    per_tap = len(kept) // len(parameters[0])
    return parameters, [kept[i : i + per_tap] for i in range(0, len(kept), per_tap)]


def _sum_of_adapters(dtype: torch.dtype, tensors: Sequence[Tensor]) -> Tensor:
    (u1, v1, b1, u2, v2, b2), taps = _split(tensors)
    width = u1.shape[1]
    with _no_autocast(u1):
        reduced = [_reduce(unpack(tap, width, dtype), dtype, u1[i], v1[i], b1[i], u2[i]) for i, tap in enumerate(taps)]
        return _expand(reduced, dtype, v2, b2)


def _reduce(tap: Tensor, dtype: torch.dtype, u1: Tensor, v1: Tensor, b1: Tensor, u2: Tensor) -> Tensor:
    """(..., C) -> (..., r): an adapter up to its last factor, `GELU(t U1 V1 + b1) U2`."""
    flat = tap.to(dtype).reshape(-1, tap.shape[-1])
    _, h = _bottleneck(flat, u1.to(dtype), v1.to(dtype), b1.to(dtype))
    return (F.gelu(h) @ u2.to(dtype)).view(*tap.shape[:-1], -1)


def _expand(reduced: Sequence[Tensor], dtype: torch.dtype, v2: Tensor, b2: Tensor) -> Tensor:
    """N x (..., r) -> (..., C): the last factors of n adapters and their sum, as one matmul."""
    joined = torch.cat(list(reduced), dim=-1)
    flat = torch.addmm(b2.to(dtype).sum(0), joined.flatten(0, -2), v2.to(dtype).flatten(0, 1))
    return flat.view(*joined.shape[:-1], -1)


class Stage(nn.Module):
    """The adapters of one stage: one per tap, their factors stacked along the first dimension.

    Args:
        width: Channels C of the stage.
        num_adapters: Adapters n = blocks * taps per block, in the order in which the lane meets them.
        r: Rank of both projections.
        bottleneck: Width k between the projections.
        init_weights: Zero the last factor, so that the lane starts at exactly zero.
    """

    FACTORS = ("u1", "v1", "bias1", "u2", "v2", "bias2")

    def __init__(self, width: int, num_adapters: int, r: int, bottleneck: int, init_weights: bool = True) -> None:
        super().__init__()
        self.u1 = nn.Parameter(torch.empty(num_adapters, width, r))
        self.v1 = nn.Parameter(torch.empty(num_adapters, r, bottleneck))
        self.bias1 = nn.Parameter(torch.empty(num_adapters, bottleneck))
        self.u2 = nn.Parameter(torch.empty(num_adapters, bottleneck, r))
        self.v2 = nn.Parameter(torch.empty(num_adapters, r, width))
        self.bias2 = nn.Parameter(torch.empty(num_adapters, width))
        self.reset_parameters(init_weights)

    def reset_parameters(self, init_weights: bool = True) -> None:
        """Draw U1, V1, U2 Kaiming-uniform over their inputs and zero the rest (*inferred*)."""
        for factor in (self.u1, self.v1, self.u2):
            bound = (6 / factor.shape[1]) ** 0.5
            nn.init.uniform_(factor, -bound, bound)
        nn.init.zeros_(self.bias1)
        if init_weights:
            nn.init.zeros_(self.v2)
            nn.init.zeros_(self.bias2)
        else:
            nn.init.normal_(self.v2, std=0.1)
            nn.init.normal_(self.bias2, std=0.1)

    def reduce(self, index: int, tap: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, r): adapter `index` up to its last factor, for when no gradient is wanted."""
        dtype = _compute_dtype(self.u1)  # outside: inside, autocast is off and has no say
        with _no_autocast(tap):
            return _reduce(tap, dtype, self.u1[index], self.v1[index], self.bias1[index], self.u2[index])

    def expand(self, start: int, reduced: Sequence[Tensor]) -> Tensor:
        """N x (B, N, r) -> (B, N, C): sum of the adapters `start`, `start + 1`, ... from what `reduce` made."""
        dtype = _compute_dtype(self.v2)  # outside: inside, autocast is off and has no say
        v2, bias2 = (p[start : start + len(reduced)] for p in (self.v2, self.bias2))
        with _no_autocast(v2):
            return _expand(reduced, dtype, v2, bias2)

    def forward(self, start: int, taps: Sequence[Sequence[Tensor]]) -> Tensor:
        """N x (B, N, C) -> (B, N, C): sum of the adapters `start`, `start + 1`, ... of these taps.

        Args:
            start: Index of the first adapter.
            taps: What is kept of each tap (`storage.pack`).
        """
        parameters: tuple[Tensor, ...] = (self.u1, self.v1, self.bias1, self.u2, self.v2, self.bias2)
        if len(taps) < len(self.u1):
            parameters = tuple(p[start : start + len(taps)] for p in parameters)
        return _SumOfAdapters.apply(_compute_dtype(self.u1), *parameters, *(t for tap in taps for t in tap))


class Highway(nn.Module):
    """All adapters of all stages of one backbone.

    Args:
        widths: Channels C of each stage.
        num_adapters: Adapters of each stage.
        r: Rank of both projections.
        bottleneck_ratio: k / C.
        init_weights: See `Stage`.
        tap_storage: How its taps are kept for backward, see `storage.pack`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_adapters: Sequence[int],
        r: int = 16,
        bottleneck_ratio: float = 0.5,
        init_weights: bool = True,
        tap_storage: str = "exact",
    ) -> None:
        super().__init__()
        self.tap_storage = tap_storage
        self.stages = nn.ModuleList(
            Stage(width, n, r, max(1, int(width * bottleneck_ratio)), init_weights)
            for width, n in zip(widths, num_adapters, strict=True)
        )

    @property
    def trainable(self) -> bool:
        """Whether any factor wants a gradient (by attribute, because a replica's tensors are no parameters)."""
        stages = [self.stage(i) for i in range(len(self.stages))]
        return any(getattr(stage, name).requires_grad for stage in stages for name in Stage.FACTORS)

    def stage(self, index: int) -> Stage:
        """Return the adapters of one stage."""
        return cast(Stage, self.stages[index])


class Taps:
    """What one forward of the frozen backbone leaves for the highway.

    With `keep` it holds each tap until the lane has used it. Without, when no gradient is wanted, it reduces each tap
    to (B, N, r) at once, so that inference never holds more than one, and rounds nothing. Either way it holds what
    enters and leaves patch merging.
    """

    def __init__(self, highways: Sequence[Highway], taps_per_block: int, keep: bool) -> None:
        self.highways = highways
        self.taps_per_block = taps_per_block
        self.keep = keep
        # Highways that are active together read the same taps: the one that wants most decides.
        wanted = [STORAGES.index(highway.tap_storage) for highway in highways] if keep else [0]
        self.storage = STORAGES[min(wanted, default=0)]
        self.parts: dict[tuple[int, int], Tensor] = {}
        self.reads: dict[tuple[int, int], Sequence[Tensor]] = {}
        self.mergings: dict[int, tuple[Tensor, tuple[Any, ...], Tensor | None]] = {}
        self.tail: Tensor | None = None

    def read(self, stage: int, index: int, tap: Tensor, half: bool = False) -> None:
        """Take the tap (B, N, C) of adapter `index` of `stage`; with `half`, one of two parts that add up."""
        key = (stage, index)
        if half and key not in self.parts:
            self.parts[key] = tap
            return
        if half:
            tap = self.parts.pop(key) + tap
        if self.keep:
            self.reads[key] = pack(tap, self.storage)
        else:
            self.reads[key] = [highway.stage(stage).reduce(index, tap) for highway in self.highways]

    def read_merging(self, stage: int, x: Tensor, rest: tuple[Any, ...], frozen: Tensor | None) -> None:
        """Take what entered the patch merging behind `stage`, (B, N, C) and other arguments, and what left it.

        Args:
            stage: Its index.
            x: The stream.
            rest: Positional and keyword arguments behind it.
            frozen: The output; None where it was computed in other precision than the lane will.
        """
        self.mergings[stage] = (x, rest, frozen)

    def take(self, stage: int, first_block: int, last_block: int) -> tuple[int, list[Sequence[Tensor]]]:
        """Return and forget what was read in the blocks from `first_block` up to `last_block` (exclusive).

        Returns:
            Index of the first adapter, and for it and each that follows what is kept of its tap.
        """
        indices = range(first_block * self.taps_per_block, last_block * self.taps_per_block)
        missing = [index for index in indices if (stage, index) not in self.reads]
        if missing:
            raise RuntimeError(
                f"stage {stage}: the taps {missing} were not read, so the backbone ran without some of its blocks. "
                "E3VA needs every block's forward to run: remove what skips or replaces blocks (layer pruning, graph "
                "capture, a patched forward)."
            )
        return indices.start, [self.reads.pop((stage, index)) for index in indices]


class Lane:
    """The running tensor `z`, as a cursor over stages and blocks that only moves forward.

    It is kept in at least fp32, whatever the backbone's dtype is.

    Args:
        taps: What the frozen forward left.
        mergings: The frozen patch merging behind each stage, None where there is none.
    """

    def __init__(self, taps: Taps, mergings: Sequence[nn.Module | None]) -> None:
        self.taps = taps
        self.mergings = mergings
        self.stage = 0
        self.block = 0
        self.z: Tensor | None = None

    def advance(self, block: int) -> Tensor:
        """Return the lane (B, N, C) behind the first `block` blocks of the current stage."""
        if block > self.block:
            first, reads = self.taps.take(self.stage, self.block, block)
            for which, highway in enumerate(self.taps.highways):
                stage = highway.stage(self.stage)
                step = stage(first, reads) if self.taps.keep else stage.expand(first, [read[which] for read in reads])
                step = step.to(torch.promote_types(step.dtype, torch.float32))
                self.z = step if self.z is None else self.z + step
            self.block = block
        if self.z is None:
            raise RuntimeError("the lane was asked for before its first block")
        return self.z

    def merge(self) -> Tensor:
        """(B, N, C) -> (B, N', C'): carry the lane through frozen patch merging into the next stage.

        `PM(x + z) - PM(x)`, both terms by the same function, in fp32 and without autocast: a zero lane stays exactly
        zero, and over a bf16 base the difference is not drowned by rounding.
        """
        module = self.mergings[self.stage]
        if self.z is None or module is None:
            raise RuntimeError(
                f"the lane cannot leave stage {self.stage}: it has no patch merging, or no block was run"
            )
        if self.stage not in self.taps.mergings:
            raise RuntimeError(
                f"stage {self.stage}: its patch merging {type(module).__name__} did not run. E3VA needs its forward: "
                "remove what skips or replaces it."
            )
        stream, (args, kwargs), frozen = self.taps.mergings.pop(self.stage)
        x = stream.to(self.z.dtype)
        call = _in_dtype(module, x.dtype)
        with _no_autocast(x):
            if frozen is None or call is not module or x is not stream:  # else the backbone did the same, to the bit
                with torch.no_grad():
                    frozen = call(x, *args, **kwargs)
            y = x + self.z
            # torch.func cannot differentiate layers of packed integers (bitsandbytes); they keep their input then.
            lean = self.taps.storage != "exact" and all(p.is_floating_point() for p in module.parameters())
            merged = _LeanMerging.apply(call, module, args, kwargs, y) if lean else call(y, *args, **kwargs)
            self.z = merged - frozen
        self.stage += 1
        self.block = 0
        return self.z


class _LeanMerging(torch.autograd.Function):
    """`PM(y)` that keeps `y` rounded to int8 and runs again in backward.

    The value is exact. Only the Jacobian, that of the norm inside, is taken at the rounded `y`: the gradient that
    passes to earlier stages is off by about 0.2 % (`test_storage`), the one of the last stage is exact.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: Callable[..., Tensor],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        y: Tensor,
    ) -> Tensor:
        ctx.module, ctx.args, ctx.kwargs = module, args, kwargs
        ctx.save_for_backward(*pack(y, "int8"))
        return call(y, *args, **kwargs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        with _no_autocast(grad):
            y = unpack((codes, scale), codes.shape[-1], grad.dtype)
            call = _in_dtype(ctx.module, y.dtype)  # cast again: weights in another dtype would be held till here
            vjp = torch.func.vjp(lambda y: call(y, *ctx.args, **ctx.kwargs), y)[1]
            return None, None, None, None, vjp(grad)[0]


def _in_dtype(module: nn.Module, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The forward of `module` with its parameters plain and in `dtype`; the module itself where they are already."""
    parameters: Mapping[str, Tensor] = dict(module.named_parameters())
    cast = {name: _plain(p, dtype) for name, p in parameters.items()}
    if all(cast[name] is p for name, p in parameters.items()):
        return module
    return lambda *args, **kwargs: torch.func.functional_call(module, cast, args, kwargs)


def _plain(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a parameter dequantised and in `dtype`; packed integers stay, because only their own layer reads them.

    A quantised tensor (torchao) could multiply by itself, but where it quantises activations too no gradient passes.
    """
    if wraps_quantized(parameter):
        parameter = parameter.dequantize()
    return parameter.to(dtype) if parameter.is_floating_point() else parameter


def wraps_quantized(parameter: Tensor) -> bool:
    """Whether a parameter is a quantised tensor that passes for one of floating point, as torchao's do."""
    return type(parameter).dequantize is not Tensor.dequantize
