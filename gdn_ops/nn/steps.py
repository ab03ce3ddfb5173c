"""Advance a layer by a few tokens, and keep what leads to the state after each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdn_ops.nn.mixer_gates import gates_of
from gdn_ops.nn.options import fail
from gdn_ops.nn.rollback import MemoryStates
from gdn_ops.nn.state import State
from gdn_ops.ops import gated_delta_steps
from gdn_ops.parallel.context import active

if TYPE_CHECKING:
    from gdn_ops.nn.gated_delta_net import GatedDeltaNet


def mixed(
    layer: GatedDeltaNet, x: Tensor, state: State | None, **given: Any
) -> tuple[Tensor, MemoryStates]:
    """Return the output of a layer for a few tokens, and what leads to the state after each.

    The rule runs as `gated_delta_steps`, one token after the other: the memory after a token is,
    bit for bit, what the same inputs give without the tokens behind it.

    Args:
        layer: the layer.
        x: (B, T, hidden_size), checked.
        state: of the layer, checked, or None to start.
        given: further arguments of the call by name, which should be None.

    Returns:
        y like x, and the states.

    Raises:
        SpecError: the call has a mask, packed sequences, or tokens split over ranks.
    """
    for name, value in given.items():
        if value is not None:
            fail(f"{name} is given, should be None with return_states: rows have one length")
    if active() is not None:
        fail("return_states is True, should be False under sequence_parallel")
    inputs = None
    parts = [layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)]
    conv, memory = (None, None) if state is None else state
    if layer.conv is not None:
        joined = torch.cat(parts, -1).mT
        if conv is None:
            conv = joined.new_zeros(*joined.shape[:2], layer.conv.kernel_size - 1)
        inputs = torch.cat([conv.to(joined.dtype), joined], -1)
    q, k, v, _ = layer._convolved(parts, conv, None, None)
    if memory is None:
        dtype = torch.promote_types(v.dtype, torch.float32)
        shape = (len(v), v.shape[2], layer.head_dim, layer.value_dim)
        memory = torch.zeros(shape, dtype=dtype, device=v.device)
    gates: dict[str, Any] = gates_of(layer, x, None)
    o, _, memories = gated_delta_steps(
        *(q, k, v),
        **gates,
        state=memory,
        rule=layer.rule,
        qk_l2norm=layer.qk_norm == "l2",
        return_states=True,
        backend=layer.backend,
    )
    return layer._output(o, x), MemoryStates(State(conv, memory), inputs, memories)
