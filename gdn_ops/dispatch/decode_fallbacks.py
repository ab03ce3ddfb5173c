"""Run decode calls as simpler ones: tokens one by one, a pool of states row by row.

With these a backend needs only `decode_one`. Nothing here waits for a device, so that a call can be
captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gdn_ops.call.bind import Call, Tokens
from gdn_ops.spec.ops import GATED_DELTA_STEP

DecodeOne = Callable[[Call], tuple[Tensor, Tensor]]
"""A function from a call of `gated_delta_step` to (o, new_state)."""

DecodeMany = Callable[[Call], tuple[Tensor, Tensor, Tensor | None]]
"""A function from a call of `gated_delta_steps` to (o, new_state, states or None)."""


LARGE_STATE = 1 << 18
"""Bytes of a row's state from which, on a CPU, a call per row is no slower than its copies.

Measured with B=8 on two AVX-512 cores: 0.79 and 0.75 ms at 256 KiB, 1.7 and 3.4 ms at 1 MiB.
"""


def one_by_one(call: Call, step: DecodeOne) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a call of `gated_delta_steps` without a pool by one step after another.

    The state stays in the compute dtype between tokens, whatever it is stored in.
    """
    sizes, given = call.sizes, call.state
    shape = (sizes.B, sizes.HV, sizes.K, sizes.V)
    stored = call.compute_dtype if given is None else given.dtype
    if given is None:
        state = torch.zeros(shape, dtype=stored, device=call.device)
    else:
        layout = torch.preserve_format if call.inplace else torch.contiguous_format
        state = given.to(call.compute_dtype, copy=not call.inplace, memory_format=layout)
    o = torch.empty(call.tokens.v.shape, dtype=call.tokens.v.dtype, device=call.device)
    states = None
    if call.return_states:
        states = torch.empty((sizes.B, sizes.T, *shape[1:]), dtype=stored, device=call.device)
    token = replace(
        call,
        op=GATED_DELTA_STEP,
        sizes=replace(sizes, T=1),
        return_states=False,
        inplace=True,
    )
    for t in range(sizes.T):
        o[:, t], state = step(token.with_tensors(_part(call.tokens, (slice(None), t)), state))
        if states is not None:
            states[:, t] = state
    if given is None or not call.inplace:
        return o, state.to(stored), states
    return o, given if state is given else given.copy_(state), states


def _part(tokens: Tokens, index: Any) -> Tokens:
    """Return a part of every tensor that is there."""
    return tokens.map(lambda x: x[index])


def through_rows(call: Call, run: DecodeMany) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a call on a pool through `run`, which knows one state per row and updates it in place.

    The rows' states are gathered, advanced and scattered back; large states on a CPU are advanced
    where they are, one after another.
    """
    pool, indices = call.state, call.state_indices
    assert pool is not None and indices is not None
    if not call.inplace:
        pool = pool.clone()
    rows, count = indices.shape[0], pool.shape[0]
    if not rows or not count:
        return _row_by_row(call, pool, [-1] * rows, run)
    if _is_worth_a_call_per_row(pool):
        return _row_by_row(call, pool, indices.tolist(), run)
    # index_copy_ takes no other integers.
    indices = indices.to(torch.int64)
    live = indices >= 0
    o, new, states = run(
        replace(
            call,
            state=pool.index_select(0, indices.clamp(min=0)),
            state_indices=None,
            inplace=True,
        )
    )
    _scatter(pool, indices, live, new)
    o = o.masked_fill(_over(live.logical_not(), o), 0)
    if states is not None:
        states = states.masked_fill_(_over(live.logical_not(), states), 0)
    return o, pool, states


def _scatter(pool: Tensor, indices: Tensor, live: Tensor, new: Tensor) -> None:
    """Write the new states of rows that are not skipped into their slots.

    A skipped row must not write, yet takes part, for the shape of a scatter is fixed: it repeats
    what another row writes, to the same slot, so that the order of the writes does not matter.

    Args:
        pool: (P, HV, K, V), updated.
        indices: (B,), -1 where a row is skipped.
        live: (B,) bool, where it is not.
        new: (B, HV, K, V), overwritten.
    """
    # The first row that is not skipped; row 0 if all are.
    first = live.to(torch.uint8).argmax(keepdim=True)
    source = torch.where(live, torch.arange(len(live), device=live.device), first)
    # If all are skipped, row 0 writes slot 0: what is there already.
    new[:1] = torch.where(live.any(), new[:1], pool[:1])
    slots = indices.clamp(min=0).index_select(0, source)
    pool.index_copy_(0, slots, new.index_select(0, source))


def _is_worth_a_call_per_row(pool: Tensor) -> bool:
    """Return whether to run row by row: the states are large, on a CPU and not traced."""
    if pool.device.type != "cpu" or type(pool) is not Tensor or torch.compiler.is_compiling():
        return False
    return pool[0].nbytes >= LARGE_STATE


def _row_by_row(
    call: Call, pool: Tensor, slots: list[int], run: DecodeMany
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the rows that are not skipped one after another, each in its slot."""
    s = call.sizes
    o = torch.zeros_like(call.tokens.v, memory_format=torch.contiguous_format)
    states = pool.new_empty((s.B, s.T, s.HV, s.K, s.V)) if call.return_states else None
    one = replace(call, sizes=replace(s, B=1, N=1), state_indices=None, inplace=True)
    for row, slot in enumerate(slots):
        here = slice(row, row + 1)
        after: Tensor | None = None
        if slot >= 0:
            own = _part(call.tokens, here)
            o[here], _, after = run(one.with_tensors(own, pool[slot : slot + 1]))
        if states is not None:
            states[here] = 0 if after is None else after
    return o, pool, states


def _over(mask: Tensor, x: Tensor) -> Tensor:
    """Return a mask of rows, reshaped to select rows of x."""
    return mask.view(-1, *(1 for _ in x.shape[1:]))
