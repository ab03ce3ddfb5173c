"""Run the decode ops in one launch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gdn_ops.backends.tilelang.host import config as configs
from gdn_ops.backends.tilelang.host.launcher import launch
from gdn_ops.backends.tilelang.host.plan import ALIGNED, absent, dense, gate_kind, gate_of
from gdn_ops.backends.tilelang.kernels import step
from gdn_ops.call.bind import Call
from gdn_ops.call.structure import dtype_name

UNIT = 16
"""Elements of a state that strides are counted in where all are multiples of it."""


def run(
    call: Call,
    tokens: tuple[Tensor, Tensor, Tensor],
    o: Tensor,
    new_state: Tensor,
    states: Tensor | None,
) -> None:
    """Launch the decode kernel; in place, the old and the new state are the same memory."""
    q, k, v = tokens
    B, T, HV, V = v.shape
    K, R, state = q.shape[-1], HV // q.shape[2], call.state
    if B * T == 0:
        if state is None:
            new_state.zero_()
        elif new_state is not state:
            new_state.copy_(state)
        return
    config = configs.tables.choose(call.device, K, V)
    unit = UNIT if state is None or _is_wide(state) else 1
    nothing = absent(torch.float32, call.device)
    beta, erase, write = (dense(x) for x in call.tokens[5:])
    strength = beta if write is None else write
    is_number = strength is not None and call.widths.write != "channel"
    no_state = absent(new_state.dtype, call.device, 1, unit)
    indices, index_step = _indices(call)
    launch(
        step.tokens,
        {
            "K": K, "V": V, "BV": math.gcd(config.BV, V), "low": dtype_name(v.dtype),
            "stored": dtype_name(new_state.dtype), "erase": call.rule.has_erase, "UNIT": unit,
            "channels": call.widths.decay == "channel",
            "erases": "none" if erase is None else call.widths.erase,
            "writes": "none" if write is None else call.widths.write,
            "threads": 32 * config.warps,
        },
        memory(q), memory(k), memory(v),
        *(nothing if x is None else x.view(-1) for x in (gate_of(call), strength, erase)),
        *(no_state if x is None else memory(x).view(-1, unit) for x in (state, new_state, states)),
        indices, o.view(B * T, HV, V),
        B, T, R, float(call.scale), gate_kind(call), int(is_number), int(call.qk_l2norm),
        int(state is not None), int(states is not None), index_step,
        *q.stride(), *k.stride(), *v.stride(),
        *_strides(new_state if state is None else state, unit), *_strides(new_state, unit),
    )  # fmt: skip


def memory(x: Tensor) -> Tensor:
    """Return a flat view of the memory of x, from its first element to its last, (elements,)."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((last + 1,), (1,))


def _is_wide(state: Tensor) -> bool:
    """Return whether every row of V columns is aligned memory without gaps."""
    if state.data_ptr() % ALIGNED or (state.stride(-1) != 1 and state.shape[-1] > 1):
        return False
    lengths = zip(state.shape[:-1], state.stride()[:-1], strict=True)
    return all(size == 1 or stride % UNIT == 0 for size, stride in lengths)


def _strides(state: Tensor, unit: int) -> tuple[int, int, int, int]:
    """Return the strides of row, head and K divided by the unit, and that of V as it is."""
    row, head, k, v = state.stride()
    return row // unit, head // unit, k // unit, v


def _indices(call: Call) -> tuple[Tensor, int]:
    """Return the pool slots of the rows as int32, and their stride: 0 without a pool."""
    given = call.state_indices
    if given is None:
        return absent(torch.int32, call.device), 0
    # The low half of an int64 is the slot too, or -1: nothing is launched to convert it.
    return given.contiguous().view(torch.int32), given.itemsize // 4
