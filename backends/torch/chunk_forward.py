"""Compute the chunkwise form of docs/math.md §3 and §4 over one segment of a few chunks.

A segment is n chunks of C tokens for G = rows x H key heads, each with R value heads. What
does not depend on the state is formed for all chunks of the segment at once; only K S, the
correction and the state update run in sequence. Value heads of one key head are packed along
V for every product with the state, so that q and k are never repeated.

    qk        (n, G, 2 C, K)      D, A, T, P   (n, G, R, C, C)
    v, U      (n, G, R, C, V)     b, d, beta   (n, G, R, C)
    S, dS     (G, K, R V)         G_cum, z     (n, G, R, C)

Everything is in the compute dtype except G_cum. Autograd sees through all functions, which is what
second derivatives use, and torch.compile can fuse them. They overwrite what they have made
themselves and, where they are told so (`inplace`), the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Hold the operands of a segment; see the module docstring for shapes.

    Attributes:
        qk: q above k, in one tensor, because one product with S is faster than two.
        v, beta: operands in the compute dtype.
        log_decay_cumsum: G of §4, inclusive within each chunk; None where nothing decays.
        zeros: z of §4; None where no gate is 0.
        alpha: decays of every channel, (n, G, R, C, K), or of heads, (n, G, R, C, 1), of a call
            that is wide (docs/math.md §9); None for 1, and where G stands for them.
        erase: (n, G, R, C, K) or (n, G, R, C, 1), write: (n, G, R, C, V) or (n, G, R, C, 1); None
            where beta stands for them.
    """

    qk: Tensor
    v: Tensor
    beta: Tensor
    log_decay_cumsum: Tensor | None
    zeros: Tensor | None
    alpha: Tensor | None = None
    erase: Tensor | None = None
    write: Tensor | None = None

    # Methods: not every Dynamo traces a property of a named tuple.

    def is_wide(self) -> bool:
        """Return whether the call has more than a decay and a beta per head."""
        return self.alpha is not None or self.erase is not None

    def tokens(self) -> int:
        """Return C, tokens per chunk."""
        return self.v.shape[3]

    def q(self) -> Tensor:
        """Return q, (n, G, C, K)."""
        return self.qk[..., : self.tokens(), :]

    def k(self) -> Tensor:
        """Return k, (n, G, C, K)."""
        return self.qk[..., self.tokens() :, :]


class Decay(NamedTuple):
    """Hold the decays of §3: D within a chunk, b from its start, d to its end, b_C across it."""

    D: Tensor
    b: Tensor
    d: Tensor
    b_C: Tensor


class SegmentTerms(NamedTuple):
    """Hold the terms of a segment that do not depend on the state.

    Attributes:
        decay: None where nothing decays.
        D: of the decay; where nothing decays, (C, C) ones on and below the diagonal.
        QK: s Q Kᵀ, (n, G, 1, C, C).
        KK: K Kᵀ, (n, G, 1, C, C), or None without erase.
        P: s lower(Q Kᵀ ⊙ D), (n, G R, C, C).
        T: (I + A)⁻¹, (n, G R, C, C), or None without erase.
        T_beta: T diag(β), or None without erase.
    """

    decay: Decay | None
    D: Tensor
    QK: Tensor
    KK: Tensor | None
    P: Tensor
    T: Tensor | None
    T_beta: Tensor | None


class ChunkRead(NamedTuple):
    """Hold what a chunk reads of the state, and the corrections it makes.

    Attributes:
        QKS: [Q; K] S, packed, (G, 2 C, R V); Q S alone without erase.
        error: V − diag(b) K S, (G, R, C, V); V without erase.
        U: (G, R, C, V).
    """

    QKS: Tensor
    error: Tensor
    U: Tensor


def packed(x: Tensor) -> Tensor:
    """Reshape (..., G, R, C, V) to (..., G, C, R V)."""
    return x.transpose(-3, -2).flatten(-2)


def per_head(x: Tensor, heads: int) -> Tensor:
    """Reshape (..., G, C, R V) to a view (..., G, R, C, V)."""
    split: Tensor = x.unflatten(-1, (heads, -1))
    return split.transpose(-3, -2)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a by b over equal leading axes, as one flat batch."""
    product = torch.bmm(a.flatten(0, -3), b.flatten(0, -3))
    return product.view(*a.shape[:-2], *product.shape[1:])


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return total + a b over equal leading axes; `total` may be overwritten.

    It is where it is contiguous: torch multiplies matrix by matrix into a batch that is not.
    """
    if torch.compiler.is_compiling():
        # A sum that the compiler can fuse; it would make baddbmm_ a copy and a product.
        return total + bmm(a, b)
    if a.shape[-1] == 1:
        # A product for every matrix costs more than one pass over all of them.
        return total.addcmul_(a, b)
    operands = (total.flatten(0, -3), a.flatten(0, -3), b.flatten(0, -3))
    if total.is_contiguous():
        operands[0].baddbmm_(*operands[1:])
        return total
    return torch.baddbmm(*operands).view(total.shape)


def decay_state(b_C: Tensor | None, state: Tensor, inplace: bool = False) -> Tensor:
    """Return b_C S, (G, K, R V), in a new tensor or, if `inplace`, in S itself."""
    if b_C is None:
        return state if inplace else state.clone()
    split: Tensor = state.unflatten(-1, (b_C.shape[-1], -1))
    factor = b_C[:, None, :, None]
    if not inplace:
        return (split * factor).flatten(-2)
    split.mul_(factor)
    return state


