"""Run the forward, and the backward, in two stages: for callers who learn the state in between.

    prepare, walk, compose_whole           what sequences make of any state
    compose, walk                          o and the final state, given the initial one

    walk_back, compose_whole               the gradient of the initial state
    compose, walk_back, token_gradients    all gradients, given that of the final state

The launches that compose are left out where sequences are not cut. Where the forward kept no
states, `walk` is run once more, as in `backward`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gdn_ops.backends.triton.host.backward import backward
from gdn_ops.backends.triton.host.forward import run_prepare
from gdn_ops.backends.triton.host.plan import Plan, Saved, make_plan, readable
from gdn_ops.backends.triton.host.strengths import lowered
from gdn_ops.backends.triton.host.walk import (
    starts_from,
    walk_for_maps,
    walk_for_output,
    walk_for_shifts,
)
from gdn_ops.call.bind import Call
from gdn_ops.dispatch.backend import (
    Forward,
    Grads,
    Summarised,
    gradients_without_tokens,
    without_tokens,
)
from gdn_ops.dispatch.results import map_size


def summarise(call: Call) -> Summarised:
    """Return what sequences make of a state, and what `resume` reads."""
    s = call.sizes
    size = map_size(call)
    if not call.has_tokens:
        R = without_tokens(replace(call, state=None), ()).final_state
        M = torch.eye(size, dtype=torch.float32, device=call.device)
        return Summarised(M.repeat(s.N, s.HV, 1, 1), R, ())
    plan, call = _plan(call), _lowered(call)
    saved = run_prepare(call, plan)
    M, R = walk_for_maps(call, plan, saved)
    # Without an error term it is a number times the identity, or a matrix that is diagonal.
    return Summarised(M[..., :size, :size], R, tuple(saved))


def resume(call: Call, kept: tuple[Tensor, ...]) -> Forward:
    """Return o, the final state, and what the backward reads, as `forward` does."""
    s = call.sizes
    if not call.has_tokens:
        return without_tokens(call, ())
    plan, saved, call = _plan(call), Saved(*kept), _lowered(call)
    final = torch.empty((s.N, s.HV, s.K, s.V), dtype=torch.float32, device=call.device)
    if plan.segment_slots:
        starts_from(call, plan, saved, final)
    o = walk_for_output(call, plan, saved, final)
    return Forward(o, final, kept if call.needs_grad else ())


def summarise_gradients(
    call: Call, saved: tuple[Tensor, ...], d_o: Tensor, d_final: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the gradient of the initial state, and what `resume_gradients` reads."""
    if not call.has_tokens:
        return d_final.clone(), ()
    d_initial, shifts = walk_for_shifts(
        _lowered(call), _plan(call), Saved(*saved), readable(d_o), d_final.contiguous()
    )
    return d_initial, () if shifts is None else (shifts,)


def resume_gradients(
    call: Call, saved: tuple[Tensor, ...], kept: tuple[Tensor, ...], d_o: Tensor,
    d_final: Tensor,
) -> Grads:  # fmt: skip
    """Return the gradients of a call, as `backward` does."""
    if not call.has_tokens:
        return gradients_without_tokens(call, d_final)
    return backward(call, _plan(call), saved, d_o, d_final, *kept)


def _lowered(call: Call) -> Call:
    return lowered(call) if call.widths.apart else call


def _plan(call: Call) -> Plan:
    return make_plan(call, is_staged=True)
