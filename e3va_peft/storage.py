"""Storage of a tap between forward and backward, as it is or rounded, and its reading. Pure torch.

A rounded tap is what the highway reads in forward *and* in backward, so that the gradient is that of the function
computed, in training *and* after it, so that this function is the one that is used: an adapter that has met taps in 4
bits alone is lost among exact ones (mean IoU 0.57 instead of 0.85 on nuclei, E3VA+ on a Swin, where some channels of
the stream are far larger than the rest). Nothing of the backbone is rounded, only what the highway sees of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

ROUNDED = ("int8", "int4")
TAP_STORAGES = ("exact", "recompute", *ROUNDED)  # from the most to the least exact; "recompute" keeps nothing
NORMS = ("none", "layer", "relative")  # see `E3VAConfig.tap_norm`
EPS = 1e-8  # of a variance: branches behind LayerScale can be as small as 1e-3
GROUP = 32  # channels that share a scale in int4: one per token would be that of its largest outlier
_TINY = torch.finfo(torch.float32).tiny


def pack(tap: Tensor, storage: str) -> tuple[Tensor, ...]:
    """(B, N, C) -> what is kept of it.

    Args:
        tap: A tap, in any floating dtype.
        storage: *exact*: the tap itself. *fp16*: shares of the largest value of its token, and that in fp32. *int8*:
            codes (B, N, C) and one bf16 scale per token, C + 2 bytes a token. *int4*: two codes to a byte and one bf16
            scale for every 32 channels, 0.56 C bytes a token. *int3*: eight codes to three bytes, a bf16 scale per
            token and one per channel of an image, 0.38 C bytes a token: for what enters a norm before anything else,
            where the length of a token matters more than its direction. No tap is kept so.
    """
    if storage == "exact":
        return (tap,)
    if storage == "fp16":
        scale = tap.abs().amax(-1, keepdim=True).float().clamp_min(_TINY)
        return (tap / scale).half(), scale
    if storage == "int3":
        return _pack_int3(tap)
    codes, scale = _codes(tap, storage)
    if storage == "int8":
        return codes.to(torch.int8), scale
    pairs = codes.add_(8).to(torch.uint8).flatten(-2).view(torch.int16)  # 16 bits at a time: single bytes are slow
    return (pairs | pairs >> 4).to(torch.uint8), scale.squeeze(-1)


def _pack_int3(stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, ..., C) -> (B, ..., 3 ceil(C / 32)), int32; scales (B, ..., 1) and (B, 1, ..., C)."""
    stream = stream.float()
    places = tuple(range(1, stream.dim() - 1))
    channel = stream.square().mean(places, keepdim=True).sqrt().clamp_min(_TINY).bfloat16()
    shares = stream / channel.float()
    step = (shares.abs().amax(-1, keepdim=True) / 3.5).clamp_min(_TINY)
    codes = (shares / step + 3.5).round_().clamp_(0, 7)
    scale = _length(stream) / _length((codes - 3.5) * channel.float())  # a token keeps its length
    eights = F.pad(codes.int(), (0, -codes.shape[-1] % 32)).unflatten(-1, (-1, 8))
    words = (eights << torch.arange(0, 24, 3, device=codes.device)).sum(-1, keepdim=True, dtype=torch.int32)
    return words.view(torch.uint8)[..., :3].flatten(-2).view(torch.int32), scale.bfloat16(), channel


def _length(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dim=-1, keepdim=True).clamp_min(_TINY)


def _unpack_int3(words: Tensor, scale: Tensor, channel: Tensor) -> Tensor:
    """Return (B, ..., C), fp32, of what `_pack_int3` returned."""
    eights = F.pad(words.view(torch.uint8).unflatten(-1, (-1, 3)), (0, 1)).view(torch.int32)
    codes = (eights >> torch.arange(0, 24, 3, device=words.device)) & 7
    return (codes.flatten(-2)[..., : channel.shape[-1]] - 3.5) * channel.float() * scale.float()


def _codes(tap: Tensor, storage: str) -> tuple[Tensor, Tensor]:
    """(..., C) -> codes (..., C) and scale (..., 1) of int8; codes (..., C / 32, 32) and scales (..., C / 32, 1)."""
    if storage == "int8":
        scale = (tap.abs().amax(-1, keepdim=True).float() / 127).clamp_min(_TINY).bfloat16()
        return (tap / scale.float()).round_(), scale
    padding = -tap.shape[-1] % GROUP
    padded = F.pad(tap.float(), (0, padding)) if padding else tap.float()  # no padding would be a copy
    groups = padded.unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp_min(_TINY).bfloat16()
    return (groups / scale.float()).round_().clamp_(-7, 7), scale


