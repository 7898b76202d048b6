"""Ways to write the lane into outputs. Each returns a copy and leaves the backbone's own outputs as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from e3va_peft.backbones.base import ExitCall

if TYPE_CHECKING:
    from e3va_peft.lane import Lane


def add(x: Tensor, z: Tensor) -> Tensor:
    """Add the lane to a frozen tensor of the same shape, in the frozen tensor's dtype and on its device."""
    return (x + z.to(x.device)).to(x.dtype)


def add_to_map(x: Tensor, z: Tensor) -> Tensor:
    """(B, C, H, W) + (B, N, C) -> (B, C, H, W)."""
    return add(x, z.transpose(1, 2).reshape(x.shape))


def in_own_dtype(module: nn.Module, x: Tensor) -> Tensor:
    """Run a module in the dtype of its parameters (PEFT keeps trained copies in fp32) and return x's dtype."""
    parameters = getattr(module, "_former_parameters", None) or dict(
        module.named_parameters()
    )  # of a replica, or its own
    dtype = next((p.dtype for p in parameters.values() if p is not None), x.dtype)
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


def stages_of_tokens(outputs: Any, lane: Lane, call: ExitCall, hidden_before_merging: bool = False) -> Any:
    """Splice a Swin encoder, whose states are tokens and maps of the same.

    `hidden_states[i + 1]` is stage i behind its patch merging. `reshaped_hidden_states[i + 1]` is the same as a map
    (B, C, H, W), or the stage *before* merging where the caller (a backbone) asked for that.

    Args:
        outputs: Outputs of the encoder.
        lane: The lane.
        call: The call.
        hidden_before_merging: The hidden states follow what the caller asked for too.
    """
    before = call.kwargs.get("output_hidden_states_before_downsampling", False)
    hidden, maps = list(outputs.hidden_states or ()), list(outputs.reshaped_hidden_states or ())
    changes: dict[str, Any] = {}
    for i, blocks in enumerate(call.depth):
        merged, last = i + 1 < len(call.depth), i + 1 == len(call.exit.layers)  # type: ignore[arg-type]
        state_before = before and hidden_before_merging
        end, behind_merging = (i, blocks), (i + 1, 0)
        if maps and (x := maps[i + 1]) is not None:
            place = behind_merging if merged and not before else end
            maps[i + 1] = lane.onto(x.flatten(2).mT, *place).mT.reshape(x.shape)
        if hidden and hidden[i + 1] is not None and (merged or last or state_before):
            place = behind_merging if merged and not state_before else end
            hidden[i + 1] = lane.onto(hidden[i + 1], *place)
        if last:
            changes["last_hidden_state"] = add(outputs.last_hidden_state, lane.behind(i, blocks))
    if hidden:
        changes["hidden_states"] = tuple(hidden)
    if maps:
        changes["reshaped_hidden_states"] = tuple(maps)
    return replaced(outputs, **changes)
