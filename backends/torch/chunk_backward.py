"""Compute the gradients of docs/math.md §5 over one segment, in the shapes of `chunk_forward`.

Two passes in sequence, forward for S and U, backward for dS and dRHS, and then everything
else for all chunks of the segment at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gdn_ops.backends.torch.chunk_forward import (
    Decay,
    Segment,
    SegmentTerms,
    add_product_,
    bmm,
    decay_state,
    next_state,
    packed,
    per_head,
    read_state,
    segment_terms,
)


class SegmentGrads(NamedTuple):
    """Hold the gradients of a segment, in the shapes of `Segment`, and of the state at its start.

    Attributes:
        alpha: dα, where α = 0 too; None where nothing decays.
        erase, write: None where beta stands for them; then that of beta means nothing.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    alpha: Tensor | None
    state: Tensor
    erase: Tensor | None = None
    write: Tensor | None = None


class ForwardValues(NamedTuple):
    """Hold what the forward pass leaves of every chunk.

    Attributes:
        error, U, QKS: of `ChunkRead`, for all n chunks.
        states: S at the chunk starts, (n, G, K, R V).
    """

    error: Tensor
    states: Tensor
    U: Tensor
    QKS: Tensor


class ReverseValues(NamedTuple):
    """Hold what the reverse pass leaves of every chunk.

    Attributes:
        d_states: dS at the chunk ends, (n, G, K, R V).
        d_rhs: dRHS, (n, G, R, C, V).
        KdS: K dS_C, packed, (n, G, C, R V).
        d_QKS: the gradient of [Q; K] S: s diag(b) dO above −diag(βb) dRHS, packed,
            (n, G, 2 C, R V); without erase only the first half.
        d_state: the gradient of the state at the segment's start.
    """

    d_states: Tensor
    d_rhs: Tensor
    KdS: Tensor
    d_QKS: Tensor
    d_state: Tensor


class GateEdges(NamedTuple):
    """Hold the column `start`, the row C and the corner of E (§5), before any decay factor."""

    start: Tensor
    end: Tensor
    corner: Tensor


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
    terms = segment_terms(x, scale, has_erase)
    forward = _forward_values(x, terms, state)
    reverse = _reverse_values(x, terms, d_o, d_state, scale)
    beta = x.beta.unsqueeze(-1)
    # §5 dP = s lower(dO Uᵀ), here without s and mask   [C, C]
    dP = bmm(d_o, forward.U.mT)
    # §5 dV = diag(β) dRHS                              [C, V]
    dV = reverse.d_rhs * beta
    # §5 dβ = rowsum(dRHS ⊙ (V − diag(b) K S)) + rowsum(dA ⊙ K Kᵀ ⊙ D)    [C]
    d_beta = _rowsum(reverse.d_rhs, forward.error)
    dQ, dK = _gradients_of_reads_and_writes(x, terms, forward, reverse, dP, scale)
    # §5 E = dP ⊙ Q Kᵀ + diag(β) dA ⊙ K Kᵀ              [C, C]
    E = dP * terms.QK
    if terms.KK is not None:
        # §5 dA = −strict_lower(dRHS Uᵀ)                [C, C]
        dA = bmm(reverse.d_rhs, forward.U.mT).tril_(-1).neg_()
        dA_D = dA * terms.D
        d_beta = d_beta + _rowsum(dA_D, terms.KK)
        # §5 dK gets M K + Mᵀ K, with M = diag(β) dA ⊙ D                  [C, K]
        M = (dA_D * beta).sum(2)
        dK = add_product_(dK, M + M.mT, x.k())
        E = torch.addcmul(E, dA * beta, terms.KK)
    d_alpha = None
    if terms.decay is not None:
        edges = _gate_edges(terms, forward, reverse, d_o, dV, scale)
        d_alpha = _gate_gradient(terms.decay, E, edges)
    return SegmentGrads(dQ, dK, dV, d_beta, d_alpha, reverse.d_state)


def _forward_values(x: Segment, terms: SegmentTerms, state: Tensor) -> ForwardValues:
    """Run the chunks in sequence for S and U."""
    states, reads = [state], [read_state(x, terms, 0, state)]
    for i in range(1, x.v.shape[0]):
        states.append(next_state(x, terms, i - 1, reads[-1].U, states[-1]))
        reads.append(read_state(x, terms, i, states[-1]))
    return ForwardValues(
        x.v if terms.T is None else torch.stack([read.error for read in reads]),
        torch.stack(states),
        torch.stack([read.U for read in reads]),
        torch.stack([read.QKS for read in reads]),
    )


