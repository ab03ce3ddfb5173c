"""Run the backward in five launches.

states            walks forward again: U and the state at every chunk start
reads_back        s Pᵀ dO of all chunks
state_gradients   walks backward: dRHS and dS at every chunk end
pair_gradients    the terms that are quadratic in the chunk
token_gradients   the gradients
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_ops.backends.triton.host.config import power_of_two
from gdn_ops.backends.triton.host.forward import bounds_of, common, gate_of, options, run_states
from gdn_ops.backends.triton.host.launcher import launch
from gdn_ops.backends.triton.host.plan import Plan, Saved, readable, strides
from gdn_ops.backends.triton.host.shapes import Tiles
from gdn_ops.backends.triton.kernels import gradients, reverse
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
    s, device, low = plan.sizes, call.device, plan.low
    q, k, v, d_o = (readable(x) for x in (call.tokens.q, call.tokens.k, call.tokens.v, d_o))
    d_final = d_final.contiguous()
    constants = common(call, plan) | {"V": s.V}
    gates, norms, inverses = saved
    erase, scale, cu = plan.rule.has_erase, float(call.scale), bounds_of(call)
    u, kept, _ = run_states(call, plan, k, v, saved, 1)

    def tile(tiles: Tiles) -> int:
        return min(tiles.BV, power_of_two(s.V))

    rows = (s.HV, plan.slots, plan.C)
    d_rhs = torch.empty((*rows, s.V), dtype=low, device=device)
    tiles = plan.config.reads_back
    launch(
        reverse.reads_back, (plan.slots, -(-s.V // tile(tiles)), s.H),
        q, k, d_o, gates, norms, d_rhs, cu, scale,
        s.N, s.T, plan.slots, *strides(q), *strides(k), *strides(d_o),
        **constants, BV=tile(tiles), **options(tiles),
    )  # fmt: skip

    d_states = torch.empty((s.HV, plan.slots, s.K, s.V), dtype=low, device=device)
    d_initial = torch.empty((s.N, s.HV, s.K, s.V), dtype=torch.float32, device=device)
    tiles = plan.config.state_gradients
    launch(
        reverse.state_gradients, (s.N * s.HV, -(-s.V // tile(tiles))),
        q, k, d_o, gates, norms, inverses, d_final, d_rhs, d_states, d_initial, cu, scale,
        s.T, plan.slots, *strides(q), *strides(k), *strides(d_o),
        **constants, ERASE=erase, BV=tile(tiles), **options(tiles),
    )  # fmt: skip

    squares = (s.H, plan.slots, plan.C, plan.C)
    d_qk = torch.empty(squares, dtype=low, device=device)
    d_kk = torch.empty(squares if erase else (0,), dtype=low, device=device)
    square_rows = min(plan.config.pair_rows, plan.C)
    parts = plan.C // square_rows
    sums = torch.empty((parts + 2, *rows), dtype=torch.float32, device=device)
    gate_sums, beta_sums, starts = sums[2:], sums[0], sums[1]
    tiles = plan.config.pair_gradients
    launch(
        gradients.pair_gradients, (plan.slots, s.H, parts),
        q, k, v, d_o, gates, norms, u, d_rhs, d_qk, d_kk, gate_sums, beta_sums, cu, scale,
        s.N, s.T, plan.slots, *strides(q), *strides(k), *strides(v), *strides(d_o),
        **constants, ERASE=erase, ROWS=square_rows, BV=tile(tiles), **options(tiles),
    )  # fmt: skip

    d_q, d_k = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (q, k))
    d_v = torch.empty(v.shape, dtype=v.dtype, device=device)
    gate = gate_of(call)
    d_gate = None if gate is None else torch.empty_like(gate)
    d_beta = (
        None
        if call.tokens.beta is None
        else torch.empty(call.tokens.beta.shape, dtype=call.tokens.beta.dtype, device=device)
    )
    tiles = plan.config.token_gradients
    launch(
        gradients.token_gradients, (plan.slots, s.H),
        q, k, v, gate, d_o, gates, norms, u, d_rhs, kept, d_states, d_qk, d_kk,
        gate_sums, beta_sums, starts, d_q, d_k, d_v, d_gate, d_beta, cu, scale,
        s.N, s.T, plan.slots, *strides(q), *strides(k), *strides(v), *strides(d_o),
        **constants, HAS_BETA=d_beta is not None, ERASE=erase, PARTS=parts,
        RELOAD=plan.config.reload, BV=tile(tiles), **options(tiles),
    )  # fmt: skip
    return Grads(
        q=d_q,
        k=d_k,
        v=d_v,
        alpha=d_gate if call.tokens.alpha is not None else None,
        log_alpha=d_gate if call.tokens.alpha is None else None,
        beta=d_beta,
        state=None if call.state is None else d_initial,
    )
