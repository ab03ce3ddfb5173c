"""Run the backward in four launches, or in six.

walk              walks forward again: U and the state at every chunk start
walk_back         walks backward: dRHS and dS at every chunk end
pair_gradients    the terms that are quadratic in the chunk
token_gradients   the gradients

Where a sequence is cut into segments, `walk_back` and `compose` are launched before the second:
what a segment adds to dS, and dS at the cuts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn_ops.backends.triton.host.launcher import launch
from gdn_ops.backends.triton.host.plan import (
    Plan,
    Saved,
    common,
    dense,
    gate_kind,
    gate_of,
    options,
    readable,
    strides,
    width,
)
from gdn_ops.backends.triton.host.walk import walk_again, walk_gradients
from gdn_ops.backends.triton.kernels import pair_gradients, token_gradients
from gdn_ops.call.bind import Call
from gdn_ops.dispatch.registry import Grads


class _Given(NamedTuple):
    """Hold what every launch reads: the call, its plan, its tensors, and shared constants."""

    call: Call
    plan: Plan
    saved: Saved
    q: Tensor
    k: Tensor
    v: Tensor
    d_o: Tensor
    constants: dict[str, Any]


def backward(
    call: Call, plan: Plan, saved: tuple[Tensor, ...], d_o: Tensor, d_final: Tensor
) -> Grads:
    """Return the gradients of a call.

    Args:
        call: the call.
        plan: its plan.
        saved: the tensors that its forward saved.
        d_o: (B, T, HV, V), dtype of v.
        d_final: (N, HV, K, V) float32.
    """
    s = call.sizes
    q, k, v, d_o = (readable(x) for x in (*call.tokens[:3], d_o))
    kept = Saved(*saved)
    constants = {"H": s.H, "R": s.HV // s.H, "GATE": gate_kind(call), "NORM": call.qk_l2norm}
    given = _Given(call, plan, kept, q, k, v, d_o, common(call, plan) | constants | {"V": s.V})
    u, states = (kept.u, kept.states) if plan.keep else walk_again(call, plan, kept)
    d_rhs, d_states, d_initial = walk_gradients(call, plan, kept, d_o, d_final.contiguous())
    d_qk, d_kk, sums = _pair_gradients(given, u, d_rhs)

    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    gate, beta = gate_of(call), call.tokens.beta
    d_gate = None if gate is None else torch.empty_like(gate)
    d_beta = None if beta is None else torch.empty(beta.shape, dtype=beta.dtype, device=beta.device)
    tiles = plan.config.token_gradients
    launch(
        token_gradients.token_gradients, (plan.chunk_slots, s.H),
        q, k, v, gate, d_o, kept.gates, kept.inv_norms, u, d_rhs, states, d_states, d_qk, d_kk,
        sums[2:], sums[0], sums[1], d_q, d_k, d_v, d_gate, d_beta,
        dense(call.cu_seqlens), float(call.scale),
        s.N, s.T, plan.chunk_slots, *strides(q), *strides(k), *strides(v), *strides(d_o),
        **given.constants, HAS_BETA=beta is not None, ERASE=call.rule.has_erase,
        PARTS=len(sums) - 2, RELOAD=plan.config.reload, BV=width(tiles, s.V), **options(tiles),
    )  # fmt: skip
    return Grads(
        q=d_q,
        k=d_k,
        v=d_v,
        alpha=d_gate if call.tokens.alpha is not None else None,
        log_alpha=d_gate if call.tokens.alpha is None else None,
        beta=d_beta,
        state=None if call.state is None else d_initial.to(call.state.dtype),
    )


def _pair_gradients(given: _Given, u: Tensor, d_rhs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel of the terms that are quadratic in the chunk.

    Returns:
        d(q kᵀ) and d(k kᵀ), (H, chunk_slots, C, C), the latter empty without an error term; and
        (parts + 2, HV, chunk_slots, C) float32: the sums for β, room for those of chunk starts, and
        the parts of the sums for the gate.
    """
    call, plan, saved, q, k, v, d_o, constants = given
    s, erase, tiles = call.sizes, call.rule.has_erase, plan.config.pair_gradients
    squares = (s.H, plan.chunk_slots, plan.C, plan.C)
    d_qk = torch.empty(squares, dtype=plan.kept, device=call.device)
    d_kk = torch.empty(squares if erase else (0,), dtype=plan.kept, device=call.device)
    rows = min(plan.config.pair_rows, plan.C)
    parts = plan.C // rows
    shape = (parts + 2, s.HV, plan.chunk_slots, plan.C)
    sums = torch.empty(shape, dtype=torch.float32, device=call.device)
    launch(
        pair_gradients.pair_gradients, (plan.chunk_slots, s.H, parts),
        q, k, v, d_o, saved.gates, saved.inv_norms, u, d_rhs, d_qk, d_kk, sums[2:], sums[0],
        dense(call.cu_seqlens), float(call.scale),
        s.N, s.T, plan.chunk_slots, *strides(q), *strides(k), *strides(v), *strides(d_o),
        **constants, ERASE=erase, ROWS=rows, BV=width(tiles, s.V), **options(tiles),
    )  # fmt: skip
    return d_qk, d_kk, sums
