"""Fused forms of the formulas of `highway`: the same values and gradients, with less kept and fewer kernels.

A stage keeps nothing for backward but its taps (where it norms them on a CPU, two numbers a token more) and computes
again what is between them and their sum, and so does an adapter in a live block; patch merging, where taps are
rounded, keeps its input in int8. `tests/test_highway.py` compares every function with its plain form in `highway`, in
value and in gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from e3va_peft.frozen_pass import MergingCall
from e3va_peft.storage import pack, read, read_at_once, standardized, unpack, with_statistics


class Merged(NamedTuple):
    """What comes of carrying the lane through patch merging PM.

    Attributes:
        lane: PM(x + z) - PM(x).
        entered: x + z.
        left: PM(x + z); None where PM(x) is not the backbone's own output to the bit.
    """

    lane: Tensor
    entered: Tensor
    left: Tensor | None


class Merging(NamedTuple):
    """Frozen patch merging PM.

    Attributes:
        modules: The modules that `run` is given.
        run: Runs them: (modules, x, grid, *args, **kwargs) -> Tensor, see `backbones.Merging.run`.
        sharded: FSDP has their weights, which are gone by the time of backward, or not there at all.
    """

    modules: Sequence[nn.Module]
    run: Callable[..., Tensor]
    sharded: bool = False


def under_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype that a matmul with `parameter` runs in: autocast's where it is on, else the parameter's own."""
    return torch.get_autocast_dtype(parameter.device.type) if under_autocast(parameter) else parameter.dtype


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off for the device of a tensor."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def sum_of_adapters(factors: Sequence[Tensor], taps: Sequence[Sequence[Tensor]], norm: str = "none") -> Tensor:
    """N x (..., C) -> (..., C): the sum of n adapters of a stage, one autograd node that keeps the taps.

    Args:
        factors: U1, V1, b1, U2, V2, b2 of the n adapters, stacked along the first dimension.
        taps: The kept form of each tap (`storage.keep`).
        norm: How they are read.
    """
    return _SumOfAdapters.apply(compute_dtype(factors[0]), norm, *factors, *(t for tap in taps for t in tap))


def reduce(tap: Tensor, factors: Sequence[Tensor], norm: str = "none", storage: str = "exact") -> Tensor:
    """(..., C) -> (..., r): an adapter up to its last factor, `GELU(n(t) U1 V1 + b1) U2`.

    Where the answer is relative, (..., C) -> (..., r + 1): s times that, and s.

    Args:
        tap: The tap.
        factors: U1, V1, b1, U2 of the adapter.
        norm: How it is read.
        storage: How it is rounded before (`E3VAConfig.tap_storage`).
    """
    dtype = compute_dtype(factors[0])  # outside: inside, autocast is off and has no say
    with no_autocast(tap):
        normed, deviation = read_at_once(tap, storage, dtype, norm)
        reduced = _reduce(normed, deviation, *(factor.to(dtype) for factor in factors))
        return reduced.view(*tap.shape[:-1], reduced.shape[-1])


def expand(reduced: Sequence[Tensor], v2: Tensor, b2: Tensor) -> Tensor:
    """N x (..., r or r + 1) -> (..., C): the last factors of n adapters and their sum, as one matmul.

    Args:
        reduced: The result of `reduce` for each tap.
        v2: (n, r, C).
        b2: (n, C).
    """
    dtype = compute_dtype(v2)  # outside: inside, autocast is off and has no say
    with no_autocast(v2):
        return _expand(reduced, v2.to(dtype), b2.to(dtype))


def _bottleneck(normed: Tensor, u1: Tensor, v1: Tensor, b1: Tensor) -> Tensor:
    """(M, C) -> (M, k): the pre-activation `h = n(t) U1 V1 + b1`."""
    return torch.addmm(b1, normed @ u1, v1)


def _scaled(q: Tensor, scale: Tensor | None) -> Tensor:
    """(M, r) -> (M, r + 1): `s q` and s; without a scale q as it is."""
    if scale is None:
        return q
    scale = scale.to(q.dtype).reshape(-1, 1).expand(len(q), 1)
    return torch.cat((q * scale, scale), dim=1)


