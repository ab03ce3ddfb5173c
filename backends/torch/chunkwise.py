"""The chunkwise form of MATH §3 and its gradients, §5, over one segment of a few chunks.

A segment is n chunks of C tokens for G = rows x H key heads, each with R value heads. What
does not depend on the state is formed for all chunks of the segment at once; only K S, the
correction and the state update run in sequence. Value heads of one key head are packed along
V for every product with the state, so that q and k are never repeated.

    q, k   (n, G, C, K)        D, A, T, P   (n, G, R, C, C)
    v, U   (n, G, R, C, V)     b, d, beta   (n, G, R, C)
    S, dS  (G, K, R V)         G_cum, z     (n, G, R, C)

Everything is in the compute dtype except G_cum. All functions are pure torch: autograd sees
through them, which is what second derivatives use, and torch.compile can fuse them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Segment(NamedTuple):
    """The operands of a segment; see the module docstring for shapes.

    Attributes:
        q, k, v, beta: operands in the compute dtype.
        log_decay_cumsum: G of §4, inclusive within each chunk; None where nothing decays.
        zeros: z of §4; None where no gate is 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay_cumsum: Tensor | None
    zeros: Tensor | None


class Decay(NamedTuple):
    """The decay factors of §3: D within a chunk, b from its start, d to its end, b_C across."""

    D: Tensor
    b: Tensor
    d: Tensor
    total: Tensor


class Prepared(NamedTuple):
    """What does not depend on the state.

    Attributes:
        decay: None where nothing decays.
        causal: (C, C) ones on and below the diagonal.
        qk: s Q Kᵀ, (n, G, 1, C, C).
        kk: K Kᵀ, or None without erase.
        P: s lower(Q Kᵀ ⊙ D), (n, G R, C, C).
        T: (I + A)⁻¹, (n, G R, C, C), or None without erase.
    """

    decay: Decay | None
    causal: Tensor
    qk: Tensor
    kk: Tensor | None
    P: Tensor
    T: Tensor | None


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


def _packed(x: Tensor) -> Tensor:
    """(..., G, R, C, V) to (..., G, C, R V)."""
    return x.transpose(-3, -2).flatten(-2)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """(..., G, C, R V) to a view (..., G, R, C, V)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """Multiply over equal leading axes, as one flat batch."""
    out = torch.bmm(a.flatten(0, -3), b.flatten(0, -3))
    return out.unflatten(0, a.shape[:-2])


def _across(total: Tensor | None, state: Tensor) -> Tensor:
    """b_C S as a new tensor, (G, K, R V)."""
    if total is None:
        return state.clone()
    heads = total.shape[-1]
    return (state.unflatten(-1, (heads, -1)) * total[:, None, :, None]).flatten(-2)


def _causal(x: Segment) -> Tensor:
    tokens = x.q.shape[-2]
    return torch.ones(tokens, tokens, dtype=torch.bool, device=x.q.device).tril_()


def decay_factors(x: Segment, causal: Tensor, crossings: int = 0) -> Decay | None:
    """Form D, b, d and b_C, keeping only pairs with `crossings` zeros of α between them.

    crossings=0 gives the factors of §3, crossings=1 the D¹ of §5.
    """
    G, z = x.log_decay_cumsum, x.zeros
    if G is None:
        return None
    dtype = x.q.dtype
    # §4 D_ij = exp(G_i − G_j) [z_i = z_j],  i ≥ j      [C, C]
    difference = (G.unsqueeze(-1) - G.unsqueeze(-2)).to(dtype)
    last = G[..., -1:]
    b, d = G.to(dtype).exp(), (last - G).to(dtype).exp()
    total = b[..., -1]
    drop = ~causal
    if z is not None:
        drop = drop | (z.unsqueeze(-1) - z.unsqueeze(-2) != crossings)
        b = b * (z == crossings)
        d = d * (z[..., -1:] - z == crossings)
        total = total * (z[..., -1] == crossings)
    return Decay(difference.masked_fill(drop, -torch.inf).exp_(), b, d, total)


def prepare(x: Segment, scale: float, has_erase: bool) -> Prepared:
    """Form everything of §3 that does not depend on the state."""
    heads, tokens = x.v.shape[2], x.q.shape[-2]
    causal = _causal(x)
    decay = decay_factors(x, causal)
    D = causal.to(x.q.dtype) if decay is None else decay.D
    k_transposed = x.k.transpose(-1, -2)
    # §3 P = s lower(Q Kᵀ ⊙ D)                          [C, C]
    qk = (_bmm(x.q, k_transposed) * scale).unsqueeze(2)
    P = (qk * D).expand(-1, -1, heads, -1, -1).flatten(1, 2)
    if not has_erase:
        return Prepared(decay, causal, qk, None, P, None)
    # §3 A = strict_lower(diag(β) (K Kᵀ ⊙ D)): the solve does not read the rest  [C, C]
    kk = _bmm(x.k, k_transposed).unsqueeze(2)
    A = (kk * D * x.beta.unsqueeze(-1)).flatten(1, 2)
    # §3 T = (I + A)⁻¹                                  [C, C]
    eye = torch.eye(tokens, dtype=A.dtype, device=A.device).expand_as(A)
    T = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
    return Prepared(decay, causal, qk, kk, P, T)


def _corrected(
    x: Segment, p: Prepared, i: int, state: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return E = V − diag(b) K S, K S (None without erase) and U of chunk i."""
    heads, beta = x.v.shape[2], x.beta[i].unsqueeze(-1)
    if p.T is None:
        # §3 without erase, U = diag(β) V               [C, V]
        return x.v[i], None, x.v[i] * beta
    kS = _per_head(torch.bmm(x.k[i], state), heads)
    if p.decay is None:
        E = x.v[i] - kS
    else:
        E = torch.addcmul(x.v[i], kS, p.decay.b[i].unsqueeze(-1), value=-1)
    # §3 U = T diag(β) (V − diag(b) K S)                [C, V]
    U = torch.bmm(p.T[i], (E * beta).flatten(0, 1)).unflatten(0, (-1, heads))
    return E, kS, U


