"""Run the decode ops in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn_ops.backends.triton.host import config as configs
from gdn_ops.backends.triton.host.config import power_of_two
from gdn_ops.backends.triton.host.launcher import launch
from gdn_ops.backends.triton.host.plan import (
    dense,
    gate_kind,
    gate_of,
    readable,
    strides,
)
from gdn_ops.backends.triton.kernels import step
from gdn_ops.call.bind import Arguments, Call
from gdn_ops.call.memory import lies_in
from gdn_ops.dispatch.backend import Prepared
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEPS
from gdn_ops.spec.rules import Width


def run(
    call: Call,
    tokens: tuple[Tensor, Tensor, Tensor],
    o: Tensor,
    new_state: Tensor,
    states: Tensor | None,
) -> None:
    """Launch the decode kernel; a state whose columns of V have gaps is copied."""
    q, k, v = map(readable, tokens)
    state, written = call.state, new_state
    if state is not None and state.stride(-1) != 1:
        state = state.contiguous()
        written = state if call.inplace else new_state
    strengths = (dense(x) for x in call.tokens[5:])
    given = q, k, v, gate_of(call), *strengths, state, written, states
    sizes = _sizes(call, (q, k, v), written if state is None else state, written)
    constants = _constants(call, (q, k, v), call.device, states is not None)
    grid = _grid(v, constants["BV"])
    indices = dense(call.state_indices)
    launch(step.tokens, grid, *given, indices, o, float(call.scale), *sizes, **constants)
    if written is not new_state:
        new_state.copy_(written)


def _grid(v: Tensor, BV: int) -> tuple[int, int]:
    B, _, HV, V = v.shape
    return B * HV, -(-V // BV)


def _sizes(
    call: Call, tokens: tuple[Tensor, Tensor, Tensor], state: Tensor, new_state: Tensor
) -> tuple[int, ...]:
    """Return the integers of a launch: tokens per row, and strides."""
    read = (n for x in (*tokens, state, new_state) for n in strides(x))
    return tokens[0].shape[1], *read


def _constants(
    call: Call, tokens: tuple[Tensor, Tensor, Tensor], device: torch.device, keep: bool
) -> dict[str, Any]:
    """Return the constants and options of a launch on a device."""
    (H, K), (HV, V) = tokens[0].shape[2:], tokens[2].shape[2:]
    config = configs.tables.choose(device, K, V)
    return {
        "H": H,
        "R": HV // H,
        "K": K,
        "V": V,
        "BK": power_of_two(K),
        "BV": min(config.BV, power_of_two(V)),
        "GATE": gate_kind(call),
        "HAS_BETA": call.tokens.beta is not None,
        "ERASE": call.rule.has_erase,
        "NORM": call.qk_l2norm,
        "HAS_STATE": call.state is not None,
        "KEEP": keep,
        "POOL": call.state_indices is not None,
        "CHANNELS": call.widths.decay == "channel",
        "ERASES": _kind(call.tokens.erase, call.widths.erase),
        "WRITES": _kind(call.tokens.write, call.widths.write),
        "num_warps": config.warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def _kind(strength: Tensor | None, width: Width) -> int:
    """Return the kernel's constant for a strength that stands apart."""
    if strength is None:
        return 0
    return int((step.OF_CHANNELS if width == "channel" else step.OF_HEADS).value)


def prepared(call: Call) -> Prepared | None:
    """Return a function that launches decode calls like one that is on tensors without memory.

    None is returned where the kernel cannot read and write the very tensors of the call.
    """
    if call.op is GATED_DELTA or not _is_direct(call):
        return None
    tokens = _with_token_axis(call)
    old, has_states = call.state, call.op is GATED_DELTA_STEPS
    assert old is not None
    in_order = torch.contiguous_format
    new_like = old if call.inplace else torch.empty_like(old, memory_format=in_order)
    sizes, scale = _sizes(call, tokens, old, new_like), float(call.scale)
    shape_of_states = (*tokens[2].shape[:3], *old.shape[-2:])
    constants: dict[str, Any] = {}

    def run(arguments: Arguments) -> Any:
        (q, k, v, alpha, log_alpha, *strengths), state, _, slots, *_ = arguments
        assert state is not None
        if call.inplace and lies_in(state, (q, k, v, alpha, log_alpha, *strengths, slots)):
            return None
        if not constants:
            # Ask for the GPU only here: tensors without memory are on none.
            constants.update(_constants(call, tokens, q.device, call.return_states))
        o = torch.empty_like(v, memory_format=in_order)
        new = state if call.inplace else torch.empty_like(state, memory_format=in_order)
        states = None
        if call.return_states:
            states = torch.empty(shape_of_states, dtype=state.dtype, device=state.device)
        decay = log_alpha if alpha is None else alpha
        launch(
            step.tokens, _grid(tokens[2], constants["BV"]),
            q, k, v, decay, *strengths, state, new, states, slots, o, scale, *sizes,
            **constants,
        )  # fmt: skip
        return (o, new, states) if has_states else (o, new)

    return run


def _with_token_axis(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v with an axis of tokens."""
    q, k, v = (x if x.dim() == 4 else x.unsqueeze(1) for x in call.tokens[:3])
    return q, k, v


def _is_direct(call: Call) -> bool:
    """Return whether the kernel reads and writes the tensors of a decode call as they are."""
    state, slots = call.state, call.state_indices
    if state is None or not call.has_tokens or state.stride(-1) != 1:
        return False
    if slots is not None and not (call.inplace and slots.is_contiguous()):
        return False
    gates = [x for x in call.tokens[3:] if x is not None]
    rows = all(readable(x) is x for x in _with_token_axis(call))
    return rows and all(x.is_contiguous() for x in gates)
