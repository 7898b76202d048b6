"""Checksums of weights: of the backbone that an adapter was trained on, and of the adapter itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


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


def _digest(tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()