def _output(
    x: Segment, p: Prepared, i: int, U: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output of chunk i and Q S."""
    heads = x.v.shape[2]
    qS = _per_head(torch.bmm(x.q[i], state), heads)
    PU = torch.bmm(p.P[i], U.flatten(0, 1)).unflatten(0, (-1, heads))
    # §3 O = s (diag(b) Q S + (lower(Q Kᵀ ⊙ D)) U)      [C, V]
    if p.decay is None:
        return torch.add(PU, qS, alpha=scale), qS
    return torch.addcmul(PU, qS, p.decay.b[i].unsqueeze(-1), value=scale), qS


def _advanced(x: Segment, p: Prepared, i: int, U: Tensor, state: Tensor) -> Tensor:
    """§3 S_C = b_C S + (diag(d) K)ᵀ U                  [K, R V]"""
    dU = U if p.decay is None else U * p.decay.d[i].unsqueeze(-1)
    total = None if p.decay is None else p.decay.total[i]
    return _across(total, state).baddbmm_(x.k[i].transpose(1, 2), _packed(dU))


def forward_segment(
    x: Segment, state: Tensor, scale: float, has_erase: bool
) -> tuple[list[Tensor], Tensor]:
    """Return the outputs of the chunks, each (G, R, C, V), and the state after them."""
    p = prepare(x, scale, has_erase)
    outputs = []
    for i in range(x.q.shape[0]):
        _, _, U = _corrected(x, p, i, state)
        outputs.append(_output(x, p, i, U, state, scale)[0])
        state = _advanced(x, p, i, U, state)
    return outputs, state


def advance_segment(x: Segment, state: Tensor, scale: float, has_erase: bool) -> Tensor:
    """Return the state after a segment, without its outputs."""
    p = prepare(x, scale, has_erase)
    for i in range(x.q.shape[0]):
        state = _advanced(x, p, i, _corrected(x, p, i, state)[2], state)
    return state


def backward_segment(
    x: Segment, state: Tensor, d_o: Tensor, d_state: Tensor, scale: float, has_erase: bool
) -> SegmentGrads:
    """Return the gradients of a segment.

    Args:
        x: its operands.
        state: (G, K, R V) at its start.
        d_o: (n, G, R, C, V).
        d_state: (G, K, R V), the gradient of the state at its end.
        scale: s.
        has_erase: whether the rule has an error term.
    """
    p = prepare(x, scale, has_erase)
    chunks, heads = x.q.shape[0], x.v.shape[2]
    states, E, kS, U = [], [], [], []
    for i in range(chunks):
        E_i, kS_i, U_i = _corrected(x, p, i, state)
        for into, value in ((states, state), (E, E_i), (kS, kS_i), (U, U_i)):
            into.append(value)
        if i + 1 < chunks:
            state = _advanced(x, p, i, U_i, state)
    d_states, kdS, dR = [], [], []
    bO = d_o * (scale if p.decay is None else p.decay.b.unsqueeze(-1) * scale)
    Xq = _packed(bO)
    PdO = _bmm(p.P.transpose(-1, -2), d_o.flatten(1, 2)).unflatten(1, (-1, heads))
    Xk: list[Tensor] = []
    for i in reversed(range(chunks)):
        # §5 dU = s Pᵀ dO + diag(d) K dS_C,  dRHS = Tᵀ dU      [C, V]
        kdS_i = _per_head(torch.bmm(x.k[i], d_state), heads)
        scaled = kdS_i if p.decay is None else kdS_i * p.decay.d[i].unsqueeze(-1)
        dU = PdO[i] + scaled
        dR_i = dU
        if p.T is not None:
            dR_i = torch.bmm(p.T[i].transpose(1, 2), dU.flatten(0, 1)).unflatten(0, (-1, heads))
        for into, value in ((d_states, d_state), (kdS, kdS_i), (dR, dR_i)):
            into.insert(0, value)
        # §5 dS_0 = b_C dS_C + s (diag(b) Q)ᵀ dO − (diag(βb) K)ᵀ dRHS   [K, R V]
        total = None if p.decay is None else p.decay.total[i]
        d_state = _across(total, d_state).baddbmm_(x.q[i].transpose(1, 2), Xq[i])
        if p.T is not None:
            weight = x.beta[i] if p.decay is None else x.beta[i] * p.decay.b[i]
            Xk.insert(0, _packed(dR_i * -weight.unsqueeze(-1)))
            d_state = d_state.baddbmm_(x.k[i].transpose(1, 2), Xk[0])
    walk = _Walk(
        *(torch.stack(part) for part in (states, d_states, E, U, dR, kdS)),
        kS=torch.stack(kS) if p.T is not None else None,  # type: ignore[arg-type]
        Xq=Xq,
        Xk=torch.stack(Xk) if Xk else None,
    )
    return _parallel_gradients(x, p, walk, d_o, d_state, scale)


class _Walk(NamedTuple):
    """What the two sequential passes of the backward leave, stacked over the chunks."""

    states: Tensor
    d_states: Tensor
    E: Tensor
    U: Tensor
    dR: Tensor
    kdS: Tensor
    kS: Tensor | None
    Xq: Tensor
    Xk: Tensor | None


def _parallel_gradients(
    x: Segment, p: Prepared, w: _Walk, d_o: Tensor, d_state: Tensor, scale: float
) -> SegmentGrads:
    """Form what is left once dRHS and dS of every chunk are known."""
    D = p.causal.to(x.q.dtype) if p.decay is None else p.decay.D
    beta = x.beta.unsqueeze(-1)
    U_transposed = w.U.transpose(-1, -2)
    # §5 dP = s lower(dO Uᵀ), here without s and mask           [C, C]
    dP = _bmm(d_o, U_transposed)
    # §5 dV = diag(β) dRHS,  dβ = rowsum(dRHS ⊙ E) + ...        [C, V]
    dV = w.dR * beta
    d_beta = (w.dR * w.E).sum(-1)
    pairs = (dP * D).sum(2) * scale
    # §5 dQ = (dP ⊙ D) K + s diag(b) dO Sᵀ                      [C, K]
    dQ = _bmm(w.Xq, w.states.transpose(-1, -2)) + _bmm(pairs, x.k)
    # §5 dK = (dP ⊙ D)ᵀ Q + diag(d) U dS_Cᵀ − ...               [C, K]
    dU = w.U if p.decay is None else w.U * p.decay.d.unsqueeze(-1)
    dK = _bmm(_packed(dU), w.d_states.transpose(-1, -2)) + _bmm(pairs.transpose(-1, -2), x.q)
    M = None
    if p.kk is not None and w.Xk is not None:
        # §5 dA = −strict_lower(dRHS Uᵀ),  M = diag(β) dA       [C, C]
        dA = -_bmm(w.dR, U_transposed).tril(-1)
        M = dA * beta
        d_beta = d_beta + (dA * p.kk * D).sum(-1)
        both = (M * D).sum(2)
        dK = dK + _bmm(w.Xk, w.states.transpose(-1, -2)) + _bmm(both + both.transpose(-1, -2), x.k)
    if p.decay is None:
        return SegmentGrads(dQ, dK, dV, d_beta, None, d_state)
    # §5 E = dP ⊙ Q Kᵀ + diag(β) dA ⊙ K Kᵀ                      [C, C]
    E = dP * p.qk if M is None or p.kk is None else dP * p.qk + M * p.kk
    edges = _gate_edges(x, p, w, d_o, dV, scale)
    d_log = _straddling(E, edges, p.decay)
    if x.zeros is not None:
        # §5 at α_t = 0, the same sum over the pairs with one zero between them
        one = decay_factors(x, p.causal, crossings=1)
        assert one is not None
        is_zero = torch.diff(x.zeros, dim=-1, prepend=torch.zeros_like(x.zeros[..., :1])) > 0
        d_log = torch.where(is_zero, _straddling(E, edges, one), d_log)
    return SegmentGrads(dQ, dK, dV, d_beta, d_log, d_state)


def _gate_edges(
    x: Segment, p: Prepared, w: _Walk, d_o: Tensor, dV: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the column `start`, the row C and the corner of E (§5), before any decay factor."""
    heads = x.v.shape[2]
    qS = _per_head(_bmm(x.q, w.states), heads)
    # §5 E_i,start = s rowsum(dO ⊙ Q S)_i − β_i rowsum(dRHS ⊙ K S)_i      [C]
    start = (d_o * qS).sum(-1) * scale
    if w.kS is not None:
        start = start - (dV * w.kS).sum(-1)
    # §5 E_C,j = rowsum((K dS_C) ⊙ U)_j,  E_C,start = ⟨dS_C, S⟩           [C], []
    end = (w.kdS * w.U).sum(-1)
    corner = (w.d_states * w.states).unflatten(-1, (heads, -1)).sum((-3, -1))
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
