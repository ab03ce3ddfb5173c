"""Compute the gradients of `channels` over one segment, as differentiable functions of operands.

The chunks are walked back with the gradient of the state; what is left is the gradient of the terms
that do not depend on it, by the blocks of `terms_of` from a chunk down to single tokens. Names are
those of docs/math.md §9 and of `channels`; d_x is the gradient of x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gdn_ops.backends.torch.channels import (
    SMALL,
    Operands,
    Terms,
    advance,
    halves,
    operands_of,
    packed,
    per_row,
    readers_of,
    terms_of,
    whole_powers,
)
from gdn_ops.backends.torch.chunk_backward import SegmentGrads
from gdn_ops.backends.torch.chunk_forward import Segment


class _Walked(NamedTuple):
    """Hold the gradients that a walk back over the chunks leaves, one entry per chunk.

    Attributes:
        pairs: of P, and of A where there is an error term, (1 or 2, n, rows, C, C).
        readers: of q and E, (1 or 2, n, rows, C, K), by what they read of the state.
        k: of K, by what it leaves to the state.
        since, left: of b and d.
        written: of W.
        state: of the state at the start.
    """

    pairs: Tensor
    readers: Tensor
    k: Tensor
    since: Tensor
    left: Tensor
    written: Tensor
    state: Tensor


def backward_segment(
    x: Segment, state: Tensor, d_o: Tensor, d_state: Tensor, scale: float, has_erase: bool
) -> SegmentGrads:
    """Return the gradients of a segment, whose states are formed anew.

    Args:
        x: its operands.
        state: (G, K, R V) at its start.
        d_o: (n, G, R, C, V).
        d_state: (G, K, R V), the gradient of the state at its end.
        scale: s.
        has_erase: whether the rule has an error term.
    """
    heads, C = x.v.shape[2], x.tokens()
    operands = whole_powers(operands_of(x, scale, has_erase))
    levels: list[tuple[Tensor, Tensor]] = []
    missing = operands.k.shape[2] - C
    d_rows = functional.pad(d_o.flatten(1, 2), (0, 0, 0, missing))
    terms = terms_of(operands, levels)
    walked = _walk_back(operands, terms, per_row(state, heads), d_rows, per_row(d_state, heads))
    d_readers, d_k, d_alpha = _terms_backward(operands, levels, walked)
    d_readers, d_k, d_alpha, d_written = (
        y[..., :C, :] for y in (d_readers, d_k, d_alpha, walked.written)
    )
    d_start = packed(walked.state, heads)
    return _of_segment(x, scale, d_readers, d_k, d_alpha, d_written, d_start)


def _walk_back(x: Operands, terms: Terms, state: Tensor, d_o: Tensor, d_state: Tensor) -> _Walked:
    """Walk back over the chunks of a segment, whose states are formed on the way there."""
    states = [state]
    for i in range(x.k.shape[0] - 1):
        states.append(advance(x, terms, i, states[-1])[1])
    rows = []
    for i in reversed(range(x.k.shape[0])):
        own, d_state = _chunk_back(x, terms, i, states[i], d_o[i], d_state)
        rows.append(own)
    pairs, readers, k, since, left, written = (
        torch.stack(each[::-1]) for each in zip(*rows, strict=True)
    )
    return _Walked(pairs.movedim(1, 0), readers.movedim(1, 0), k, since, left, written, d_state)


def _chunk_back(
    x: Operands, terms: Terms, i: int, state: Tensor, d_o: Tensor, d_next: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the gradients of chunk i, as `_Walked` names them, and that of its state."""
    since, left, k, P = terms.since[i], terms.left[i], x.k[i], terms.P[i]
    last, readers, A = since[:, -1:], readers_of(x)[:, i], terms.A
    # §9 (I + A) U = W − (b ⊙ E) S                      [C, V]
    U = x.written[i]
    if A is not None:
        U = torch.linalg.solve_triangular(
            A[i], U - (since * readers[1]) @ state, upper=False, unitriangular=True
        )
    # §9 O = s (b ⊙ Q) S + P U,  S_C = diag(b_C) S + (d ⊙ K)ᵀ U
    d_U = P.mT @ d_o + (left * k) @ d_next
    d_R, d_pairs = d_U, [(d_o @ U.mT).tril()]
    read_from = [d_o]
    if A is not None:
        d_R = torch.linalg.solve_triangular(A[i].mT, d_U, upper=True, unitriangular=True)
        d_pairs.append(-(d_R @ U.mT).tril(-1))
        read_from.append(-d_R)
    # Gradients of b ⊙ Q and b ⊙ E                      [C, K]
    d_read = torch.stack(read_from) @ state.mT
    d_left = U @ d_next.mT
    d_since = _summed((d_read * readers).sum(0), since)
    d_last = _summed((d_next * state).sum(-1).unsqueeze(1), last)
    d_since = d_since + functional.pad(d_last, (0, 0, since.shape[1] - 1, 0))
    d_state = last.mT * d_next + (since * readers[0]).mT @ d_o
    if A is not None:
        d_state = d_state - (since * readers[1]).mT @ d_R
    own = (
        torch.stack(d_pairs),
        d_read * since,
        d_left * left,
        d_since,
        _summed(d_left * k, left),
        d_R,
    )
    return own, d_state