def _reduce(normed: Tensor, scale: Tensor | None, u1: Tensor, v1: Tensor, b1: Tensor, u2: Tensor) -> Tensor:
    h = _bottleneck(normed.reshape(-1, normed.shape[-1]), u1, v1, b1)
    return _scaled(F.gelu(h) @ u2, scale)


def _expand(reduced: Sequence[Tensor], v2: Tensor, b2: Tensor) -> Tensor:
    joined = torch.cat(list(reduced), dim=-1)
    if joined.shape[-1] == len(v2) * v2.shape[1]:
        return F.linear(joined, v2.flatten(0, 1).T, b2.sum(0))
    return joined @ torch.cat((v2, b2.unsqueeze(1)), dim=1).flatten(0, 1)


class _Again(NamedTuple):
    """What an adapter computes again in backward: p and q, (M, r), the gradient of p, and those of U1, V1, b1, U2."""

    p: Tensor
    q: Tensor
    grad_p: Tensor
    grads: tuple[Tensor, Tensor, Tensor, Tensor]


class _Tokens(NamedTuple):
    """What an adapter read, (M, C): t, or where its statistics are given `(t - mean) inverse`, which is not computed.

    In its product with U1 the mean goes with that of U1's columns, and in its gradient behind it: two thin products
    instead of a pass over t. Where a token's mean is m deviations off zero, both lose a factor m of fp32's precision.
    """

    t: Tensor
    statistics: tuple[Tensor, Tensor] | None = None  # (M, 1) each: mean, and the inverse of the deviation

    def times(self, u1: Tensor) -> Tensor:
        """(C, r) -> (M, r)."""
        return self.t @ u1 if self.statistics is None else (self.t @ (u1 - u1.mean(0))).mul_(self.statistics[1])

    def under(self, grad: Tensor) -> Tensor:
        """(M, r) -> (r, C): the transposed gradient of U1, from that of their product."""
        if self.statistics is None:
            return _over_tokens(grad, self.t)
        mean, inverse = self.statistics
        grad = grad * inverse
        return _over_tokens(grad, self.t).sub_(grad.T @ mean)


def _again(tokens: _Tokens, grad_q: Tensor, u1: Tensor, v1: Tensor, b1: Tensor, u2: Tensor) -> _Again:
    """Run an adapter again, up to `q = GELU(p V1 + b1) U2`, and back from the gradient of q (M, r)."""
    p = tokens.times(u1)
    h = torch.addmm(b1, p, v1)
    activated = F.gelu(h)
    grad_u2 = _over_tokens(grad_q, activated)  # transposed: a third faster with the thin factor on the left
    grad_h = torch.ops.aten.gelu_backward(grad_q @ u2.T, h)
    grad_p = grad_h @ v1.T
    return _Again(
        p, activated @ u2, grad_p, (tokens.under(grad_p).T, _over_tokens(p, grad_h), grad_h.sum(0), grad_u2.T)
    )


def _over_tokens(left: Tensor, right: Tensor) -> Tensor:
    """(M, a), (M, b) -> (a, b): `left^T right`, by quarters of the tokens on a CPU: twice as fast for a small a."""
    if left.device.type != "cpu" or len(left) < 4:
        return left.T @ right
    if rest := len(left) % 4:
        return _over_tokens(left[:-rest], right[:-rest]).addmm_(left[-rest:].T, right[-rest:])
    quarters = left.view(4, -1, left.shape[1]).transpose(1, 2), right.view(4, -1, right.shape[1])
    return torch.bmm(*quarters).sum(0)


