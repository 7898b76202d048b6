"""Detections and objects as rows of a tensor, which `transformers.Trainer` can pad, gather and concatenate."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from e3va_peft.data.objects import RLE, Detections, Objects

PADDING = -100  # what the Trainer pads with


def pack(examples: Sequence[Detections | Objects]) -> Tensor:
    """Pack images into the rows of a tensor, `B images -> (B, L) int8`, L the length of the longest.

    A row is the bytes of `to_bytes` and then padding, which tells itself from the bytes because these know their end:
    a row may be padded further, and rows of several batches and processes be concatenated. It is int8, because NCCL
    and Gloo gather no int16.
    """
    packed = [torch.frombuffer(bytearray(to_bytes(example)), dtype=torch.int8) for example in examples]
    rows = torch.full((len(packed), max(map(len, packed), default=0)), PADDING, dtype=torch.int8)
    for row, values in zip(rows, packed, strict=True):
        row[: len(values)] = values
    return rows


def unpack(rows: Tensor | np.ndarray) -> list[Detections | Objects]:
    """Unpack what `pack` packed, `(B, L) int8 -> B images`, each as it was to the last bit.

    Raises:
        ValueError: `rows` is not (B, L) int8, or a row does not come from `pack`.
    """
    array = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
    if array.dtype != np.int8 or array.ndim != 2:
        raise ValueError(f"rows must be (B, L) int8, got {array.shape} {array.dtype}: pass what pack returned, uncast")
    return [_unpack(row.tobytes(), index) for index, row in enumerate(array)]


def to_bytes(example: Detections | Objects) -> bytes:
    """Encode one image as zlib-compressed JSON: no code is run to read it, and its numbers are exact."""
    fields = {name: _plain(value) for name, value in vars(example).items()}
    return zlib.compress(json.dumps(fields).encode())


def from_bytes(data: bytes) -> Detections | Objects:
    """Decode what `to_bytes` encoded; what comes after its end does not matter.

    Raises:
        zlib.error: `data` is not what `to_bytes` encoded.
        ValueError: `data` is cut off.
    """
    fields = json.loads(zlib.decompressobj().decompress(data))
    masks = fields.pop("masks")
    rles = None if masks is None else tuple(_mask(*mask) for mask in masks)
    arrays = {name: _array(name, value) for name, value in fields.items() if name not in ("image_id", "size")}
    if "scores" in fields:
        return Detections(**arrays, masks=rles)
    return Objects(image_id=fields["image_id"], size=tuple(fields["size"]), **arrays, masks=rles)


def _unpack(row: bytes, index: int) -> Detections | Objects:
    try:
        return from_bytes(row)
    except (zlib.error, ValueError) as error:
        raise ValueError(f"rows[{index}] does not come from pack ({error}): pass what pack returned") from error


def _plain(value: Any) -> Any:
    """Return what JSON can hold: of an array lists, of a mask `[height, width, counts]`."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        counts = value["counts"]
        return [*_plain(tuple(value["size"])), counts.decode("ascii") if isinstance(counts, bytes) else counts]
    return value


def _mask(height: int, width: int, counts: str) -> RLE:
    return {"size": [height, width], "counts": counts.encode("ascii")}


def _array(name: str, value: list[Any]) -> np.ndarray:
    array: np.ndarray = np.array(
        value, dtype={"labels": "int64", "crowd": "bool", "difficult": "bool"}.get(name, "float64")
    )
    return array.reshape(-1, 4) if name == "boxes" else array
