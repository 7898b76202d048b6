"""Layout of one frozen pass in a row of bytes. Pure torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from e3va_peft.storage import keep, pack, unpack

STORAGES = ("exact", "fp16", "int8", "int4")
ALIGNED = 16  # bytes: every part begins at a multiple, so that a row can be seen as any dtype
TAP, MERGING = "tap.", "merging."


class Part(NamedTuple):
    """A tensor in a row: dtype, shape of one image, and where it begins."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.offset + self.dtype.itemsize * torch.Size(self.shape).numel()

    def of(self, rows: Tensor) -> Tensor:
        """(B, bytes) -> (B, ...), a view."""
        return rows[:, self.offset : self.end].view(self.dtype).unflatten(1, self.shape or (1,))


class Entry(NamedTuple):
    """One tensor of a frozen pass.

    Attributes:
        dtype: Its dtype.
        shape: Its shape, of one image.
        strides: How it lies in memory, of one image.
        channels: Dimension of `shape` that is rounded together; None where nothing is rounded.
        storage: How it is kept.
        parts: What is kept; none where it is the same memory as another.
        same_as: Name of that other.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    channels: int | None
    storage: str
    parts: tuple[Part, ...] = ()
    same_as: str = ""


class Layout:
    """The layout of the frozen pass of one image.

    Args:
        tensors: The frozen pass of a batch, by name (`replay.Capture.tensors`), and no more than is to be kept.
        storage: *exact*, *fp16*, *int8* or *int4*. Beside taps in int4, what a head reads is in int8. Beside taps in
            int8 or int4, what patch merging alone reads is in int3: the lane is a difference there, and sees little
            of it but the lengths of tokens.
        norm: How taps are read (`E3VAConfig.tap_norm`).
        widths: Channels of the stages, by which the dimension of the channels is known.
    """

    def __init__(self, tensors: Mapping[str, Tensor], storage: str, norm: str, widths: Sequence[int]) -> None:
        self.storage = storage
        self.norm = norm
        self.entries: dict[str, Entry] = {}
        self.bytes = 0
        read = {memory(tensor) for name, tensor in tensors.items() if not name.startswith((TAP, MERGING))}
        first: dict[Any, str] = {}  # where it lies and how much there is -> name
        for name in sorted(tensors, key=lambda name: (not name.startswith(MERGING), name)):
            tensor = tensors[name]
            kind = storage
            if storage.startswith("int") and not name.startswith(TAP):
                only_merged = name.startswith(MERGING) and memory(tensor) not in read
                kind = "int3" if only_merged else "int8"
            entry = _entry(tensor, kind, widths)
            same = first.setdefault((memory(tensor), tensor.numel()), name)
            if same != name and not name.startswith(TAP) and _is_dense(tensor):
                self.entries[name] = entry._replace(same_as=same)
            else:
                self.entries[name] = entry._replace(parts=self._place(name, entry, tensor[:1]))
        # How many bytes over a multiple of 64 says in which storage a record is: who is given one knows by its length.
        self.bytes = -(-self.bytes // 64) * 64 + ALIGNED * STORAGES.index(storage)

    def _place(self, name: str, entry: Entry, tensor: Tensor) -> tuple[Part, ...]:
        parts = []
        for packed in self._pack(name, entry, tensor):
            parts.append(Part(packed.dtype, tuple(packed.shape[1:]), _aligned(self.bytes)))
            self.bytes = parts[-1].end
        return tuple(parts)

    def _pack(self, name: str, entry: Entry, tensor: Tensor) -> tuple[Tensor, ...]:
        if name.startswith(TAP):
            return keep(tensor, entry.storage, self.norm)
        if entry.channels is None:
            return (tensor,)
        return pack(tensor.movedim(entry.channels + 1, -1), entry.storage)

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors (B, ...) by name -> (B, bytes), uint8, on the CPU."""
        batch = next(iter(tensors.values())).shape[0]
        rows = torch.zeros(batch, self.bytes, dtype=torch.uint8)
        for name, entry in self.entries.items():
            packed = self._pack(name, entry, tensors[name]) if entry.parts else ()
            for part, value in zip(entry.parts, packed, strict=True):
                rows[:, part.offset : part.end] = value.cpu().contiguous().view(batch, -1).view(torch.uint8)
        return rows

    def unpack(self, rows: Tensor) -> dict[str, Any]:
        """(B, bytes) -> what `replay.Replay` reads: of a tap what is kept of it, of the rest tensors."""
        found: dict[str, Any] = {}
        for name, entry in self.entries.items():
            parts = [part.of(rows) for part in entry.parts]
            if name.startswith(TAP):
                found[name] = parts
            elif parts:
                found[name] = _restored(entry, parts)
        for name, entry in self.entries.items():
            if entry.same_as:
                base = found[entry.same_as]
                found[name] = base.as_strided((len(rows), *entry.shape), (base.stride(0), *entry.strides))
        return found


def memory(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor begins: its storage, and the place in it; also of one without memory."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _entry(tensor: Tensor, storage: str, widths: Sequence[int]) -> Entry:
    """Describe a tensor (B, ...)."""
    shape = tuple(tensor.shape[1:])
    channels = next((i for i in (len(shape) - 1, 0) if shape and shape[i] in widths), None)
    if not _is_dense(tensor):
        tensor = tensor.contiguous()
    return Entry(
        tensor.dtype, shape, tuple(tensor.stride()[1:]), channels if tensor.is_floating_point() else None, storage
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether an image fills its memory without gaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _restored(entry: Entry, parts: Sequence[Tensor]) -> Tensor:
    """Return a tensor as it was, rounded, and as it lay in memory."""
    if entry.channels is None:
        value = parts[0].reshape(-1, *entry.shape)
    else:
        value = unpack(parts, entry.shape[entry.channels], entry.dtype).movedim(-1, entry.channels + 1)
    size, strides = (len(value), *entry.shape), (value[0].numel(), *entry.strides)
    return torch.empty_strided(size, strides, dtype=entry.dtype, device=value.device).copy_(value)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNED) * ALIGNED
