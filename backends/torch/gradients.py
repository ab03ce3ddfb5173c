"""Compute the gradients of docs/math.md §5 over one segment, with the names of `chunkwise`.

Two passes in sequence, forward for S and U, backward for dS and dRHS, and then everything
else for all chunks of the segment at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gdn_ops.backends.torch.chunkwise import (
    NO_SCRATCH,
    Decay,
    Prepared,
    Read,
    Scratch,
    Segment,
    across,
    advanced,
    bmm,
    decay_factors,
    per_head,
    plus_product,
    prepare,
    read_state,
    scaled_packed,
)


class SegmentGrads(NamedTuple):
    """Hold the gradients of a segment, in the shapes of `Segment`, and of the state at its start.

    Attributes:
        log_decay: d log α where α > 0 (and dα where α = 0, if `zeros` was given).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    state: Tensor


def backward_segment(
    x: Segment,
    state: Tensor,
    d_o: Tensor,
    d_state: Tensor,
    scale: float,
    has_erase: bool,
    scratch: Scratch = NO_SCRATCH,
) -> SegmentGrads:
    """Return the gradients of a segment.

    Args:
        x: its operands.
        state: (G, K, R V) at its start.
        d_o: (n, G, R, C, V).
        d_state: (G, K, R V), the gradient of the state at its end.
        scale: s.
        has_erase: whether the rule has an error term.
        scratch: buffers to reuse.
    """
    p = prepare(x, scale, has_erase, scratch)
    forward = _walk_forward(x, p, state, scratch)
    back = _walk_backward(x, p, d_o, d_state, scale, scratch)
    return _parallel_gradients(x, p, forward, back, d_o, scale, scratch)


class _ForwardWalk(NamedTuple):
    """Hold the states at chunk starts (n, G, K, R V), E and U (n, G, R, C, V), [Q; K] S packed."""

    states: Tensor
    E: Tensor
    U: Tensor
    qkS: Tensor


class _BackwardWalk(NamedTuple):
    """Hold the results of the reverse walk.

    Attributes:
        d_states: dS at the chunk ends, (n, G, K, R V).
        dR: dRHS, (n, G, R, C, V).
        kdS: K dS, packed, (n, G, C, R V).
        X: s diag(b) dO above −diag(βb) dRHS, packed, (n, G, 2 C, R V); without erase only
            the first half.
        d_state: the gradient of the state at the segment's start.
    """

    d_states: Tensor
    dR: Tensor
    kdS: Tensor
    X: Tensor
    d_state: Tensor


def _walk_forward(x: Segment, p: Prepared, state: Tensor, scratch: Scratch) -> _ForwardWalk:
    n, G, R, C, V = x.v.shape
    states = scratch.slots("states", n, state.shape, x.qk)
    E, U = (scratch.slots(f"{name}s", n, (G, R, C, V), x.qk) for name in "EU")
    qkS = scratch.slots("[Q; K] Ss", n, (G, 2 * C if p.T is not None else C, R * V), x.qk)
    first = states.out(0)
    state = states.put(0, state if first is None else first.copy_(state))
    for i in range(n):
        qkS_i, E_i, U_i = read_state(x, p, i, state, Read(qkS.out(i), E.out(i), U.out(i)))
        for slots, value in ((qkS, qkS_i), (E, E_i), (U, U_i)):
            slots.put(i, value)
        if i + 1 < n:
            state = states.put(i + 1, advanced(x, p, i, U_i, state, scratch, states.out(i + 1)))
    E_all = x.v if p.T is None else E.stacked()
    return _ForwardWalk(states.stacked(), E_all, U.stacked(), qkS.stacked())


