"""What timm's models share: `forward_intermediates`, which returns maps of chosen blocks or stages, and the last."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from e3va_peft.backbones.base import ExitCall


def bound(call: ExitCall) -> dict[str, Any]:
    """Return the arguments of a call of a method by name, defaults included."""
    signature = inspect.signature(getattr(type(call.exit), call.method))
    arguments = signature.bind(call.exit, *call.args, **call.kwargs)
    arguments.apply_defaults()
    return {name: value for name, value in arguments.arguments.items() if name != "self"}


def without_norm(call: ExitCall) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Ask `forward_intermediates` for maps that are not normed yet: the lane is added before the norm.

    Raises:
        NotImplementedError: The call asks for a form of the outputs that the lane is not written into.
    """
    if call.method != "forward_intermediates":
        return call.args, call.kwargs
    arguments = bound(call)
    for name in ("output_dict", "return_prefix_tokens"):
        if arguments.get(name):
            raise NotImplementedError(
                f"{name}=True: E3VA does not adapt this form of forward_intermediates' outputs. Leave it out, or take "
                "forward_features, whose tokens include the prefix."
            )
    return (), arguments | {"norm": False}


def taken(call: ExitCall, count: int) -> list[int]:
    """Return which of `count` blocks or stages `forward_intermediates` returns, in their order."""
    indices = bound(call)["indices"]
    if indices is None or isinstance(indices, int):
        return list(range(count - (indices or count), count))
    return sorted({index % count for index in indices})