def decay_factors(x: Segment) -> Decay | None:
    """Form D, b, d and b_C of §3: of pairs with no zero of α between them, and 0 of others."""
    G, z = x.log_decay_cumsum, x.zeros
    if G is None:
        return None
    dtype = x.qk.dtype
    D = (G.unsqueeze(-1) - G.unsqueeze(-2)).to(dtype)
    b, d = G.to(dtype).exp(), (G[..., -1:] - G).to(dtype).exp()
    b_C = b[..., -1]
    dropped = ~_causal(x)
    if z is not None:
        dropped = dropped | (z.unsqueeze(-1) != z.unsqueeze(-2))
        b = b * (z == 0)
        d = d * (z[..., -1:] == z)
        b_C = b_C * (z[..., -1] == 0)
    # §4 D_ij = exp(G_i − G_j) [z_i = z_j],  i ≥ j      [C, C]
    return Decay(D.masked_fill_(dropped, -torch.inf).exp_(), b, d, b_C)


def _causal(x: Segment) -> Tensor:
    """Return (C, C), whether token i may read what token j wrote."""
    C = x.tokens()
    return torch.ones(C, C, dtype=torch.bool, device=x.qk.device).tril_()


def segment_terms(x: Segment, scale: float, has_erase: bool) -> SegmentTerms:
    """Form the terms of §3 that do not depend on the state."""
    C = x.tokens()
    square = (*x.beta.shape, C)
    decay = decay_factors(x)
    D = _causal(x).to(x.qk.dtype) if decay is None else decay.D
    pairs = bmm(x.qk, x.k().mT).unsqueeze(2)
    # §3 P = s lower(Q Kᵀ ⊙ D)                          [C, C]
    QK = pairs[..., :C, :] * scale
    P = (QK * D.expand(square)).flatten(1, 2)
    if not has_erase:
        return SegmentTerms(decay, D, QK, None, P, None, None)
    # §3 A = strict_lower(diag(β) (K Kᵀ ⊙ D)): the solve does not read the rest  [C, C]
    KK = pairs[..., C:, :]
    A = (KK * D.expand(square) * x.beta.unsqueeze(-1)).flatten(1, 2)
    # §3 T = (I + A)⁻¹                                  [C, C]
    eye = torch.eye(C, dtype=A.dtype, device=A.device).expand_as(A)
    T = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
    return SegmentTerms(decay, D, QK, KK, P, T, T * x.beta.flatten(1, 2).unsqueeze(-2))


def read_state(x: Segment, terms: SegmentTerms, i: int, state: Tensor) -> ChunkRead:
    """Read the state at the start of chunk i, and form its corrections."""
    v = x.v[i]
    if terms.T_beta is None:
        # §3 without erase, U = diag(β) V               [C, V]
        return ChunkRead(torch.bmm(x.q()[i], state), v, v * x.beta[i].unsqueeze(-1))
    QKS = torch.bmm(x.qk[i], state)
    KS = per_head(QKS[:, x.tokens() :], v.shape[1])
    if terms.decay is None:
        error = v - KS
    else:
        error = torch.addcmul(v, KS, terms.decay.b[i].unsqueeze(-1), value=-1)
    # §3 U = T diag(β) (V − diag(b) K S)                [C, V]
    U = torch.bmm(terms.T_beta[i], error.flatten(0, 1)).view(v.shape)
    return ChunkRead(QKS, error, U)


def chunk_output(terms: SegmentTerms, i: int, read: ChunkRead, scale: float) -> Tensor:
    """Return the output of chunk i, (G, R, C, V)."""
    _, R, C, _ = read.U.shape
    PU = torch.bmm(terms.P[i], read.U.flatten(0, 1)).view(read.U.shape)
    QS = per_head(read.QKS[:, :C], R)
    # §3 O = s (diag(b) Q S + (lower(Q Kᵀ ⊙ D)) U)      [C, V]
    if terms.decay is None:
        return PU.add_(QS, alpha=scale)
    return PU.addcmul_(QS, terms.decay.b[i].unsqueeze(-1), value=scale)


def next_state(
    x: Segment, terms: SegmentTerms, i: int, U: Tensor, state: Tensor, inplace: bool = False
) -> Tensor:
    """Return the state after chunk i, in a new tensor or, if `inplace`, in that before it."""
    # §3 S_C = b_C S + (diag(d) K)ᵀ U                   [K, R V]
    if terms.decay is None:
        return add_product_(decay_state(None, state, inplace), x.k()[i].mT, packed(U))
    dU = packed(U * terms.decay.d[i].unsqueeze(-1))
    return add_product_(decay_state(terms.decay.b_C[i], state, inplace), x.k()[i].mT, dU)


def forward_segment(
    x: Segment,
    state: Tensor,
    scale: float,
    has_erase: bool,
    out: Sequence[Tensor],
    inplace: bool = True,
) -> Tensor:
    """Write the outputs of the chunks, and return the state after them.

    Args:
        x: the operands.
        state: (G, K, R V) at the start.
        scale: s.
        has_erase: whether the rule has an error term.
        out: where to write the output of every chunk, (rows, H, R, c, V) with rows H = G and
            c <= C: what is beyond c is padding.
        inplace: whether the state is overwritten.
    """
    terms = segment_terms(x, scale, has_erase)
    for i, into in enumerate(out):
        read = read_state(x, terms, i, state)
        o = chunk_output(terms, i, read, scale)
        into.copy_(o.unflatten(0, into.shape[:2])[..., : into.shape[3], :])
        state = next_state(x, terms, i, read.U, state, inplace)
    return state


def advance_segment(x: Segment, state: Tensor, scale: float, has_erase: bool) -> Tensor:
    """Return the state after a segment, without its outputs."""
    terms = segment_terms(x, scale, has_erase)
    for i in range(x.v.shape[0]):
        state = next_state(x, terms, i, read_state(x, terms, i, state).U, state)
    return state