def _walk_backward(
    x: Segment, p: Prepared, d_o: Tensor, d_state: Tensor, scale: float, scratch: Scratch
) -> _BackwardWalk:
    n, G, R, C, V = x.v.shape
    one, wide = (G, R, C, V), (G, C, R * V)
    rows = C if p.T is None else 2 * C
    d_states = scratch.slots("d_states", n, d_state.shape, x.qk)
    kdS = scratch.slots("K dS", n, wide, x.qk)
    dR = scratch.slots("dRHS", n, one, x.qk)
    X = scratch.slots("X", n, (G, rows, R * V), x.qk)
    b = torch.ones_like(x.beta) if p.decay is None else p.decay.b
    flat = scratch.get("P' dO", (n, G * R, C, V), x.qk)
    PdO = bmm(p.P.mT, d_o.flatten(1, 2), flat).view(n, *one)
    for i in reversed(range(n)):
        last = d_states.out(i)
        d_state = d_states.put(i, d_state if last is None else last.copy_(d_state))
        # §5 dU = s Pᵀ dO + diag(d) K dS_C                   [C, V]
        kdS_i = kdS.put(i, torch.bmm(x.k()[i], d_state, out=kdS.out(i)))
        dU, kdS_i = scratch.get("dU_i", one, x.qk), per_head(kdS_i, R)
        if p.decay is None:
            dU = torch.add(PdO[i], kdS_i, out=dU)
        else:
            dU = torch.addcmul(PdO[i], kdS_i, p.decay.d[i].unsqueeze(-1), out=dU)
        # §5 dRHS = Tᵀ dU                                    [C, V]
        dR_i = dR.put(i, _transposed_solve(p, i, dU, dR.out(i)))
        # §5 dS_0 = b_C dS_C + s (diag(b) Q)ᵀ dO − (diag(βb) K)ᵀ dRHS   [K, R V]
        X_i = X.put(i, _weighted(d_o[i], b[i] * scale, dR_i, x.beta[i] * -b[i], X.out(i), rows))
        total = None if p.decay is None else p.decay.total[i]
        reused = scratch.get(f"d_state{i % 2}", d_state.shape, x.qk)
        d_state = plus_product(across(total, d_state, reused), x.qk[i, :, :rows].mT, X_i)
    return _BackwardWalk(d_states.stacked(), dR.stacked(), kdS.stacked(), X.stacked(), d_state)


def _transposed_solve(p: Prepared, i: int, dU: Tensor, out: Tensor | None) -> Tensor:
    """Return Tᵀ dU of chunk i, (G, R, C, V); dU itself without erase."""
    if p.T is None:
        return dU if out is None else out.copy_(dU)
    flat = None if out is None else out.flatten(0, 1)
    return torch.bmm(p.T[i].mT, dU.flatten(0, 1), out=flat).view(dU.shape)


def _weighted(
    d_o: Tensor, of_o: Tensor, dR: Tensor, of_R: Tensor, out: Tensor | None, rows: int
) -> Tensor:
    """Stack d_o and dR, each times its weight (G, R, C), as (G, rows, R V)."""
    C = d_o.shape[-2]
    if out is None:
        upper = scaled_packed(d_o, of_o, None)
        return upper if rows == C else torch.cat((upper, scaled_packed(dR, of_R, None)), 1)
    scaled_packed(d_o, of_o, out[:, :C])
    if rows > C:
        scaled_packed(dR, of_R, out[:, C:])
    return out


def _parallel_gradients(
    x: Segment,
    p: Prepared,
    f: _ForwardWalk,
    w: _BackwardWalk,
    d_o: Tensor,
    scale: float,
    scratch: Scratch,
) -> SegmentGrads:
    """Form the gradients of a segment, given dRHS and dS of every chunk."""
    n, G, R, C, V = x.v.shape
    square = (n, G, R, C, C)
    D = p.causal.to(x.qk.dtype) if p.decay is None else p.decay.D
    beta = x.beta.unsqueeze(-1)
    # §5 dP = s lower(dO Uᵀ), here without s and mask           [C, C]
    dP = bmm(d_o, f.U.mT, scratch.get("dP", square, x.qk))
    # §5 dV = diag(β) dRHS,  dβ = rowsum(dRHS ⊙ E) + ...        [C, V]
    dV = torch.mul(w.dR, beta, out=scratch.get("dV", w.dR.shape, x.qk))
    d_beta = _rowsum(w.dR, f.E, scratch)
    pairs = torch.mul(dP, D, out=scratch.get("masked", square, x.qk)).sum(2) * scale
    # §5 dQ = (dP ⊙ D) K + s diag(b) dO Sᵀ                      [C, K]
    shape = (n, G, w.X.shape[2], x.qk.shape[-1])
    both = bmm(w.X, f.states.mT, scratch.get("dQ, dK", shape, x.qk))
    half = (*shape[:2], C, shape[3])
    dQ = plus_product(both[..., :C, :], pairs, x.k(), scratch.get("dQ", half, x.qk))
    # §5 dK = (dP ⊙ D)ᵀ Q + diag(d) U dS_Cᵀ − (diag(βb) dRHS Sᵀ) + (M + Mᵀ) K   [C, K]
    dK = both[..., C:, :] if p.T is not None else torch.zeros_like(dQ)
    d = torch.ones_like(x.beta) if p.decay is None else p.decay.d
    dU = scaled_packed(f.U, d, scratch.get("dUs", (n, G, C, R * V), x.qk))
    dK = plus_product(dK, pairs.mT, x.q(), scratch.get("dK", half, x.qk))
    dK = plus_product(dK, dU, w.d_states.mT)
    E = torch.mul(dP, p.qk, out=scratch.get("E_ij", square, x.qk))
    if p.kk is not None:
        # §5 dA = −strict_lower(dRHS Uᵀ),  M = diag(β) dA       [C, C]
        dA = bmm(w.dR, f.U.mT, scratch.get("dA", square, x.qk))
        dA = dA.tril_(-1).neg_() if scratch.enabled else -dA.tril(-1)
        masked = torch.mul(dA, D, out=scratch.get("masked", square, x.qk))
        d_beta = d_beta + _rowsum(masked, p.kk.expand(square), scratch)
        M = torch.mul(masked, beta, out=scratch.get("masked", square, x.qk)).sum(2)
        dK = plus_product(dK, M + M.mT, x.k())
        # §5 E = dP ⊙ Q Kᵀ + diag(β) dA ⊙ K Kᵀ                  [C, C]
        weighted = torch.mul(dA, beta, out=scratch.get("masked", square, x.qk))
        E = torch.addcmul(E, weighted, p.kk, out=scratch.get("E_ij", square, x.qk))
    if p.decay is None:
        return SegmentGrads(dQ, dK, dV, d_beta, None, w.d_state)
    edges = _gate_edges(x, p, f, w, d_o, dV, scale, scratch)
    d_log = _straddling(E, edges, p.decay, scratch)
    if x.zeros is not None:
        # §5 at α_t = 0, the same sum over the pairs with one zero between them
        one = decay_factors(x, p.causal, crossings=1)
        if one is not None:
            before = functional.pad(x.zeros[..., :-1], (1, 0))
            d_log = torch.where(x.zeros > before, _straddling(E, edges, one, scratch), d_log)
    return SegmentGrads(dQ, dK, dV, d_beta, d_log, w.d_state)


