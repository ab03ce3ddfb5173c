"""Run the backward in two launches, or in four.

walk_back         walks backward: dRHS and dS at every chunk end
token_gradients   the gradients of q, k, v, gates and β

Where a sequence is cut into segments, `walk_back` and `compose` are launched before the first:
what a segment adds to dS, and dS at the cuts. Where the forward has kept no states, `walk` computes
U and the state at every chunk start again: a launch before the first, or, where a sequence is cut,
the one that composes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_ops.backends.triton.host import config as configs
from gdn_ops.backends.triton.host.forward import RESIDENT, totals_of
from gdn_ops.backends.triton.host.launcher import launch
from gdn_ops.backends.triton.host.plan import (
    Plan,
    Saved,
    by_descriptors,
    common,
    dense,
    gate_kind,
    gate_of,
    has_channels,
    options,
    readable,
    strides,
    width,
)
from gdn_ops.backends.triton.host.strengths import lowered, raised
from gdn_ops.backends.triton.host.walk import walk_for_gradients
from gdn_ops.backends.triton.kernels import (
    channel_gradients,
    square_gradients,
    token_gradients,
)
from gdn_ops.call.bind import Call
from gdn_ops.dispatch.registry import Grads


def backward(
    call: Call, plan: Plan, saved: tuple[Tensor, ...], d_o: Tensor, d_final: Tensor,
    shifts: Tensor | None = None,
) -> Grads:  # fmt: skip
    """Return the gradients of a call.

    Args:
        call: the call.
        plan: its plan.
        saved: the tensors that its forward saved.
        d_o: (B, T, HV, V), dtype of v.
        d_final: (N, HV, K, V) float32.
        shifts: what segments add to the gradient of the state, where it is known: (segment_slots,
            HV, K, V) float32.
    """
    given, call = call, lowered(call) if call.widths.apart else call
    s = call.sizes
    q, k, v, d_o = (readable(x) for x in (*call.tokens[:3], d_o))
    kept = Saved(*saved)
    u, states, d_rhs, d_states, d_initial = walk_for_gradients(
        call, plan, kept, d_o, d_final.contiguous(), shifts
    )
    d_q, d_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    of_v = torch.float32 if call.widths.apart else v.dtype
    d_v = torch.empty(v.shape, dtype=of_v, device=v.device)
    gate, beta = gate_of(call), call.tokens.beta
    d_gate = None if gate is None else torch.empty_like(gate)
    d_beta = None if beta is None else torch.empty(beta.shape, dtype=beta.dtype, device=beta.device)
    tiles, erase = plan.config.token_gradients, call.rule.has_erase
    BV = width(tiles, s.V)
    if has_channels(call):
        tokens = q, k, v, d_o
        d_tokens = d_q, d_k, d_v, d_gate, d_beta
        d_erase = _token_gradients_of_channels(
            call, plan, kept, tokens, (u, states, d_rhs, d_states), d_tokens
        )
        grads = _grads(call, d_tokens, d_initial)._replace(erase=d_erase)
        return raised(given, grads) if given.widths.apart else grads
    sums = _scratch(call, plan, BV)
    # Products with a transposed product are not for Hopper, see `token_gradients.turned`.
    reread = configs.tables.target(call.device) in ("sm_90", "sm_100")
    shape = (s.H, plan.chunk_slots, 2, plan.C, plan.C)
    squares = torch.empty(shape if reread else (0,), dtype=plan.kept, device=call.device)
    read = [q, k, d_o, d_rhs, states, d_states, *([u] if erase else [])]
    is_whole = _has_whole_tiles(call, d_o, BV)
    launch(
        token_gradients.token_gradients, (plan.chunk_slots, s.H),
        q, k, v, gate, d_o, kept.gates, u, d_rhs, states, d_states, squares, *sums,
        d_q, d_k, d_v, d_gate, d_beta, dense(call.cu_seqlens), float(call.scale),
        s.N, s.T, plan.chunk_slots, *strides(q), *strides(k), *strides(v), *strides(d_o),
        **common(call, plan), H=s.H, R=s.HV // s.H, V=s.V, BV=BV, GATE=gate_kind(call),
        HAS_BETA=beta is not None, ERASE=erase, NORM=call.qk_l2norm,
        TMA=is_whole and by_descriptors(plan.config, (*read, d_q, d_k, d_v)), REREAD=reread,
        **options(tiles),
    )  # fmt: skip
    return _grads(call, (d_q, d_k, d_v, d_gate, d_beta), d_initial)


def _grads(
    call: Call, d_tokens: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    d_initial: Tensor,
) -> Grads:  # fmt: skip
    """Return the gradients of a call, given those of q, k, v, the gate, β and the state."""
    d_q, d_k, d_v, d_gate, d_beta = d_tokens
    return Grads(
        q=d_q,
        k=d_k,
        v=d_v,
        alpha=d_gate if call.tokens.alpha is not None else None,
        log_alpha=d_gate if call.tokens.alpha is None else None,
        beta=d_beta,
        state=None if call.state is None else d_initial.to(call.state.dtype),
    )


def _token_gradients_of_channels(
    call: Call, plan: Plan, kept: Saved, tokens: tuple[Tensor, ...], walked: tuple[Tensor, ...],
    d_tokens: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
) -> Tensor | None:  # fmt: skip
    """Launch the two kernels that form the gradients of tokens whose channels decay each.

    Return the gradient of erase, (B, T, HV, K) float32, where it stands apart.

    Args:
        call, plan, kept: as in `backward`.
        tokens: q, k, v and the gradient of o, all readable.
        walked: U, S, dRHS and dS.
        d_tokens: where the gradients of q, k, v, the gate and β are written.
    """
    s, (q, k, v, d_o), (u, states, d_rhs, d_states) = call.sizes, tokens, walked
    d_q, d_k, d_v, d_gate, d_beta = d_tokens
    slots, C, device = plan.chunk_slots, plan.C, call.device
    tiles, erase, has_beta = plan.config.channel_gradients, call.rule.has_erase, d_beta is not None
    gate, V, BV = gate_of(call), s.V, width(tiles, s.V)
    squares = torch.empty((s.HV, slots, 2, C, C), dtype=plan.kept, device=device)
    sums = torch.empty((s.HV, slots, C), dtype=torch.float32, device=device)
    same, chosen = common(call, plan), options(tiles)
    assert gate is not None
    launch(
        square_gradients.square_gradients, (slots, s.HV),
        v, d_o, kept.gates, u, d_rhs, squares, sums, d_v, dense(call.cu_seqlens),
        float(call.scale), s.N, s.T, slots, s.HV, *strides(v), *strides(d_o), V=V, C=C, BV=BV,
        ERASE=erase, VARLEN=same["VARLEN"], PRECISION=same["PRECISION"], **chosen,
    )  # fmt: skip
    # Those of the normalised q and k are float32.
    wide = [d_q, d_k]
    if call.qk_l2norm:
        wide = [torch.empty(x.shape, dtype=torch.float32, device=device) for x in (q, k)]
    erases = call.tokens.erase
    d_erase = None if erases is None else torch.empty_like(erases, dtype=torch.float32)
    programs = min(slots * s.H, RESIDENT * configs.tables.processors(device))
    totals = totals_of(plan, programs, device)
    launch(
        channel_gradients.channel_gradients, (programs,),
        q, k, v, gate, d_o, kept.gates, u, d_rhs, states, d_states, squares, sums, totals, *wide,
        d_q, d_k, d_gate, d_beta, erases, d_erase, dense(call.cu_seqlens), float(call.scale), s.N,
        s.T, slots, *strides(q), *strides(k), *strides(v), *strides(gate), *strides(d_o), s.H,
        s.HV // s.H, V=V, BV=BV, GATE=gate_kind(call), HAS_BETA=has_beta, ERASE=erase,
        APART=call.widths.apart, NORM=call.qk_l2norm, **same, **chosen,
    )  # fmt: skip
    return d_erase


def _scratch(call: Call, plan: Plan, BV: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what `token_gradients` writes and reads again.

    Returns:
        The sums of tokens (6, HV, chunk_slots, C) float32, those of rows of S dS_Cᵀ
        (HV, chunk_slots, BV) float32, and numbers of rows (H, chunk_slots, C or BV) int32.
    """
    s, slots, C, device = call.sizes, plan.chunk_slots, plan.C, call.device
    return (
        torch.empty((6, s.HV, slots, C), dtype=torch.float32, device=device),
        torch.empty((s.HV, slots, BV), dtype=torch.float32, device=device),
        torch.empty((s.H, slots, max(C, BV)), dtype=torch.int32, device=device),
    )


def _has_whole_tiles(call: Call, d_o: Tensor, BV: int) -> bool:
    """Return whether tiles of BV columns end where heads do, which lie side by side in d_o."""
    s = call.sizes
    return s.V % BV == 0 and (s.HV == s.H or d_o.stride(2) == s.V)