class Gradients:
    """The gradients of the factors of n consecutive adapters, to which one tap after the other adds.

    All adapters of a stage receive the same gradient, because the lane only adds them up. So the last factors of all
    of them are one matmul, and everything between tap and sum is computed again.

    Args:
        factors: U1, V1, b1, U2, V2, b2 of the adapters, stacked along the first dimension.
        grad: (..., C), of their sum.
        dtype: Dtype to compute in.
    """

    def __init__(self, factors: Sequence[Tensor], grad: Tensor, dtype: torch.dtype) -> None:
        self.dtypes = [factor.dtype for factor in factors]
        self.own = list(zip(*(factor.to(dtype).unbind() for factor in factors[:4]), strict=True))
        v2 = factors[4].to(dtype)
        self.n, self.r, self.width = v2.shape
        self.grad = grad.to(dtype).reshape(-1, self.width)  # (M, C)
        self.grad_reduced = (self.grad @ v2.reshape(self.n * self.r, self.width).T).split(self.r, dim=1)  # n x (M, r)
        self.reduced: list[Tensor] = []
        self.found: list[tuple[Tensor, ...]] = []

    def add(self, read: Tensor, scale: Tensor | None, statistics: tuple[Tensor, Tensor] | None = None) -> None:
        """Add what the next adapter read, (..., C), or its tap with mean and inverse deviation; and its scale."""
        i = len(self.found)
        if statistics is not None:
            statistics = statistics[0].reshape(-1, 1), statistics[1].reshape(-1, 1)
        tokens = _Tokens(read.reshape(-1, self.width), statistics)
        grad_q = self.grad_reduced[i]
        if scale is not None:
            grad_q = grad_q * scale.to(grad_q.dtype).reshape(-1, 1)
        again = _again(tokens, grad_q, *self.own[i])
        self.reduced.append(_scaled(again.q, scale))
        self.found.append(again.grads)

    @property
    def complete(self) -> bool:
        """Whether every adapter's tap has been added."""
        return len(self.found) == self.n

    def result(self) -> list[Tensor]:
        """Return the gradients of the six stacked factors."""
        last = (torch.cat(self.reduced, dim=1).T @ self.grad).view(self.n, -1, self.width)
        grad_b2 = last[:, self.r] if last.shape[1] > self.r else self.grad.sum(0).repeat(self.n, 1)
        grads = [*(torch.stack(parts) for parts in zip(*self.found, strict=True)), last[:, : self.r], grad_b2]
        return [grad.to(dtype) for grad, dtype in zip(grads, self.dtypes, strict=True)]


class _SumOfAdapters(torch.autograd.Function):
    """The sum of the adapters of consecutive taps, n x (..., C) -> (..., C).

    Where taps are kept as they are and read on a CPU in full precision, their statistics are kept too, two numbers a
    token, and backward does not norm them again.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, norm: str, *tensors: Tensor) -> Tensor:
        parameters, taps = _split(tensors)
        noted = _noted(taps[0], dtype, norm)
        with no_autocast(tensors[0]):
            *factors, v2, b2 = (p.to(dtype) for p in parameters)
            width, reduced, statistics = v2.shape[2], [], []
            for tap, *own in zip(taps, *(factor.unbind() for factor in factors), strict=True):
                if noted:
                    normed, mean, inverse = with_statistics(tap[0].to(dtype))
                    statistics += [mean, inverse]
                    scale = inverse.reciprocal() if norm == "relative" else None
                else:
                    normed, scale = read(tap, width, dtype, norm)
                reduced.append(_reduce(normed, scale, *own))
            ctx.dtype, ctx.norm, ctx.statistics = dtype, norm, len(statistics)
            ctx.save_for_backward(*statistics, *tensors)
            return _expand(reduced, v2, b2).view(*taps[0][0].shape[:-1], width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # unpacked once: hooks may bring them from elsewhere
        statistics, (parameters, taps) = saved[: ctx.statistics], _split(saved[ctx.statistics :])
        with no_autocast(grad):
            gradients = Gradients(parameters, grad, ctx.dtype)
            for i, tap in enumerate(taps):
                if statistics:
                    mean, inverse = statistics[2 * i : 2 * i + 2]
                    scale = inverse.reciprocal() if ctx.norm == "relative" else None
                    gradients.add(tap[0].to(ctx.dtype), scale, (mean, inverse))
                else:
                    gradients.add(*read(tap, gradients.width, ctx.dtype, ctx.norm))
            return (None, None, *gradients.result(), *(None for tap in taps for _ in tap))


def _noted(kept: Sequence[Tensor], dtype: torch.dtype, norm: str) -> bool:
    """Whether a tap's statistics are kept: not on a GPU, whose matmuls may be in TF32, too coarse to centre by."""
    tap, full = kept[0], torch.finfo(dtype).bits >= 32
    exact = norm != "none" and len(kept) == 1 and torch.promote_types(tap.dtype, dtype) == dtype
    return exact and full and tap.device.type == "cpu"


