"""Run the backward in three launches, or five where sequences are cut into segments.

    states            per segment, head and V block   forward again: S at every chunk start, U
    state_gradients   per segment, head and V block   back: dRHS, dS at every chunk's end
    token_gradients   per chunk and key head          the gradients

and before the second one, where a sequence is more than one segment,

    state_gradients   per segment, head and V block   what a segment adds to dS (docs/math.md §6)
    compose           per sequence, head and V block  dS at the end of every segment
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_ops.backends.tilelang.host.forward import (
    common,
    inverses_of,
    recompute,
    run_compose,
    walked,
)
from gdn_ops.backends.tilelang.host.launcher import launch
from gdn_ops.backends.tilelang.host.plan import (
    Packed,
    Plan,
    Saved,
    absent,
    aligned,
    gate_kind,
    gate_of,
    packed,
    packed_call,
)
from gdn_ops.backends.tilelang.kernels.state_gradients import state_gradients
from gdn_ops.backends.tilelang.kernels.token_gradients import token_gradients
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
    s, device, x, d_o = plan.sizes, call.device, packed_call(call), packed(d_o)
    chunk_states, u = recompute(call, plan, x, saved)
    d_ends = d_final = aligned(d_final.to(torch.float32))
    if plan.is_segmented:
        d_shifts, d_ends = torch.empty_like(saved.starts), torch.empty_like(saved.starts)
        run_state_gradients(call, plan, "shift", x, d_o, saved, None, d_shifts)
        run_compose(call, plan, x, saved.maps, d_shifts, d_final, d_ends, reverse=True)
    rows = (s.HV, plan.chunk_slots)
    d_rhs = torch.empty((*rows, plan.C, s.V), dtype=plan.low, device=device)
    d_states = torch.empty((*rows, s.K, s.V), dtype=plan.low, device=device)
    d_initial = torch.empty((s.N, s.HV, s.K, s.V), dtype=torch.float32, device=device)
    run_state_gradients(call, plan, "gradients", x, d_o, saved, d_ends, d_initial, d_rhs, d_states)
    kept = (u, d_rhs, chunk_states, d_states)
    return run_token_gradients(call, plan, x, d_o, saved, kept)._replace(
        state=None if call.state is None else d_initial
    )


def run_state_gradients(
    call: Call,
    plan: Plan,
    mode: str,
    x: Packed,
    d_o: Tensor,
    saved: Saved,
    d_ends: Tensor | None,
    d_starts: Tensor,
    d_rhs: Tensor | None = None,
    d_states: Tensor | None = None,
) -> None:
    """Launch the reverse walk over all segments.

    Args:
        call: the call.
        plan: its plan.
        mode: what is written; see `kernels.state_gradients`.
        x: the tensors of the call.
        d_o: packed.
        saved: the tensors that the forward saved.
        d_ends: (segment_slots, HV, K, V) float32, dS where the segments end; None: zero.
        d_starts: float32, dS where sequences start (N, HV, K, V), or segments
            (segment_slots, HV, K, V).
        d_rhs, d_states: per chunk; None with a mode that does not write them.
    """
    s, device, low = plan.sizes, call.device, plan.low
    launch(
        state_gradients, walked(call, plan, plan.config.state_gradients, mode),
        x.q, x.k, d_o, saved.gates, saved.inv_norms, inverses_of(plan, saved),
        absent(torch.float32, device, 1, 1, s.K, s.V) if d_ends is None else d_ends, x.cu,
        absent(low, device, 1, 1, plan.C, s.V) if d_rhs is None else d_rhs,
        absent(low, device, 1, 1, s.K, s.V) if d_states is None else d_states,
        d_starts, float(call.scale), plan.L, plan.segment_slots,
    )  # fmt: skip


def run_token_gradients(
    call: Call, plan: Plan, x: Packed, d_o: Tensor, saved: Saved, kept: tuple[Tensor, ...]
) -> Grads:
    """Launch the kernel that forms the gradients of q, k, v, the gate and β.

    Args:
        call: the call.
        plan: its plan.
        x: the tensors of the call.
        d_o: packed.
        saved: the tensors that the forward saved.
        kept: U, dRHS, S at the starts and dS at the ends of chunks.
    """
    s, tiles = plan.sizes, plan.config.token_gradients
    nothing = absent(torch.float32, call.device, 1, 1)
    gate, beta = gate_of(call), call.tokens.beta
    given = call.tokens.log_alpha if call.tokens.alpha is None else call.tokens.alpha
    d_q, d_k, d_v = (torch.empty_like(t) for t in x[:3])
    d_gate = nothing if gate is None else torch.empty_like(gate)
    d_beta = nothing
    if beta is not None:
        d_beta = torch.empty(beta.shape, dtype=torch.float32, device=call.device)
    launch(
        token_gradients,
        common(plan, tiles) | {"V": s.V, "BV": tiles.BV, "stages": tiles.stages},
        *x[:3], d_o, nothing if gate is None else gate.view(-1, s.HV),
        saved.gates, saved.inv_norms, *kept, x.cu, d_q, d_k, d_v,
        d_gate.view(-1, d_gate.shape[-1]), d_beta.view(-1, d_beta.shape[-1]),
        float(call.scale), gate_kind(call), int(beta is not None), int(plan.norm),
    )  # fmt: skip
    d_given = None if given is None else d_gate.to(given.dtype)
    return Grads(
        q=d_q.view(call.tokens.q.shape),
        k=d_k.view(call.tokens.k.shape),
        v=d_v.view(call.tokens.v.shape),
        alpha=None if call.tokens.alpha is None else d_given,
        log_alpha=d_given if call.tokens.alpha is None else None,
        beta=None if beta is None else d_beta.to(beta.dtype),
        state=None,
    )
