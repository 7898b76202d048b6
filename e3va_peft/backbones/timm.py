"""Ways to write the lane into what timm's models return, `forward_intermediates` in all its forms above all."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from e3va_peft.backbones.base import ExitCall
from e3va_peft.backbones.splices import add, in_own_dtype


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
    """Return the indices of those of `count` blocks or stages that `forward_intermediates` returns, in order."""
    indices = bound(call)["indices"]
    if indices is None or isinstance(indices, int):
        return list(range(count - (indices or count), count))
    return sorted({index % count for index in indices})


def returned_maps(outputs: Any, call: ExitCall) -> list[Any]:
    """Return the maps among the outputs of a call; `forward_features` has none."""
    if call.method == "forward_features":
        return []
    return outputs if bound(call)["intermediates_only"] else outputs[1]


def splice_tokens(outputs: Any, lane: Any, call: Any) -> Any:
    """Splice tokens (B, N, C), and of `forward_intermediates` maps (B, C, H, W) or tokens; the norm runs again."""
    norm, (blocks,), arguments = call.tail["norm"], call.depth, bound(call)
    maps = returned_maps(outputs, call)
    which, spliced = taken(call, blocks) if maps else [], []
    for x, block in zip(maps, which, strict=True):
        z = lane.behind(0, block + 1)[:, call.exit.num_prefix_tokens :]
        tokens = add(x.flatten(2).mT if x.dim() == 4 else x, z)
        tokens = in_own_dtype(norm, tokens) if arguments["norm"] else tokens
        spliced.append(tokens.mT.reshape(x.shape).contiguous() if x.dim() == 4 else tokens)
    if spliced and arguments["intermediates_only"]:
        return spliced
    last = max(which) + 1 if spliced and arguments["stop_early"] else blocks
    final = in_own_dtype(norm, add(call.tail_input, lane.behind(0, last)))
    return (final, spliced) if spliced else final


def splice_maps(outputs: Any, lane: Any, call: Any) -> Any:
    """Splice the last map (B, H, W, C), normed again, and of `forward_intermediates` maps (B, C, H, W)."""
    last, arguments = len(call.depth) - 1, bound(call)
    maps = returned_maps(outputs, call)
    which, spliced = taken(call, len(call.depth)) if maps else [], []
    for x, stage in zip(maps, which, strict=True):
        x = x.movedim(1, -1)
        x = add(x, lane.behind(stage, call.depth[stage]).reshape(x.shape))
        x = in_own_dtype(call.tail["norm"], x) if arguments["norm"] and stage == last else x
        spliced.append(x.movedim(-1, 1).contiguous())
    if spliced and arguments["intermediates_only"]:
        return spliced
    if spliced and arguments["stop_early"] and max(which) < last:
        return spliced[-1].movedim(1, -1).contiguous(), spliced
    x = call.tail_input
    final = in_own_dtype(call.tail["norm"], add(x, lane.behind(last, call.depth[last]).reshape(x.shape)))
    return (final, spliced) if spliced else final


def splice_list(outputs: Any, lane: Any, call: Any) -> Any:
    """Splice a list of maps (B, H, W, C)."""
    stages = [int(name.rpartition("_")[2]) for name in call.exit.return_layers]
    return [add(x, lane.behind(i, call.depth[i]).reshape(x.shape)) for x, i in zip(outputs, stages, strict=True)]
