"""Checksums: of the backbone that an adapter was trained on, of its config, and of the adapter itself."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

KINDS: dict[str, torch.dtype | None] = {"checksum": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Kinds of checksum: of weights as they are, and rounded as they are where a model is loaded in half precision."""

VECTORS = "vectors"
"""Where a note has the checksums of norms and biases alone, which a quantised model shares with one that is not."""

_NO_MATTER = re.compile(  # of a family's own fields, to what the frozen backbone computes
    "out_.*|stage_names|apply_layernorm|reshape_hidden_states|.*drop.*|initializer_.*"
)
_ROUNDED = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def checksum(tensors: Iterable[tuple[str, Tensor]], kind: str = "checksum") -> str:
    """SHA-256 of weights, by name."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(_digest(_round(tensor, kind)))
    return digest.hexdigest()


def tensors_checksum(tensors: Iterable[Tensor], kind: str = "checksum") -> str:
    """SHA-256 of tensors in any order and under any names, which PEFT's loaders change."""
    return hashlib.sha256(b"".join(sorted(_digest(_round(tensor, kind)) for tensor in tensors))).hexdigest()


def content_checksum(content: Any) -> str:
    """SHA-256 of what a JSON file holds, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def config_checksum(module: nn.Module) -> str | None:
    """SHA-256 of what weights do not show: activation, number of heads, eps. None of a module without a config."""
    config = getattr(module, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return None
    own = type(config)().to_dict().keys() - PreTrainedConfig().to_dict().keys()  # not labels, nor what Trainer sets
    return content_checksum(
        {key: value for key, value in config.to_dict().items() if key in own and not _NO_MATTER.fullmatch(key)}
    )


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether there are tensors, all at hand as plain ones: not sharded, offloaded or quantised."""
    found = list(tensors)
    return bool(found) and all(
        type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and not hasattr(tensor, "ds_numel")
        for tensor in found
    )


def noted(
    sum_of: Callable[[str], str], weights: Sequence[tuple[str, Tensor]], saved: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Note weights that may be quantised: of those the vectors, norms and biases, which stay as they were.

    Args:
        sum_of: Kind of checksum -> that of all weights.
        weights: Name, tensor.
        saved: See `described`.

    Returns:
        See `described`, and beside it the same of the vectors alone, as "vectors"; where quantised weights are on one
        side, or on both, "vectors" only. None where the weights are not at hand, or nothing can be compared.
    """
    note: dict[str, Any] = {}
    tensors = [tensor for _, tensor in weights]
    if are_plain(tensors) and (saved is None or "dtype" in saved):
        note |= described(sum_of, tensors, saved)
        if saved is not None:
            return note
    vectors = [(name, tensor) for name, tensor in weights if isinstance(tensor, nn.Parameter) and tensor.dim() == 1]
    tensors = [tensor for _, tensor in vectors]
    known = None if saved is None else saved.get(VECTORS)
    if are_plain(tensors) and (saved is None or isinstance(known, Mapping)):
        note[VECTORS] = described(partial(checksum, vectors), tensors, known)
    return note or None


def described(
    sum_of: Callable[[str], str], tensors: Collection[Tensor], saved: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Note the checksums of weights, and with them what decides whether they can be compared.

    Args:
        sum_of: Kind of checksum -> that of the weights.
        tensors: The weights.
        saved: An earlier note that it is compared with, for which one checksum is enough; none where the weights were
            rounded in another way than these.

    Returns:
        A checksum for each of `KINDS`; `dtype`; and the version of `transformers`, which decides how weights are named
        and laid out.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    kinds = list(KINDS) if saved is None else _kinds_to_compare(dtypes, saved)
    note = {"dtype": " ".join(sorted(map(str, dtypes))), "transformers": transformers.__version__}
    return {kind: sum_of(kind) for kind in kinds} | note


def _kinds_to_compare(now: set[torch.dtype], saved: Mapping[str, Any]) -> list[str]:
    """Return the kind of checksum in which two dtypes of the same weights agree, or nothing.

    Rounded to bf16 weights are the same whether they were in fp32 or in bf16 before, and so it is with fp16. What was
    rounded to one of them is not known in the other.
    """
    names = {str(dtype) for dtype in now}
    before = set(str(saved.get("dtype")).split())
    if names == before:
        return ["checksum"]
    halves = [kind for kind, dtype in KINDS.items() if str(dtype) in names | before]
    rounded = names ^ before <= {str(dtype) for dtype in _ROUNDED} and len(halves) < 2
    return [kind for kind in halves or ["bfloat16"] if rounded and kind in saved]


def _round(tensor: Tensor, kind: str) -> Tensor:
    dtype = KINDS[kind]
    return tensor.detach().to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _digest(tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()
