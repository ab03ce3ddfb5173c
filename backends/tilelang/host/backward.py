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

from gdn_ops.backends.tilelang.host.forward import common, run_compose, run_states, walked
from gdn_ops.backends.tilelang.host.launcher import launch
from gdn_ops.backends.tilelang.host.plan import (
    Given,
    Plan,
    Saved,
    aligned,
    gate_kind,
    gate_of,
    given,
    packed,
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
    s, x, d_o = call.sizes, given(call, plan, saved), packed(d_o)

    def per_chunk(*shape: int) -> Tensor:
        whole = (s.HV, plan.chunk_slots, *shape)
        return torch.empty(whole, dtype=plan.kept, device=call.device)

    # S at every chunk start, and U, which a rule without an error term does not keep.
    chunk_states = per_chunk(s.K, s.V)
    kept = per_chunk(plan.C, s.V) if call.rule.has_erase else None
    u = x.known(kept, 1, 1, plan.C, s.V, dtype=plan.kept)
    run_states(x, "states", x.starts, chunk_states=chunk_states, u=u)
    d_ends = d_final = aligned(d_final.to(torch.float32))
    if plan.is_segmented:
        d_shifts, d_ends = torch.empty_like(saved.starts), torch.empty_like(saved.starts)
        run_state_gradients(x, "shift", d_o, None, d_shifts)
        run_compose(x, d_shifts, d_final, d_ends, reverse=True)
    d_rhs, d_states = per_chunk(plan.C, s.V), per_chunk(s.K, s.V)
    d_initial = torch.empty((s.N, s.HV, s.K, s.V), dtype=torch.float32, device=call.device)
    run_state_gradients(x, "gradients", d_o, d_ends, d_initial, d_rhs, d_states)
    return run_token_gradients(x, d_o, (u, d_rhs, chunk_states, d_states))._replace(
        state=None if call.state is None else d_initial.to(call.state.dtype)
    )


def run_state_gradients(
    x: Given,
    mode: str,
    d_o: Tensor,
    d_ends: Tensor | None,
    d_starts: Tensor,
    d_rhs: Tensor | None = None,
    d_states: Tensor | None = None,
) -> None:
    """Launch the reverse walk over all segments.

    Args:
        x: what every launch reads.
        mode: what is written; see `kernels.state_gradients`.
        d_o: packed.
        d_ends: (segment_slots, HV, K, V) float32, dS where the segments end; None: zero.
        d_starts: float32, dS where sequences start (N, HV, K, V), or segments
            (segment_slots, HV, K, V).
        d_rhs, d_states: per chunk; None with a mode that does not write them.
    """
    plan, s = x.plan, x.call.sizes
    launch(
        state_gradients, walked(x, plan.config.state_gradients, mode),
        x.q, x.k, d_o, x.saved.gates, x.saved.inv_norms, x.inverses,
        x.known(d_ends, 1, 1, s.K, s.V), x.cu,
        x.known(d_rhs, 1, 1, plan.C, s.V, dtype=plan.kept),
        x.known(d_states, 1, 1, s.K, s.V, dtype=plan.kept),
        d_starts, float(x.call.scale), int(x.call.qk_l2norm), plan.L, plan.segment_slots,
    )  # fmt: skip


def run_token_gradients(x: Given, d_o: Tensor, kept: tuple[Tensor, ...]) -> Grads:
    """Launch the kernel that forms the gradients of q, k, v, the gate and β.

    Args:
        x: what every launch reads.
        d_o: packed.
        kept: U, dRHS, S at the starts and dS at the ends of chunks.
    """
    call, plan, tiles, tokens = x.call, x.plan, x.plan.config.token_gradients, x.call.tokens
    gate, beta, HV = gate_of(call), tokens.beta, call.sizes.HV
    d_q, d_k, d_v = (torch.empty_like(t) for t in (x.q, x.k, x.v))
    d_gate, d_beta = (
        None if t is None else torch.empty(t.shape, dtype=torch.float32, device=t.device)
        for t in (gate, beta)
    )
    d_gate, d_beta = x.known(d_gate, 1, 1), x.known(d_beta, 1, 1)
    launch(
        token_gradients,
        common(call, plan, tiles) | {"V": call.sizes.V, "BV": tiles.BV, "stages": tiles.stages},
        x.q, x.k, x.v, d_o, x.known(None if gate is None else gate.view(-1, HV), 1, 1),
        x.saved.gates, x.saved.inv_norms, *kept, x.cu, d_q, d_k, d_v,
        d_gate.view(-1, d_gate.shape[-1]), d_beta.view(-1, d_beta.shape[-1]),
        float(call.scale), gate_kind(call), int(beta is not None), int(call.qk_l2norm),
    )  # fmt: skip
    is_log = tokens.alpha is None
    own = tokens.log_alpha if is_log else tokens.alpha
    d_own = None if own is None else d_gate.to(own.dtype)
    return Grads(
        q=d_q.view(tokens.q.shape),
        k=d_k.view(tokens.k.shape),
        v=d_v.view(tokens.v.shape),
        alpha=None if is_log else d_own,
        log_alpha=d_own if is_log else None,
        beta=None if beta is None else d_beta.to(beta.dtype),
        state=None,
    )
