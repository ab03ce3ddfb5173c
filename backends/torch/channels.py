"""Compute the chunkwise form of docs/math.md §9 over one segment: a decay for every key channel.

Decays between tokens are products of gates, formed from the bottom up by multiplications alone:
of blocks of one token, of two, of four, up to a chunk. Where two blocks of h tokens meet at m,

    Π_{j<l≤i} α_l = (Π_{m≤l≤i} α_l) (Π_{j<l<m} α_l),   j < m ≤ i,   every channel by itself,

so that what tokens i of the second block read of tokens j of the first is one matrix product of
factors that are at most 1. Nothing is divided and no logarithm is taken: an exact 0, a product too
small for a number and every derivative come out right, and all transforms see through.

    q, k      (n, rows, C, K)    alpha, F, L  (n, rows, C, K)    A, P, T  (n, rows, C, C)
    v, U      (n, rows, C, V)    beta         (n, rows, C)       S        (rows, K, V)

A row is a value head of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gdn_ops.backends.torch.chunk_backward import SegmentGrads
from gdn_ops.backends.torch.chunk_forward import Segment

SMALL = 2
"""Blocks of so few tokens are multiplied number by number: batches of tiny matrices are slow."""


class Operands(NamedTuple):
    """Hold the operands of a segment for every value head; see the module docstring for shapes."""

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor
    beta: Tensor


class Terms(NamedTuple):
    """Hold the terms of a segment that do not depend on the state.

    Attributes:
        P: s lower(Q Kᵀ), every pair with its decays.
        T_beta: (I + A)⁻¹ diag(β), or None without erase.
        since: b, the decays from the start of the chunk to each token, itself included.
        left: d, those behind each token to the end of the chunk.
    """

    P: Tensor
    T_beta: Tensor | None
    since: Tensor
    left: Tensor


def operands_of(x: Segment) -> Operands:
    """Return the operands of a segment, q and k repeated for every value head."""
    assert x.alpha is not None
    R = x.v.shape[2]
    q, k = (y.unsqueeze(2).expand(-1, -1, R, -1, -1).flatten(1, 2) for y in (x.q(), x.k()))
    return Operands(q, k, x.v.flatten(1, 2), x.alpha.flatten(1, 2), x.beta.flatten(1, 2))


def terms_of(x: Operands, scale: float, has_erase: bool) -> Terms:
    """Form the terms of §9 that do not depend on the state."""
    C = x.k.shape[2]
    qk = torch.stack((x.q * scale, x.k))
    # §9 P_ii = s q_i · k_i; A has no diagonal
    own = (qk[0] * x.k).sum(-1)
    pairs = torch.stack((own, torch.zeros_like(own)))[..., None, None]
    since, left = x.alpha.unsqueeze(3), torch.ones_like(x.alpha).unsqueeze(3)
    qk, k = qk.unsqueeze(4), x.k.unsqueeze(3)
    while since.shape[2] > 1:
        (since_0, since_1), (left_0, left_1) = _halves(since, 2), _halves(left, 2)
        k_0, k_1 = _halves(k, 2)
        qk_0, qk_1 = _halves(qk, 3)
        first, second = _halves(pairs, 3)
        # §9 s Σ_c q_ic k_jc Π_{j<l≤i} α_lc, and so for A   [h, h]
        read = _products(qk_1 * since_1, k_0 * left_0)
        above = torch.zeros_like(read)
        pairs = torch.cat((torch.cat((first, above), -1), torch.cat((read, second), -1)), -2)
        since = torch.cat((since_0, since_1 * since_0[..., -1:, :]), -2)
        left = torch.cat((left_0 * since_1[..., -1:, :], left_1), -2)
        qk, k = torch.cat((qk_0, qk_1), -2), torch.cat((k_0, k_1), -2)
    P, A = pairs.squeeze(3)
    since, left = since.squeeze(2), left.squeeze(2)
    if not has_erase:
        return Terms(P, None, since, left)
    # §9 T = (I + A)⁻¹, A = diag(β) strict_lower(K Kᵀ)      [C, C]
    eye = torch.eye(C, dtype=A.dtype, device=A.device).expand_as(A)
    T = torch.linalg.solve_triangular(
        A * x.beta.unsqueeze(-1), eye, upper=False, unitriangular=True
    )
    return Terms(P, T * x.beta.unsqueeze(-2), since, left)


def _halves(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return every other block along an axis, from the first and from the second on."""
    pairs = x.unflatten(axis, (-1, 2))
    return pairs.select(axis + 1, 0), pairs.select(axis + 1, 1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return a bᵀ over the last two axes."""
    if a.shape[-2] <= SMALL:
        return (a.unsqueeze(-2) * b.unsqueeze(-3)).sum(-1)
    return a @ b.mT


def advance(
    x: Operands, terms: Terms, i: int, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Run chunk i; return its output (rows, C, V) and the state after it, both new tensors."""
    since, k = terms.since[i], x.k[i]
    # §9 U = T diag(β) (V − (b ⊙ K) S)                      [C, V]
    if terms.T_beta is None:
        U = x.v[i] * x.beta[i].unsqueeze(-1)
    else:
        U = terms.T_beta[i] @ (x.v[i] - (since * k) @ state)
    # §9 O = s (b ⊙ Q) S + P U                              [C, V]
    o = (x.q[i] * since * scale) @ state + terms.P[i] @ U
    # §9 S_C = diag(b_C) S + (d ⊙ K)ᵀ U                     [K, V]
    return o, since[:, -1].unsqueeze(-1) * state + (terms.left[i] * k).mT @ U


def run_chunks(x: Operands, state: Tensor, scale: float, has_erase: bool) -> tuple[Tensor, Tensor]:
    """Run the chunks of a segment; return o (n, rows, C, V) and the state after them.

    Chunks of a length that is no power of two are padded with tokens that change nothing.
    """
    C = x.v.shape[2]
    missing = (1 << (C - 1).bit_length()) - C
    if missing:
        q, k, v = (functional.pad(y, (0, 0, 0, missing)) for y in x[:3])
        alpha = functional.pad(x.alpha, (0, 0, 0, missing), value=1.0)
        x = Operands(q, k, v, alpha, functional.pad(x.beta, (0, missing)))
    terms, outputs = terms_of(x, scale, has_erase), []
    for i in range(x.v.shape[0]):
        o, state = advance(x, terms, i, state, scale)
        outputs.append(o)
    return torch.stack(outputs)[:, :, :C], state


def per_row(state: Tensor, heads: int) -> Tensor:
    """Reshape a packed state (G, K, R V) to (G R, K, V)."""
    split: Tensor = state.unflatten(-1, (heads, -1))
    return split.movedim(2, 1).flatten(0, 1)


def packed(state: Tensor, heads: int) -> Tensor:
    """Reshape (G R, K, V) to a packed state (G, K, R V)."""
    split: Tensor = state.unflatten(0, (-1, heads))
    return split.movedim(1, 2).flatten(-2)


def forward_segment(
    x: Segment, state: Tensor, scale: float, has_erase: bool, out: Sequence[Tensor]
) -> Tensor:
    """Write the outputs of the chunks, and return the state after them.

    Args:
        x: the operands.
        state: (G, K, R V) at the start.
        scale: s.
        has_erase: whether the rule has an error term.
        out: where to write the output of every chunk, see `chunk_forward.forward_segment`.
    """
    heads = x.v.shape[2]
    o, after = run_chunks(operands_of(x), per_row(state, heads), scale, has_erase)
    for one, into in zip(o, out, strict=True):
        # (G R, C, V) to (rows, H, R, c, V)
        into.copy_(one.unflatten(0, into.shape[:3])[..., : into.shape[3], :])
    return packed(after, heads)


def advance_segment(x: Segment, state: Tensor, scale: float, has_erase: bool) -> Tensor:
    """Return the state after a segment, without its outputs."""
    heads = x.v.shape[2]
    after = run_chunks(operands_of(x), per_row(state, heads), scale, has_erase)[1]
    return packed(after, heads)


def backward_segment(
    x: Segment, state: Tensor, d_o: Tensor, d_state: Tensor, scale: float, has_erase: bool
) -> SegmentGrads:
    """Return the gradients of a segment, formed anew from its operands.

    Where gradients are enabled they are differentiable functions of the operands themselves.

    Args:
        x: its operands.
        state: (G, K, R V) at its start.
        d_o: (n, G, R, C, V).
        d_state: (G, K, R V), the gradient of the state at its end.
        scale: s.
        has_erase: whether the rule has an error term.
    """
    heads, is_again = x.v.shape[2], torch.is_grad_enabled()
    assert x.alpha is not None
    given = (x.qk, x.v, x.alpha, x.beta, state)
    with torch.enable_grad():
        inputs = [y if is_again and y.requires_grad else y.detach().requires_grad_() for y in given]
        qk, v, alpha, beta, start = inputs
        again = x._replace(qk=qk, v=v, alpha=alpha, beta=beta)
        o, after = run_chunks(operands_of(again), per_row(start, heads), scale, has_erase)
        results = (o, packed(after, heads))
        d_qk, d_v, d_alpha, d_beta, d_start = torch.autograd.grad(
            results, inputs, (d_o.flatten(1, 2), d_state), create_graph=is_again
        )
    C = x.tokens()
    return SegmentGrads(d_qk[..., :C, :], d_qk[..., C:, :], d_v, d_beta, d_alpha, d_start)
