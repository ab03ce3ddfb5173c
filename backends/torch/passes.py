"""Run the forward and the backward over whole calls: allocate, walk the sequences, collect."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gdn_ops.backends.torch.gradients import SegmentGrads
from gdn_ops.backends.torch.walk import (
    Engine,
    Operands,
    Piece,
    pack_state,
    pieces,
    sequences,
    unpack_state,
)
from gdn_ops.call.bind import Call
from gdn_ops.call.numerics import LogGate, l2norm_backward
from gdn_ops.dispatch.registry import Forward, Grads
from gdn_ops.kernel_support.host_memory import empty, settle_allocator


def run_forward(call: Call, engine: Engine) -> Forward:
    """Run `gated_delta`; save the states that `run_backward` starts from."""
    s = call.sizes
    settle_allocator()
    operands = Operands(call, engine.chunk_size)
    o = empty(call.tokens.v.shape, call.tokens.v.dtype, call.device)
    final = torch.empty(s.N, s.HV, s.K, s.V, dtype=operands.dtype, device=call.device)
    kept = None
    if call.needs_grad:
        kept = empty(engine.checkpoint_shape(call), operands.dtype, call.device)
    every, slot = engine.checkpoint_every(s.T), 0
    for states, start, stop in sequences(call):
        state = operands.initial_state(states)
        for j, piece in enumerate(pieces(engine, start, stop)):
            if kept is not None and j % every == 0:
                kept[slot] = state
                slot += 1
            _, state = engine.forward(
                operands.segment(piece),
                state,
                call.scale,
                call.rule.has_erase,
                operands.scratch,
                operands.output_views(o, piece),
            )
        final.unflatten(1, (s.H, s.R))[states] = unpack_state(state, s.H, s.R)
    if kept is None:
        return Forward(o, final)
    kept[slot:] = 0  # the shape is an upper bound for packed sequences
    return Forward(o, final, (kept,))


def run_backward(
    call: Call, engine: Engine, kept: Tensor | None, d_o: Tensor, d_state: Tensor
) -> Grads:
    """Return the gradients of `gated_delta`.

    Args:
        call: the call.
        engine: as in the forward.
        kept: the states that the forward saved, or None to form every state anew; then every
            result is a differentiable function of the inputs.
        d_o: (B, T, HV, V).
        d_state: (N, HV, K, V).
    """
    s = call.sizes
    operands, into = Operands(call, engine.chunk_size), _Gradients.empty(call)
    every, slot = engine.checkpoint_every(s.T), 0
    for states, start, stop in sequences(call):
        cut = pieces(engine, start, stop)
        d_packed = pack_state(d_state[states].to(operands.dtype), s.H)
        block = max(1, len(cut)) if kept is None else every
        starts = range(0, len(cut), block)
        for j in reversed(starts):
            at = slot + j // block
            first = operands.initial_state(states) if kept is None else kept[at]
            some = cut[j : j + block]
            d_packed = _backward_block(operands, engine, some, first, d_o, d_packed, into)
        slot += len(starts)
        into.state.unflatten(1, (s.H, s.R))[states] = unpack_state(d_packed, s.H, s.R)
    return into.finished(call, operands.gate)


def _backward_block(
    operands: Operands,
    engine: Engine,
    block: list[Piece],
    state: Tensor,
    d_o: Tensor,
    d_state: Tensor,
    into: _Gradients,
) -> Tensor:
    """Walk back over the segments of one checkpoint; return the state's gradient at its start."""
    options = operands.call.scale, operands.call.rule.has_erase, operands.scratch
    states = [state]
    for piece in block[:-1]:
        states.append(engine.advance(operands.segment(piece), states[-1], *options))
    for piece, start in zip(reversed(block), reversed(states), strict=True):
        x, d_piece = operands.segment(piece), operands.gradients(d_o, piece)
        found = engine.backward(x, start, d_piece, d_state, *options)
        into.store(operands, piece, found)
        d_state = found.state
    return d_state


class _Gradients(NamedTuple):
    """Hold the gradients of a call: q, k, v in its dtypes, the rest in the compute dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor
    state: Tensor

    @staticmethod
    def empty(call: Call) -> _Gradients:
        s, dtype, device = call.sizes, call.compute_dtype, call.device
        return _Gradients(
            empty((s.B, s.T, s.H, s.K), call.tokens.q.dtype, device),
            empty((s.B, s.T, s.H, s.K), call.tokens.k.dtype, device),
            empty((s.B, s.T, s.HV, s.V), call.tokens.v.dtype, device),
            empty((s.B, s.T, s.HV), dtype, device),
            empty((s.B, s.T, s.HV), dtype, device),
            empty((s.N, s.HV, s.K, s.V), dtype, device),
        )

    def store(self, operands: Operands, piece: Piece, found: SegmentGrads) -> None:
        """Store the gradients of one segment."""
        call, d_q, d_k = operands.call, found.q, found.k
        if call.qk_l2norm:
            d_q = l2norm_backward(operands.keys(call.tokens.q, piece), d_q)
            d_k = l2norm_backward(operands.keys(call.tokens.k, piece), d_k)
        for into, x in ((self.q, d_q), (self.k, d_k), (self.v, found.v), (self.beta, found.beta)):
            operands.store(into, piece, x)
        if found.log_decay is not None:
            operands.store(self.log_decay, piece, found.log_decay)

    def finished(self, call: Call, gate: LogGate | None) -> Grads:
        """Return the gradients in the dtypes of the arguments."""
        d_alpha = d_log_alpha = None
        if call.tokens.alpha is not None:
            # §5 dα_t = d log α_t / α_t where α_t > 0; at 0 the sum is dα_t already
            alpha = call.tokens.alpha.to(self.log_decay.dtype)
            if gate is not None and gate.zero is not None:
                alpha = torch.where(gate.zero, 1.0, alpha)
            d_alpha = (self.log_decay / alpha).to(call.tokens.alpha.dtype)
        elif call.tokens.log_alpha is not None:
            # §5 d log α at −inf is 0
            d_log = torch.where(torch.isneginf(call.tokens.log_alpha), 0.0, self.log_decay)
            d_log_alpha = d_log.to(call.tokens.log_alpha.dtype)
        return Grads(
            self.q,
            self.k,
            self.v,
            d_alpha,
            d_log_alpha,
            None if call.tokens.beta is None else self.beta.to(call.tokens.beta.dtype),
            None if call.state is None else self.state.to(call.state.dtype),
        )
