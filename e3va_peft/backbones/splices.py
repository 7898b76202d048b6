"""Ways to write the lane into outputs. Each returns a copy and leaves the backbone's own outputs as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from e3va_peft.backbones.base import ExitCall

if TYPE_CHECKING:
    from e3va_peft.highway import Lane


def add(x: Tensor, z: Tensor) -> Tensor:
    """Add the lane to a frozen tensor of the same shape, in the frozen tensor's dtype and on its device."""
    return (x + z.to(x.device)).to(x.dtype)


def add_to_map(x: Tensor, z: Tensor) -> Tensor:
    """(B, C, H, W) + (B, N, C) or (B, H, W, C) -> (B, C, H, W)."""
    return add(x, z.movedim(-1, 1).reshape(x.shape))


def in_own_dtype(module: nn.Module, x: Tensor) -> Tensor:
    """Run a module in the dtype of its parameters (PEFT keeps trained copies in fp32) and return x's dtype."""
    dtype = next((p.dtype for p in module.parameters()), x.dtype)
    return module(x.to(dtype)).to(x.dtype)


def replaced(outputs: Any, **changes: Any) -> Any:
    """Copy a `ModelOutput` with other values of some fields."""
    return type(outputs)(**{**dict(outputs.items()), **changes})


def plain_states(outputs: Any, lane: Lane, call: ExitCall) -> dict[str, Any]:
    """Splice the hidden states of a plain vision transformer: state l is `x_l` plus the lane behind block l.

    Hidden states that nobody asked for are None and are left out, and so are those behind the last adapted block.
    """
    if outputs.hidden_states is None:
        return {}
    hidden = list(outputs.hidden_states)
    for block in range(1, call.depth[0] + 1):
        if hidden[block] is not None:
            hidden[block] = add(hidden[block], lane.behind(0, block))
    return {"hidden_states": tuple(hidden)}


def plain_encoder(outputs: Any, lane: Lane, call: ExitCall) -> Any:
    """Splice an encoder of one stage: each hidden state, and the last where the lane got that far."""
    changes = plain_states(outputs, lane, call)
    blocks = call.depth[0]
    if blocks == call.exit.config.num_hidden_layers:  # type: ignore[union-attr]
        changes["last_hidden_state"] = add(outputs.last_hidden_state, lane.behind(0, blocks))
    return replaced(outputs, **changes)


def plain_model(outputs: Any, lane: Lane, call: ExitCall) -> Any:
    """Splice a model of one stage that norms and pools inside: each hidden state, then norm and pooler run again."""
    changes = plain_states(outputs, lane, call)
    assert call.tail_input is not None
    hidden = in_own_dtype(call.tail["layernorm"], add(call.tail_input, lane.behind(0, call.depth[0])))
    changes["last_hidden_state"] = hidden
    if "pooler" in call.tail:
        changes["pooler_output"] = in_own_dtype(call.tail["pooler"], hidden)
    return replaced(outputs, **changes)


def stages_of_maps(outputs: Any, lane: Lane, call: ExitCall) -> Any:
    """Splice an encoder of several stages on maps (B, C, H, W): state i + 1 is stage i before its downsampling."""
    changes: dict[str, Any] = {}
    if outputs.hidden_states is not None:
        hidden = list(outputs.hidden_states)
        for i, blocks in enumerate(call.depth):
            if hidden[i + 1] is not None:
                hidden[i + 1] = add_to_map(hidden[i + 1], lane.behind(i, blocks))
        changes["hidden_states"] = tuple(hidden)
    if len(call.depth) == len(call.exit.stages):  # type: ignore[arg-type]
        last = lane.behind(len(call.depth) - 1, call.depth[-1])
        changes["last_hidden_state"] = add_to_map(outputs.last_hidden_state, last)
    return replaced(outputs, **changes)