def _terms_backward(
    x: Operands, levels: list[tuple[Tensor, Tensor]], walked: _Walked
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of what reads, of K and of α, given those of the terms."""
    readers, d_pairs = readers_of(x), walked.pairs.unsqueeze(3)
    d_since, d_left = walked.since.unsqueeze(2), walked.left.unsqueeze(2)
    d_readers, d_k = walked.readers, walked.k
    for since, left in reversed(levels):
        h = since.shape[3]
        (since_0, since_1), (left_0, _) = halves(since, 2), halves(left, 2)
        reader = readers.unflatten(3, (-1, 2, h)).select(4, 1)
        key = x.k.unflatten(2, (-1, 2, h)).select(3, 0)
        d_first, d_second = d_pairs[..., :h, :h], d_pairs[..., h:, h:]
        d_read = d_pairs[..., h:, :h]
        # §9 the second half of a block reads of the first: (x ⊙ since) (k ⊙ left)ᵀ
        d_reads = _applied(d_read, key * left_0)
        d_keys = _applied(d_read.mT, reader * since_1).sum(0)
        d_readers = d_readers + _behind_zeros(d_reads * since_1, 4)
        d_k = d_k + _before_zeros(d_keys * left_0, 3)
        # since = (since_0, since_1 since_0[-1]),  left = (left_0 since_1[-1], left_1)
        end_0, end_1 = since_0[..., -1:, :], since_1[..., -1:, :]
        d_since_0, d_after = d_since[..., :h, :], d_since[..., h:, :]
        d_before, d_left_1 = d_left[..., :h, :], d_left[..., h:, :]
        d_end_0 = (d_after * since_1).sum(-2, keepdim=True)
        d_end_1 = (d_before * left_0).sum(-2, keepdim=True)
        d_since_1 = d_after * end_0 + _summed((d_reads * reader).sum(0), since_1)
        d_left_0 = d_before * end_1 + _summed(d_keys * key, left_0)
        d_since = _joined(d_since_0 + _at_end(d_end_0, h), d_since_1 + _at_end(d_end_1, h), 3)
        d_left = _joined(d_left_0, d_left_1, 3)
        d_pairs = _joined(d_first, d_second, 4)
    # §9 P_ii = s q_i · k_i
    d_own = d_pairs[0, ..., 0]
    d_q, *d_erased = d_readers
    d_readers = torch.stack((d_q + d_own * x.k, *d_erased))
    return d_readers, d_k + d_own * x.q, d_since.squeeze(3)


def _of_segment(
    x: Segment,
    scale: float,
    d_readers: Tensor,
    d_k: Tensor,
    d_alpha: Tensor,
    d_written: Tensor,
    d_start: Tensor,
) -> SegmentGrads:
    """Return the gradients of the tensors of a segment, from those of its operands."""
    R, beta = x.v.shape[2], x.beta.unsqueeze(-1)
    d_readers, d_k, d_alpha, d_written = (
        y.unflatten(-3, (-1, R)) for y in (d_readers, d_k, d_alpha, d_written)
    )
    write = beta if x.write is None else x.write
    d_write = _summed(d_written * x.v, write)
    d_beta, d_erase = d_write.squeeze(-1) if x.write is None else torch.zeros_like(x.beta), None
    if d_readers.shape[0] > 1:
        # §9 E = e ⊙ K
        erase, k = beta if x.erase is None else x.erase, x.k().unsqueeze(2)
        d_erase = _summed(d_readers[1] * k, erase)
        d_k = d_k + d_readers[1] * erase
        if x.erase is None:
            d_beta = d_beta + d_erase.squeeze(-1)
    return SegmentGrads(
        (scale * d_readers[0]).sum(2),
        d_k.sum(2),
        d_written * write,
        d_beta,
        None if x.alpha is None else d_alpha,
        d_start,
        None if x.erase is None else d_erase,
        None if x.write is None else d_write,
    )


def _summed(x: Tensor, like: Tensor) -> Tensor:
    """Return a gradient over channels, summed where there is one number for all of them."""
    return x.sum(-1, keepdim=True) if like.shape[-1] == 1 and x.shape[-1] != 1 else x


def _applied(a: Tensor, b: Tensor) -> Tensor:
    """Return a b over the last two axes."""
    if a.shape[-1] <= SMALL:
        return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)
    return a @ b


def _joined(first: Tensor, second: Tensor, axis: int) -> Tensor:
    """Return blocks in their order, given every other one of them; `axis` is behind theirs."""
    return torch.stack((first, second), axis).flatten(axis - 1, axis)


def _behind_zeros(x: Tensor, axis: int) -> Tensor:
    """Return tokens of every second block as tokens of all, 0 in the others."""
    return torch.stack((torch.zeros_like(x), x), axis).flatten(axis - 1, axis + 1)


def _before_zeros(x: Tensor, axis: int) -> Tensor:
    """Return tokens of every first block as tokens of all, 0 in the others."""
    return torch.stack((x, torch.zeros_like(x)), axis).flatten(axis - 1, axis + 1)


def _at_end(x: Tensor, h: int) -> Tensor:
    """Return the row of the last token of a block as a block of h tokens, 0 in the others."""
    return functional.pad(x, (0, 0, h - 1, 0))
