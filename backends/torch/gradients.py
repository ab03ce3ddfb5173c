"""The gradients of MATH §5 over one segment; see `chunkwise` for the names and shapes.

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
    Corrected,
    Decay,
    Prepared,
    Scratch,
    Segment,
    across,
    advanced,
    bmm,
    corrected,
    decay_factors,
    per_head,
    prepare,
    scaled_packed,
)


class SegmentGrads(NamedTuple):
    """Gradients of a segment: shapes of `Segment`, and the state's at its start.

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
    """States at the chunk starts (n, G, K, R V), and E, U (n, G, R, C, V), K S."""

    states: Tensor
    E: Tensor
    U: Tensor
    kS: Tensor | None


class _BackwardWalk(NamedTuple):
    """dS at the chunk ends (n, G, K, R V), dRHS and K dS (n, G, R, C, V).

    Xq = s diag(b) dO and Xk = −diag(βb) dRHS are packed, (n, G, C, R V); d_state is the
    gradient of the state at the segment's start.
    """

    d_states: Tensor
    dR: Tensor
    kdS: Tensor
    Xq: Tensor
    Xk: Tensor | None
    d_state: Tensor


def _walk_forward(x: Segment, p: Prepared, state: Tensor, scratch: Scratch) -> _ForwardWalk:
    n, G, R, C, V = x.v.shape
    states = scratch.slots("states", n, state.shape, x.q)
    E, U = (scratch.slots(f"{name}s", n, (G, R, C, V), x.q) for name in "EU")
    kS = scratch.slots("kSs", n, (G, C, R * V), x.q)
    first = states.out(0)
    state = states.put(0, state if first is None else first.copy_(state))
    for i in range(n):
        into = Corrected(kS.out(i), E.out(i), U.out(i))
        E_i, kS_i, U_i = corrected(x, p, i, state, into)
        E.put(i, E_i)
        U.put(i, U_i)
        if kS_i is not None:
            kS.put(i, kS_i)
        if i + 1 < n:
            state = states.put(i + 1, advanced(x, p, i, U_i, state, scratch, states.out(i + 1)))
    if p.T is None:
        return _ForwardWalk(states.stacked(), x.v, x.v * x.beta.unsqueeze(-1), None)
    stacked = kS.stacked()
    kS_heads = per_head(stacked, R) if kS.buffer is not None else stacked
    return _ForwardWalk(states.stacked(), E.stacked(), U.stacked(), kS_heads)


