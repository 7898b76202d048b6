"""The rest of an example, all but its image, as bytes: safetensors and JSON, nothing that runs code."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

_LENGTH = 8  # bytes of the number that says how long the JSON is


def to_bytes(example: Mapping[str, Any]) -> bytes:
    """Turn an example into bytes: dictionaries, lists, tuples and dataclasses of tensors, arrays, numbers and texts.

    Raises:
        TypeError: There is something else in it. The message names it.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_outline(dict(example), tensors, "")).encode()
    return len(text).to_bytes(_LENGTH, "little") + text + save(tensors)


def from_bytes(data: bytes, types: Sequence[type] = ()) -> dict[str, Any]:
    """Turn bytes back into an example.

    Args:
        data: What `to_bytes` returned.
        types: The dataclasses that may be in it; none is imported by name.
    """
    return _filled(*_parts(data), {own.__qualname__: own for own in types})


def comparable(data: bytes) -> Any:
    """Return what is in bytes so that it can be compared: without order of keys, and without texts, such as paths."""
    return _comparable(*_parts(data))


def _comparable(outline: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, value),) = outline.items()
    if kind == "mapping":
        return {name: _comparable(own, tensors) for name, own in value.items()}
    if kind in ("list", "tuple"):
        return [_comparable(own, tensors) for own in value]
    if kind == "bytes" or value is None:
        return value
    if kind == "value" and isinstance(value, str):
        return str
    if kind in ("tensor", "array", "value"):  # 3 is what a tensor of 3 is
        tensor = torch.as_tensor(value) if kind == "value" else tensors[value]
        return tensor.shape, tensor.dtype, tensor.flatten().view(torch.uint8).numpy().tobytes()
    return _comparable(value, tensors)  # of a dataclass


def _parts(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the outline in an example's bytes, and the tensors that it names."""
    length = int.from_bytes(data[:_LENGTH], "little")
    return json.loads(data[_LENGTH : _LENGTH + length]), load(data[_LENGTH + length :])


def _outline(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"mapping": {key: _outline(own, tensors, f"{path}.{key}".strip(".")) for key, own in value.items()}}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):  # a named tuple would lose its names
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_outline(v, tensors, f"{path}.{i}") for i, v in enumerate(value)]}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc"):
        kind, name = "tensor" if isinstance(value, Tensor) else "array", str(len(tensors))
        tensors[name] = torch.as_tensor(value).detach().cpu().clone(memory_format=torch.contiguous_format)
        return {kind: name}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {type(value).__qualname__: _outline(fields, tensors, path)}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(
        f"{path}: is a {type(value).__name__} in the dataset's examples, which a cache does not keep. Let the dataset "
        "return tensors, arrays of numbers, numbers, texts, or lists, tuples, dataclasses and dictionaries of them, "
        "their keys being texts."
    )


def _filled(outline: Mapping[str, Any], tensors: Mapping[str, Tensor], types: Mapping[str, type]) -> Any:
    ((kind, value),) = outline.items()
    if kind in types:
        return types[kind](**_filled(value, tensors, types))
    if kind == "mapping":
        return {name: _filled(own, tensors, types) for name, own in value.items()}
    if kind in ("list", "tuple"):
        parts = [_filled(own, tensors, types) for own in value]
        return parts if kind == "list" else tuple(parts)
    if kind in ("tensor", "array"):
        return tensors[value] if kind == "tensor" else tensors[value].numpy()
    return bytes.fromhex(value) if kind == "bytes" else value