def answer(tap: Tensor, factors: Sequence[Tensor], norm: str = "none") -> Tensor:
    """(..., C) -> (..., C): what one adapter says to a tap in a live block, one autograd node that keeps what it read.

    Args:
        tap: The tap, which gets a gradient too.
        factors: U1, V1, b1, U2, V2, b2 of the adapter.
        norm: How it is read.
    """
    return _Answer.apply(compute_dtype(factors[0]), norm, tap, *factors)


class _Answer(torch.autograd.Function):
    """An adapter's answer, (..., C) -> (..., C).

    Its gradient for the tap needs no norm's backward. With `p = n(t) U1`, of which `g` is the gradient, that is
    `(g (U1 - mean(U1))^T - n(t) (g . p) / C) / s`, and that of s is `n(t) / C`: a thin matmul and sums over r.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, norm: str, tap: Tensor, *factors: Tensor) -> Tensor:
        with no_autocast(tap):
            normed, scale = (tap, tap.new_ones(1)) if norm == "none" else standardized(tap)
            normed = normed.to(dtype)
            ctx.save_for_backward(normed, scale, *factors)
            ctx.norm, ctx.dtype = norm, tap.dtype
            u1, v1, b1, u2, v2, b2 = (factor.to(dtype) for factor in factors)
            h = _bottleneck(normed.reshape(-1, tap.shape[-1]), u1, v1, b1)
            own = torch.addmm(b2, F.gelu(h) @ u2, v2).view(tap.shape)
            return own * scale if norm == "relative" else own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale, *factors = ctx.saved_tensors
        with no_autocast(grad):
            u1, v1, b1, u2, v2, b2 = (factor.to(normed.dtype) for factor in factors)
            t = normed.reshape(-1, normed.shape[-1])
            relative, s = ctx.norm == "relative", scale.reshape(-1, 1)  # fp16 may not hold 1 / s
            grad = grad.to(t.dtype).reshape(t.shape)
            grad_q = grad @ v2.T
            p, q, grad_p, grads = _again(_Tokens(t), (grad_q * s).to(t.dtype) if relative else grad_q, u1, v1, b1, u2)
            last = _over_tokens(_scaled(q, s if relative else None), grad)
            grad_b2 = last[-1] if relative else grad.sum(0)
            found = *grads, last[: q.shape[1]], grad_b2
            all_grads = [own.to(f.dtype) for own, f in zip(found, factors, strict=True)]
            if not ctx.needs_input_grad[2]:
                return None, None, None, *all_grads
            if ctx.norm == "none":
                return None, None, (grad_p @ u1.T).to(ctx.dtype).view(normed.shape), *all_grads
            along = -(grad_p.to(s.dtype) * p).sum(1, keepdim=True)
            if relative:
                along += s * ((grad_q.to(s.dtype) * q).sum(1, keepdim=True) + (grad @ b2).unsqueeze(1))
            grad_t = (t * (along / len(u1))).add_(grad_p @ (u1 - u1.mean(0)).T).div_(s)
            return None, None, grad_t.to(ctx.dtype).view(normed.shape), *all_grads


def _split(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Sequence[Tensor]]]:
    """Split what a `_SumOfAdapters` works on: the six stacked factors, and what is kept of each tap."""
    parameters, kept = tensors[:6], tensors[6:]
    per_tap = len(kept) // len(parameters[0])
    return parameters, [kept[i : i + per_tap] for i in range(0, len(kept), per_tap)]


def merge(merging: Merging, call: MergingCall, z: Tensor, grid: Any, lean: bool) -> Merged:
    """Carry the lane through frozen patch merging, in z's dtype and without autocast.

    Both terms are by the same function, so a zero lane stays exactly zero, and over a bf16 base the difference is not
    drowned by rounding.

    Args:
        merging: PM.
        call: How the backbone called it.
        z: The lane, of the shape of the stream that entered.
        grid: How its tokens lie in the image.
        lean: Keep x + z rounded to int8 for backward.
    """
    if merging.sharded:
        merging = merging._replace(modules=copies(merging.modules, z))
    modules, run, _ = merging
    x, frozen = call.x.to(z.dtype), call.output
    cast = in_dtype(modules, x.dtype)
    with no_autocast(x):
        own = frozen is not None and x is call.x and all(a is b for a, b in zip(cast, modules, strict=True))
        if not own:
            with torch.no_grad():  # else the backbone did the same, to the bit
                frozen = run(cast, x, grid, *call.args, **call.kwargs)
        y = x + z
        # torch.func cannot differentiate layers of packed integers (bitsandbytes); they keep their input then.
        if lean and all(p.is_floating_point() for module in modules for p in own_parameters(module).values()):
            left = _LeanMerging.apply(merging, grid, call.args, call.kwargs, y)
        else:
            left = run(cast, y, grid, *call.args, **call.kwargs)
        return Merged(left - frozen, y, left if own else None)


class _LeanMerging(torch.autograd.Function):
    """`PM(y)` that keeps `y` rounded to int8 and runs again in backward.

    The value is exact. Only the Jacobian, that of the norm inside, is taken at the rounded `y`: the gradient that
    passes to earlier stages is off by about 0.2 % (`test_storage`), the one of the last stage is exact.
    """

    @staticmethod
    def forward(
        ctx: Any, merging: Merging, grid: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor
    ) -> Tensor:
        ctx.merging, ctx.grid, ctx.args, ctx.kwargs = merging, grid, args, kwargs
        ctx.save_for_backward(*pack(y, "int8"))
        return merging.run(in_dtype(merging.modules, y.dtype), y, grid, *args, **kwargs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        with no_autocast(grad):
            y = unpack((codes, scale), codes.shape[-1], grad.dtype)
            cast = in_dtype(ctx.merging.modules, y.dtype)  # again: weights in another dtype would be held till here
            vjp = torch.func.vjp(lambda y: ctx.merging.run(cast, y, ctx.grid, *ctx.args, **ctx.kwargs), y)[1]
            return None, None, None, None, vjp(grad)[0]


def copies(modules: Sequence[nn.Module], like: Tensor) -> list[nn.Module]:
    """Return copies of modules, in the dtype and on the device of a tensor, for where FSDP takes the weights away.

    Where the frozen pass is read and not computed (a cache, `backbone_once`) FSDP has not gathered the weights for a
    forward, so they are gathered here: all processes come here together.
    """
    return [copy.deepcopy(module, dict(_gathered(module))).to(like) for module in modules]


def _gathered(module: nn.Module) -> Iterator[tuple[int, Tensor]]:
    """Iterate over what stands for the parameters of a module that are sharded, by their identity."""
    for parameter in module.parameters():
        if hasattr(parameter, "full_tensor"):  # a DTensor, which PyTorch may be built without
            yield id(parameter), nn.Parameter(parameter.full_tensor(), requires_grad=False)


def in_dtype(modules: Sequence[nn.Module], dtype: torch.dtype) -> list[Callable[..., Any]]:
    """Return the forwards of modules with their parameters plain and in `dtype`; a module itself where they are so."""
    return [_in_dtype(module, dtype) for module in modules]


def _in_dtype(module: nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
    parameters = own_parameters(module)
    cast = {name: _plain(p, dtype) for name, p in parameters.items()}
    if all(cast[name] is p for name, p in parameters.items()):
        return module
    return lambda *args, **kwargs: torch.func.functional_call(module, cast, args, kwargs)


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Parameters of a module by name, also of a replica (`nn.DataParallel`), whose tensors are not parameters."""
    found: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        tensors = getattr(part, "_former_parameters", None) or part._parameters
        found |= {f"{path}.{name}" if path else name: p for name, p in tensors.items() if p is not None}
    return found


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