def _rowsum(a: Tensor, b: Tensor, scratch: Scratch) -> Tensor:
    """Return rowsum(a ⊙ b), over the last axis."""
    return torch.mul(a, b, out=scratch.get(f"rows {a.shape[-1]}", a.shape, a)).sum(-1)


def _gate_edges(
    x: Segment,
    p: Prepared,
    f: _ForwardWalk,
    w: _BackwardWalk,
    d_o: Tensor,
    dV: Tensor,
    scale: float,
    scratch: Scratch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the column `start`, the row C and the corner of E (§5), before any decay factor."""
    R, C, V = x.v.shape[2:]
    # §5 E_i,start = s rowsum(dO ⊙ Q S)_i − β_i rowsum(dRHS ⊙ K S)_i      [C]
    start = _rowsum(d_o, per_head(f.qkS[..., :C, :], R), scratch) * scale
    if p.T is not None:
        start = start - _rowsum(dV, per_head(f.qkS[..., C:, :], R), scratch)
    # §5 E_C,j = rowsum((K dS_C) ⊙ U)_j,  E_C,start = ⟨dS_C, S⟩           [C], []
    end = _rowsum(f.U, per_head(w.kdS, R), scratch)
    inner = torch.mul(w.d_states, f.states, out=scratch.get("dS S", f.states.shape, x.qk))
    corner = inner.unflatten(-1, (R, V)).sum((-3, -1))
    return start, end, corner


def _straddling(
    E: Tensor, edges: tuple[Tensor, Tensor, Tensor], decay: Decay, scratch: Scratch
) -> Tensor:
    """Return d log α_t of §5: the sum of X = E ⊙ D over the pairs i ≥ t > j, (n, G, R, C).

    Only straddling pairs are added, none is subtracted, so that a tiny α keeps its relative
    precision: every term holds α_t as a factor.
    """
    start, end, corner = edges
    tokens = E.shape[-1]
    from_here = torch.ones(tokens, tokens, dtype=E.dtype, device=E.device).triu_()
    # Σ_{i≥t} X_ij by a product with ones, then Σ_{j<t}            [C, C] -> [C]
    X = torch.mul(E, decay.D, out=scratch.get("masked", E.shape, E))
    below = torch.ones_like(from_here).tril_(-1)
    sums = scratch.get("sums", E.shape, E)
    flat = None if sums is None else sums.flatten(0, -3)
    product = torch.bmm(from_here.expand(X.flatten(0, -3).shape), X.flatten(0, -3), out=flat)
    inner = _rowsum(product.view(X.shape), below.expand(X.shape), scratch)
    from_start = (start * decay.b).flip(-1).cumsum(-1).flip(-1)
    to_end = functional.pad((end * decay.d)[..., :-1].cumsum(-1), (1, 0))
    return inner + from_start + to_end + (corner * decay.total).unsqueeze(-1)