def _walk_backward(
    x: Segment, p: Prepared, d_o: Tensor, d_state: Tensor, scale: float, scratch: Scratch
) -> _BackwardWalk:
    n, G, R, C, V = x.v.shape
    one, wide = (G, R, C, V), (G, C, R * V)
    d_states = scratch.slots("d_states", n, d_state.shape, x.q)
    kdS = scratch.slots("kdSs", n, wide, x.q)
    dR = scratch.slots("dRs", n, one, x.q)
    Xk = scratch.slots("Xk", n, wide, x.q)
    # §5 s diag(b) dO, packed                                [C, R V]
    b = torch.ones_like(x.beta) if p.decay is None else p.decay.b
    Xq = scaled_packed(d_o, b * scale, scratch.get("Xq", (n, *wide), x.q))
    flat = scratch.get("P'dO", (n, G * R, C, V), x.q)
    PdO = bmm(p.P.transpose(-1, -2), d_o.flatten(1, 2), flat).unflatten(1, (G, R))
    for i in reversed(range(n)):
        last = d_states.out(i)
        d_state = d_states.put(i, d_state if last is None else last.copy_(d_state))
        # §5 dU = s Pᵀ dO + diag(d) K dS_C                   [C, V]
        kdS_i = per_head(torch.bmm(x.k[i], d_state, out=kdS.out(i)), R)
        kdS.put(i, kdS_i)
        dU = scratch.get("dU_i", one, x.q)
        if p.decay is None:
            dU = torch.add(PdO[i], kdS_i, out=dU)
        else:
            dU = torch.addcmul(PdO[i], kdS_i, p.decay.d[i].unsqueeze(-1), out=dU)
        # §5 dRHS = Tᵀ dU                                    [C, V]
        into = dR.out(i)
        if p.T is None:
            dR_i = dU if into is None else into.copy_(dU)
        else:
            into = None if into is None else into.flatten(0, 1)
            dR_i = torch.bmm(p.T[i].transpose(1, 2), dU.flatten(0, 1), out=into)
            dR_i = dR_i.unflatten(0, (G, R))
        dR.put(i, dR_i)
        # §5 dS_0 = b_C dS_C + s (diag(b) Q)ᵀ dO − (diag(βb) K)ᵀ dRHS   [K, R V]
        total = None if p.decay is None else p.decay.total[i]
        reused = scratch.get(f"d_state{i % 2}", d_state.shape, x.q)
        d_state = across(total, d_state, reused).baddbmm_(x.q[i].transpose(1, 2), Xq[i])
        if p.T is not None:
            Xk_i = Xk.put(i, scaled_packed(dR_i, -x.beta[i] * b[i], Xk.out(i)))
            d_state = d_state.baddbmm_(x.k[i].transpose(1, 2), Xk_i)
    stacked = kdS.stacked()
    return _BackwardWalk(
        d_states.stacked(),
        dR.stacked(),
        per_head(stacked, R) if kdS.buffer is not None else stacked,
        Xq,
        None if p.T is None else Xk.stacked(),
        d_state,
    )


def _parallel_gradients(
    x: Segment,
    p: Prepared,
    f: _ForwardWalk,
    w: _BackwardWalk,
    d_o: Tensor,
    scale: float,
    scratch: Scratch,
) -> SegmentGrads:
    """Form what is left once dRHS and dS of every chunk are known."""
    n, G, R, C, V = x.v.shape
    square = (n, G, R, C, C)
    D = p.causal.to(x.q.dtype) if p.decay is None else p.decay.D
    beta = x.beta.unsqueeze(-1)
    U_transposed = f.U.transpose(-1, -2)
    # §5 dP = s lower(dO Uᵀ), here without s and mask           [C, C]
    dP = bmm(d_o, U_transposed, scratch.get("dP", square, x.q))
    # §5 dV = diag(β) dRHS,  dβ = rowsum(dRHS ⊙ E) + ...        [C, V]
    dV = torch.mul(w.dR, beta, out=scratch.get("dV", w.dR.shape, x.q))
    d_beta = _rowsum(w.dR, f.E, scratch)
    pairs = torch.mul(dP, D, out=scratch.get("dP D", square, x.q)).sum(2) * scale
    # §5 dQ = (dP ⊙ D) K + s diag(b) dO Sᵀ                      [C, K]
    S_transposed = f.states.transpose(-1, -2)
    dQ = _accumulated((w.Xq, S_transposed), (pairs, x.k))
    # §5 dK = (dP ⊙ D)ᵀ Q + diag(d) U dS_Cᵀ − (diag(βb) dRHS Sᵀ) + (M + Mᵀ) K   [C, K]
    d = torch.ones_like(x.beta) if p.decay is None else p.decay.d
    dU = scaled_packed(f.U, d, scratch.get("dUs", (n, G, C, R * V), x.q))
    terms = [(dU, w.d_states.transpose(-1, -2)), (pairs.transpose(-1, -2), x.q)]
    M = None
    if p.kk is not None and w.Xk is not None:
        # §5 dA = −strict_lower(dRHS Uᵀ),  M = diag(β) dA       [C, C]
        dA = bmm(w.dR, U_transposed, scratch.get("dA", square, x.q)).tril(-1)
        M = torch.mul(dA, -beta, out=scratch.get("M", square, x.q))
        d_beta = d_beta - (dA * p.kk * D).sum(-1)
        both = (M * D).sum(2)
        terms += [(w.Xk, S_transposed), (both + both.transpose(-1, -2), x.k)]
    dK = _accumulated(*terms)
    if p.decay is None:
        return SegmentGrads(dQ, dK, dV, d_beta, None, w.d_state)
    # §5 E = dP ⊙ Q Kᵀ + diag(β) dA ⊙ K Kᵀ                      [C, C]
    E = dP * p.qk if M is None or p.kk is None else torch.addcmul(dP * p.qk, M, p.kk)
    edges = _gate_edges(x, f, w, d_o, dV, scale, scratch)
    d_log = _straddling(E, edges, p.decay)
    if x.zeros is not None:
        # §5 at α_t = 0, the same sum over the pairs with one zero between them
        one = decay_factors(x, p.causal, crossings=1)
        if one is not None:
            before = functional.pad(x.zeros[..., :-1], (1, 0))
            d_log = torch.where(x.zeros > before, _straddling(E, edges, one), d_log)
    return SegmentGrads(dQ, dK, dV, d_beta, d_log, w.d_state)