def _reverse_values(
    x: Segment, terms: SegmentTerms, d_o: Tensor, d_state: Tensor, scale: float
) -> ReverseValues:
    """Run the chunks in reverse for dS and dRHS."""
    heads, decay = x.v.shape[2], terms.decay
    d_states, d_rhs, KdS, d_QKS = [], [], [], []
    PdO = bmm(terms.P.mT, d_o.flatten(1, 2)).view(d_o.shape)
    for i in reversed(range(x.v.shape[0])):
        d_states.append(d_state)
        # §5 dU = s Pᵀ dO + diag(d) K dS_C              [C, V]
        KdS.append(torch.bmm(x.k()[i], d_state))
        dU = per_head(KdS[-1], heads)
        if decay is None:
            dU = PdO[i] + dU
        else:
            dU = torch.addcmul(PdO[i], dU, decay.d[i].unsqueeze(-1))
        # §5 dRHS = Tᵀ dU                               [C, V]
        if terms.T is not None:
            dU = torch.bmm(terms.T[i].mT, dU.flatten(0, 1)).view(dU.shape)
        d_rhs.append(dU)
        d_QKS.append(_read_gradient(x, terms, i, d_o[i], d_rhs[-1], scale))
        # §5 dS_0 = b_C dS_C + s (diag(b) Q)ᵀ dO − (diag(βb) K)ᵀ dRHS   [K, R V]
        qk = x.qk[i, :, : d_QKS[-1].shape[1]]
        b_C = None if decay is None else decay.b_C[i]
        d_state = add_product_(decay_state(b_C, d_state), qk.mT, d_QKS[-1])
    return ReverseValues(
        torch.stack(d_states[::-1]),
        torch.stack(d_rhs[::-1]),
        torch.stack(KdS[::-1]),
        torch.stack(d_QKS[::-1]),
        d_state,
    )


def _read_gradient(
    x: Segment, terms: SegmentTerms, i: int, d_o: Tensor, d_rhs: Tensor, scale: float
) -> Tensor:
    """Return the gradient of [Q; K] S of chunk i, see `ReverseValues.d_QKS`."""
    b = torch.ones_like(x.beta) if terms.decay is None else terms.decay.b
    d_QS = d_o * (b[i] * scale).unsqueeze(-1)
    if terms.T is None:
        return packed(d_QS)
    d_KS = d_rhs * (x.beta[i] * -b[i]).unsqueeze(-1)
    return torch.cat((d_QS.transpose(1, 2), d_KS.transpose(1, 2)), 1).flatten(-2)


def _gradients_of_reads_and_writes(
    x: Segment,
    terms: SegmentTerms,
    forward: ForwardValues,
    reverse: ReverseValues,
    dP: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return dQ, and dK but for M K + Mᵀ K, (n, G, C, K)."""
    C = x.tokens()
    dP_D = (dP * terms.D).sum(2) * scale
    # s diag(b) dO Sᵀ above −diag(βb) dRHS Sᵀ           [2 C, K]
    of_reads = bmm(reverse.d_QKS, forward.states.mT)
    # §5 dQ = (dP ⊙ D) K + s diag(b) dO Sᵀ              [C, K]
    dQ = add_product_(of_reads[..., :C, :], dP_D, x.k())
    # §5 dK = (dP ⊙ D)ᵀ Q + diag(d) U dS_Cᵀ − diag(βb) dRHS Sᵀ + ...      [C, K]
    dK = torch.zeros_like(dQ) if terms.T is None else of_reads[..., C:, :]
    U = forward.U if terms.decay is None else forward.U * terms.decay.d.unsqueeze(-1)
    dK = add_product_(dK, dP_D.mT, x.q())
    return dQ, add_product_(dK, packed(U), reverse.d_states.mT)


def _rowsum(a: Tensor, b: Tensor) -> Tensor:
    """Return rowsum(a ⊙ b), over the last axis."""
    return (a * b).sum(-1)


def _gate_edges(
    terms: SegmentTerms,
    forward: ForwardValues,
    reverse: ReverseValues,
    d_o: Tensor,
    dV: Tensor,
    scale: float,
) -> GateEdges:
    """Form the column `start`, the row C and the corner of E for all chunks."""
    R, C, V = dV.shape[2:]
    # §5 E_i,start = s rowsum(dO ⊙ Q S)_i − β_i rowsum(dRHS ⊙ K S)_i      [C]
    start = _rowsum(d_o, per_head(forward.QKS[..., :C, :], R)) * scale
    if terms.T is not None:
        start = start - _rowsum(dV, per_head(forward.QKS[..., C:, :], R))
    # §5 E_C,j = rowsum((K dS_C) ⊙ U)_j,  E_C,start = ⟨dS_C, S⟩           [C], []
    end = _rowsum(forward.U, per_head(reverse.KdS, R))
    inner = reverse.d_states * forward.states
    return GateEdges(start, end, inner.unflatten(-1, (R, V)).sum((-3, -1)))


def _gate_gradient(decay: Decay, E: Tensor, edges: GateEdges) -> Tensor:
    """Return dα, (n, G, R, C): Σ D_it E_ij D_{t−1,j} over the pairs i ≥ t > j.

    D_it D_{t−1,j} is D_ij without its factor α_t, so nothing is divided by α_t, which may be tiny
    or 0. Pairs on one side of t are left out, not subtracted.
    """
    D, d = decay.D, decay.d
    # §5 Σ_{i≥t} D_it E_ij, with the row C of E: d_t E_Cj          [C, C]
    reading = torch.addcmul(bmm(D.mT, E), d.unsqueeze(-1), edges.end.unsqueeze(-2))
    inner = _rowsum(reading[..., 1:, :], D[..., :-1, :])
    # §5 the same of the column start, b_{t−1} Σ_{i≥t} D_it E_i,start   [C]
    of_start = (D * edges.start.unsqueeze(-1)).sum(-2) + d * edges.corner.unsqueeze(-1)
    b_before = functional.pad(decay.b[..., :-1], (1, 0), value=1.0)
    return functional.pad(inner, (1, 0)) + b_before * of_start
