"""Checksums: of the backbone that an adapter was trained on, of its config, and of the adapter itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn


def checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of weights, by name."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(_digest(tensor))
    return digest.hexdigest()


def tensors_checksum(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors in any order and under any names, which PEFT's loaders change."""
    return hashlib.sha256(b"".join(sorted(map(_digest, tensors)))).hexdigest()


def content_checksum(content: Any) -> str:
    """SHA-256 of what a JSON file holds, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether there are tensors, all at hand as plain ones: not sharded, offloaded or quantised."""
    found = list(tensors)
    return bool(found) and all(
        type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and not hasattr(tensor, "ds_numel")
        for tensor in found
    )


def described(checksum: str, tensors: Iterable[Tensor]) -> dict[str, str]:
    """Note with a checksum what has to be the same for checksums to be compared.

    Args:
        checksum: Of the tensors.
        tensors: The weights.

    Returns:
        `checksum`, `dtype` and the version of `transformers`, which decides how weights are named and laid out.
    """
    dtypes = sorted({str(tensor.dtype) for tensor in tensors})
    return {"checksum": checksum, "dtype": " ".join(dtypes), "transformers": transformers.__version__}


def _digest(tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()