def unpack(kept: Sequence[Tensor], width: int, dtype: torch.dtype) -> Tensor:
    """Return the tap (B, N, C) in `dtype`, as the highway reads it.

    Args:
        kept: The tuple that `pack` returned.
        width: Channels C.
        dtype: Dtype to compute in.
    """
    if len(kept) == 1:
        return kept[0].to(dtype)
    codes, scale, *channel = kept
    if channel:
        return _unpack_int3(codes, scale, *channel).to(dtype)
    if codes.dtype in (torch.int8, torch.float16):
        return (codes * scale.float()).to(dtype)
    pairs = codes.to(torch.int16)
    values = ((pairs | pairs << 4) & 0x0F0F).view(torch.int8) - 8
    return (values.unflatten(-1, (-1, GROUP)) * scale.float().unsqueeze(-1)).flatten(-2)[..., :width].to(dtype)


def normalized(tap: Tensor) -> Tensor:
    """(..., C) -> (..., C): a tap normalised over its channels, without parameters."""
    return F.layer_norm(tap, *_by_one(tap))


def deviation_of(tap: Tensor) -> Tensor:
    """(..., C) -> (..., 1): the standard deviation that `normalized` divides by."""
    return ((tap - tap.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + EPS).sqrt()  # `var` is slow on a CPU


def standardized(tap: Tensor) -> tuple[Tensor, Tensor]:
    """(..., C) -> (..., C), (..., 1): `normalized` and `deviation_of` by one kernel; the latter has no gradient."""
    normed, _, inverse = with_statistics(tap)
    return normed, inverse.reciprocal()


def with_statistics(tap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(..., C) -> (..., C), (..., 1), (..., 1): a tap `normalized`, its mean, and the inverse of its deviation."""
    return torch.native_layer_norm(tap, *_by_one(tap))


def _by_one(tap: Tensor) -> tuple[torch.Size, Tensor, Tensor, float]:
    """Return a layer norm's arguments: gain and bias change nothing, but half PyTorch's time on a CPU."""
    width = tap.shape[-1:]
    return width, tap.new_ones(width), tap.new_zeros(width), EPS


def keep(tap: Tensor, storage: str, norm: str) -> tuple[Tensor, ...]:
    """(B, N, C) -> what is kept of a tap: the tap itself, or what the adapter reads of it, rounded.

    Args:
        tap: A tap, in any floating dtype.
        storage: See `pack`.
        norm: How it is read (`E3VAConfig.tap_norm`). Its deviation, where an answer is relative to it, is kept beside
            what is rounded: one number a token.
    """
    if storage == "exact" or norm == "none":
        return pack(tap, storage)
    normed, deviation = standardized(tap)
    return (*pack(normed, storage), *([deviation] if norm == "relative" else ()))


def coarser(kept: Sequence[Tensor], storage: str, width: int, norm: str) -> Sequence[Tensor]:
    """Round a tap that is kept more exactly than `storage`, in a cache or for another adapter.

    Args:
        kept: The tensors that `keep` returned.
        storage: How the adapter reads (`E3VAConfig.tap_storage`).
        width: Channels C.
        norm: How the tap is read.
    """
    known = {torch.int8: "int8", torch.uint8: "int4"}.get(kept[0].dtype, "exact")
    if storage not in ROUNDED or TAP_STORAGES.index(storage) <= TAP_STORAGES.index(known):
        return kept
    if len(kept) == 1:
        return keep(kept[0], storage, norm)
    return (*pack(unpack(kept[:2], width, torch.float32), storage), *kept[2:])


def read_at_once(tap: Tensor, storage: str, dtype: torch.dtype, norm: str) -> tuple[Tensor, Tensor | None]:
    """A tap (..., C) as `read` gives it of what `keep` keeps, rounded alike, where nothing needs to be kept."""
    if storage not in ROUNDED:
        return read([tap], tap.shape[-1], dtype, norm)
    normed, deviation = (tap, None) if norm == "none" else standardized(tap)
    codes, scale = _codes(normed, storage)
    values = codes * scale.float()
    if storage == "int4":
        values = values.flatten(-2)[..., : tap.shape[-1]]
    return values.to(dtype), deviation if norm == "relative" else None


def read(kept: Sequence[Tensor], width: int, dtype: torch.dtype, norm: str) -> tuple[Tensor, Tensor | None]:
    """The tap as an adapter reads it, (..., C), and the deviation that it answers in, (..., 1) or None.

    Args:
        kept: The tensors that `keep` returned.
        width: Channels C.
        dtype: Dtype to compute in.
        norm: How the tap is read.
    """
    if norm == "none":
        return unpack(kept, width, dtype), None
    relative = norm == "relative"
    if len(kept) == 1:
        tap = kept[0].to(torch.promote_types(kept[0].dtype, dtype))
        normed, deviation = standardized(tap)
        return normed.to(dtype), deviation if relative else None
    return unpack(kept[:-1] if relative else kept, width, dtype), kept[-1] if relative else None