def _accumulated(*terms: tuple[Tensor, Tensor]) -> Tensor:
    """Return the sum of products over equal leading axes."""
    (a, b), *rest = terms
    total = torch.bmm(a.flatten(0, 1), b.flatten(0, 1))
    for left, right in rest:
        total = total.baddbmm_(left.flatten(0, 1), right.flatten(0, 1))
    return total.view(*a.shape[:2], *total.shape[1:])


def _rowsum(a: Tensor, b: Tensor, scratch: Scratch) -> Tensor:
    """rowsum(a ⊙ b), over V."""
    return torch.mul(a, b, out=scratch.get("rows", a.shape, a)).sum(-1)


def _gate_edges(
    x: Segment,
    f: _ForwardWalk,
    w: _BackwardWalk,
    d_o: Tensor,
    dV: Tensor,
    scale: float,
    scratch: Scratch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the column `start`, the row C and the corner of E (§5), before any decay factor."""
    n, G, R, C, V = x.v.shape
    qS = per_head(bmm(x.q, f.states, scratch.get("qSs", (n, G, C, R * V), x.q)), R)
    # §5 E_i,start = s rowsum(dO ⊙ Q S)_i − β_i rowsum(dRHS ⊙ K S)_i      [C]
    start = _rowsum(d_o, qS, scratch) * scale
    if f.kS is not None:
        start = start - _rowsum(dV, f.kS, scratch)
    # §5 E_C,j = rowsum((K dS_C) ⊙ U)_j,  E_C,start = ⟨dS_C, S⟩           [C], []
    end = _rowsum(w.kdS, f.U, scratch)
    inner = torch.mul(w.d_states, f.states, out=scratch.get("dS S", f.states.shape, x.q))
    corner = inner.unflatten(-1, (R, V)).sum((-3, -1))
    return start, end, corner


def _straddling(E: Tensor, edges: tuple[Tensor, Tensor, Tensor], decay: Decay) -> Tensor:
    """§5 d log α_t: the sum of X = E ⊙ D over the pairs i ≥ t > j, (n, G, R, C).

    Only straddling pairs are added, none is subtracted, so that a tiny α keeps its relative
    precision: every term holds α_t as a factor.
    """
    start, end, corner = edges
    tokens = E.shape[-1]
    from_here = torch.ones(tokens, tokens, dtype=E.dtype, device=E.device).triu_()
    # Σ_{i≥t} X_ij by a product with ones, then Σ_{j<t}            [C, C] -> [C]
    inner = torch.matmul(from_here, E * decay.D).tril(-1).sum(-1)
    from_start = (start * decay.b).flip(-1).cumsum(-1).flip(-1)
    to_end = functional.pad((end * decay.d)[..., :-1].cumsum(-1), (1, 0))
    return inner + from_start + to_end + (corner * decay.total).unsqueeze(-1)
