"""Run the backward in three launches, or five where sequences are cut into segments.

    walk        per segment, head and V block   forward again: S at every chunk start, U
    reverse     per segment, head and V block   back: dRHS, dS at every chunk's end
    gradients   per chunk and key head          the gradients

and before the second one, where a sequence is more than one segment,

    reverse     per segment, head and V block   what a segment adds to dS (docs/math.md §6)
    compose     per sequence, head and V block  dS at the end of every segment
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_ops.backends.tilelang.host import config as configs
from gdn_ops.backends.tilelang.host.forward import dtype_of, is_bulk, run_compose, run_states
from gdn_ops.backends.tilelang.host.launcher import launch
from gdn_ops.backends.tilelang.host.plan import (
    Plan,
    Saved,
    absent,
    aligned,
    cu_of,
    gate_kind,
    gate_of,
    packed,
)
from gdn_ops.backends.tilelang.kernels.gradients import gradients
from gdn_ops.backends.tilelang.kernels.reverse import reverse
from gdn_ops.call.bind import Call
from gdn_ops.dispatch.registry import Grads


def backward(call: Call, plan: Plan, saved: Saved, d_o: Tensor, d_final: Tensor) -> Grads:
    """Return the gradients of a call.

    Args:
        call: the call.
        plan: its plan.
        saved: the tensors that its forward saved.
        d_o: (B, T, HV, V), dtype of v.
        d_final: (N, HV, K, V) float32.
    """
    s, device = plan.sizes, call.device
    q, k, v, d_o, cu = (
        packed(call.tokens.q),
        packed(call.tokens.k),
        packed(call.tokens.v),
        packed(d_o),
        cu_of(call),
    )
    kept, u = run_states(call, plan, q, k, v, saved, cu)
    d_ends = d_final = aligned(d_final.to(torch.float32))
    if plan.is_segmented:
        d_shifts, d_ends = torch.empty_like(saved.starts), torch.empty_like(saved.starts)
        run_reverse(call, plan, "shift", q, k, d_o, saved, None, cu, d_shifts)
        run_compose(call, plan, saved.maps, d_shifts, d_final, cu, d_ends, reverse=True)
    rows = (s.HV, plan.slots)
    d_rhs = torch.empty((*rows, plan.C, s.V), dtype=plan.low, device=device)
    d_states = torch.empty((*rows, s.K, s.V), dtype=plan.low, device=device)
    d_initial = torch.empty((s.N, s.HV, s.K, s.V), dtype=torch.float32, device=device)
    run_reverse(call, plan, "gradients", q, k, d_o, saved, d_ends, cu, d_initial, d_rhs, d_states)
    return run_gradients(call, plan, q, k, v, d_o, saved, u, d_rhs, kept, d_states, cu)._replace(
        state=None if call.state is None else d_initial
    )


def run_reverse(
    call: Call,
    plan: Plan,
    mode: str,
    q: Tensor,
    k: Tensor,
    d_o: Tensor,
    saved: Saved,
    d_ends: Tensor | None,
    cu: Tensor,
    d_starts: Tensor,
    d_rhs: Tensor | None = None,
    d_states: Tensor | None = None,
) -> None:
    """Launch the reverse walk over all segments.

    Args:
        call: the call.
        plan: its plan.
        mode: what is written; see `kernels.reverse`.
        q, k, d_o: packed.
        saved: the tensors that the forward saved.
        d_ends: (places, HV, K, V) float32, dS where the segments end; None: zero.
        cu: where sequences begin.
        d_starts: float32, dS where sequences start (N, HV, K, V), or segments (places, HV, K, V).
        d_rhs, d_states: per chunk; None with a mode that does not write them.
    """
    s, device, tiles = plan.sizes, call.device, plan.config.reverse
    erase, f32 = plan.rule.has_erase, torch.float32
    launch(
        reverse,
        {
            "K": s.K, "BK": plan.BK, "V": s.V, "BV": configs.columns(device, s, tiles.BV),
            "C": plan.C, "dtype": dtype_of(plan), "erase": erase, "mode": mode,
            "threads": tiles.threads, "stages": tiles.stages, "bulk": is_bulk(call),
        },
        q, k, d_o, saved.gates, saved.norms,
        saved.inverses if erase else absent(plan.low, device, 1, 1, plan.C, plan.C),
        absent(f32, device, 1, 1, s.K, s.V) if d_ends is None else d_ends,
        cu,
        absent(plan.low, device, 1, 1, plan.C, s.V) if d_rhs is None else d_rhs,
        absent(plan.low, device, 1, 1, s.K, s.V) if d_states is None else d_states,
        d_starts, float(call.scale), plan.L, plan.places,
    )  # fmt: skip


def run_gradients(
    call: Call,
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_o: Tensor,
    saved: Saved,
    u: Tensor,
    d_rhs: Tensor,
    kept: Tensor,
    d_states: Tensor,
    cu: Tensor,
) -> Grads:
    """Launch the kernel that forms the gradients of q, k, v, the gate and β."""
    s, device, tiles, f32 = plan.sizes, call.device, plan.config.gradients, torch.float32
    gate, given = (
        gate_of(call),
        call.tokens.log_alpha if call.tokens.alpha is None else call.tokens.alpha,
    )
    d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
    d_gate = absent(f32, device, 1, 1) if gate is None else torch.empty_like(gate)
    d_beta = (
        absent(f32, device, 1, 1)
        if call.tokens.beta is None
        else torch.empty(call.tokens.beta.shape, dtype=f32, device=device)
    )
    launch(
        gradients,
        {
            "K": s.K, "BK": plan.BK, "V": s.V, "BV": tiles.BV, "C": plan.C,
            "dtype": dtype_of(plan), "erase": plan.rule.has_erase, "threads": tiles.threads,
            "stages": tiles.stages,
        },
        q, k, v, d_o,
        absent(f32, device, 1, 1) if gate is None else gate.view(-1, s.HV),
        saved.gates, saved.norms,
        u if plan.rule.has_erase else absent(plan.low, device, 1, 1, plan.C, s.V),
        d_rhs, kept, d_states, cu, d_q, d_k, d_v,
        d_gate.view(-1, d_gate.shape[-1]), d_beta.view(-1, d_beta.shape[-1]),
        float(call.scale), gate_kind(call), int(call.tokens.beta is not None), int(plan.norm),
    )  # fmt: skip
    if given is None:
        d_given = None
    else:
        d_given = d_gate.to(given.dtype)
    return Grads(
        q=d_q.view(call.tokens.q.shape),
        k=d_k.view(call.tokens.k.shape),
        v=d_v.view(call.tokens.v.shape),
        alpha=d_given if call.tokens.alpha is not None else None,
        log_alpha=d_given if call.tokens.alpha is None else None,
        beta=None if call.tokens.beta is None else d_beta.to(call.tokens.beta.dtype),
        state=None,
    )
