"""Compute the chunkwise form of docs/math.md §9 over one segment: gates of channels, and e ≠ w.

Decays between tokens are products of gates, formed from the bottom up by multiplications alone:
of blocks of one token, of two, of four, up to a chunk. Where two blocks of h tokens meet at m,

    Π_{j<l≤i} α_l = (Π_{m≤l≤i} α_l) (Π_{j<l<m} α_l),   j < m ≤ i,   every channel by itself,

so that what tokens i of the second block read of tokens j of the first is one matrix product of
factors that are at most 1. Nothing is divided and no logarithm is taken: an exact 0, a product too
small for a number and every derivative come out right, and all transforms see through.

    q, k, E = e ⊙ k  (n, rows, C, K)    alpha, since, left  (n, rows, C, K) or (n, rows, C, 1)
    W = w ⊙ v, U     (n, rows, C, V)    A, P, T  (n, rows, C, C)    S  (rows, K, V)

A row is a value head of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gdn_ops.backends.torch.chunk_forward import Segment

SMALL = 2
"""Blocks of so few tokens are multiplied number by number: batches of tiny matrices are slow."""


class Operands(NamedTuple):
    """Hold the operands of a segment for every value head; see the module docstring for shapes.

    Attributes:
        q: with its scale.
        k: keys, that are written.
        alpha: decays.
        erased: E, keys that are read for the error; None without an error term.
        written: W.
    """

    q: Tensor
    k: Tensor
    alpha: Tensor
    erased: Tensor | None
    written: Tensor

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor | None, Tensor | None, Tensor | None],
        beta: Tensor | None,
        has_erase: bool,
    ) -> Operands:
        """Multiply the strengths into keys and values.

        Args:
            q, k, v: as in this class, v without its strength.
            gates: alpha, erase and write with a channel axis, or None.
            beta: with a channel axis of 1, in place of erase and write; or None for 1.
            has_erase: whether the rule has an error term.
        """
        alpha, erase, write = gates
        alpha = torch.ones_like(v[..., :1]) if alpha is None else alpha
        if write is None:
            erase = write = beta
        erased = (k if erase is None else erase * k) if has_erase else None
        return Operands(q, k, alpha, erased, v if write is None else write * v)


class Terms(NamedTuple):
    """Hold the terms of a segment that do not depend on the state.

    Attributes:
        P: s lower(Q Kᵀ), every pair with its decays.
        A: strict_lower(E Kᵀ) likewise, or None without an error term.
        since: b, the decays from the start of the chunk to each token, itself included.
        left: d, those behind each token to the end of the chunk.
    """

    P: Tensor
    A: Tensor | None
    since: Tensor
    left: Tensor


def operands_of(x: Segment, scale: float, has_erase: bool) -> Operands:
    """Return the operands of a segment, q and k repeated for every value head."""
    R = x.v.shape[2]
    q, k = (y.unsqueeze(2).expand(-1, -1, R, -1, -1).flatten(1, 2) for y in (x.q(), x.k()))
    gates = tuple(None if y is None else y.flatten(1, 2) for y in (x.alpha, x.erase, x.write))
    beta = x.beta.flatten(1, 2).unsqueeze(-1)
    return Operands.of(q * scale, k, x.v.flatten(1, 2), gates, beta, has_erase)  # type: ignore[arg-type]


def terms_of(x: Operands, levels: list[tuple[Tensor, Tensor]] | None = None) -> Terms:
    """Form the terms of §9 that do not depend on the state, for chunks of a power of two.

    Args:
        x: the operands.
        levels: where to put `since` and `left` of the blocks of 1, 2, 4, ... tokens, as
            (n, rows, C / h, h, K or 1), for a backward.
    """
    C = x.k.shape[2]
    # §9 P_ii = s q_i · k_i; A has no diagonal
    pairs = (x.q * x.k).sum(-1)[None, ..., None, None]
    readers = readers_of(x)
    if x.erased is not None:
        pairs = torch.cat((pairs, torch.zeros_like(pairs)))
    since, left = x.alpha.unsqueeze(3), torch.ones_like(x.alpha).unsqueeze(3)
    while since.shape[3] < C:
        if levels is not None:
            levels.append((since, left))
        (since_0, since_1), (left_0, left_1) = halves(since, 2), halves(left, 2)
        first, second = halves(pairs, 3)
        h = since.shape[3]
        read_by = readers.unflatten(3, (-1, 2, h)).select(4, 1) * since_1
        written = x.k.unflatten(2, (-1, 2, h)).select(3, 0) * left_0
        # §9 s Σ_c q_ic k_jc Π_{j<l≤i} α_lc, and so for A   [h, h]
        read = _products(read_by, written)
        above = torch.zeros_like(read)
        pairs = torch.cat((torch.cat((first, above), -1), torch.cat((read, second), -1)), -2)
        since = torch.cat((since_0, since_1 * since_0[..., -1:, :]), -2)
        left = torch.cat((left_0 * since_1[..., -1:, :], left_1), -2)
    P, *A = pairs.squeeze(3)
    return Terms(P, A[0] if A else None, since.squeeze(2), left.squeeze(2))


def readers_of(x: Operands) -> Tensor:
    """Return what reads the state: q, and E where there is an error term, (1 or 2, n, rows, C, K).

    The scale is in q.
    """
    return x.q.unsqueeze(0) if x.erased is None else torch.stack((x.q, x.erased))


def halves(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return every other block along an axis, from the first and from the second on."""
    pairs = x.unflatten(axis, (-1, 2))
    return pairs.select(axis + 1, 0), pairs.select(axis + 1, 1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return a bᵀ over the last two axes."""
    if a.shape[-2] <= SMALL:
        return (a.unsqueeze(-2) * b.unsqueeze(-3)).sum(-1)
    return a @ b.mT


def advance(x: Operands, terms: Terms, i: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run chunk i; return its output (rows, C, V) and the state after it, both new tensors."""
    since, U = terms.since[i], x.written[i]
    if terms.A is not None and x.erased is not None:
        # §9 (I + A) U = W − (b ⊙ E) S                      [C, V]
        U = torch.linalg.solve_triangular(
            terms.A[i], U - (since * x.erased[i]) @ state, upper=False, unitriangular=True
        )
    # §9 O = s (b ⊙ Q) S + P U                              [C, V]
    o = (since * x.q[i]) @ state + terms.P[i] @ U
    # §9 S_C = diag(b_C) S + (d ⊙ K)ᵀ U                     [K, V]
    return o, since[:, -1].unsqueeze(-1) * state + (terms.left[i] * x.k[i]).mT @ U


def run_chunks(x: Operands, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run the chunks of a segment; return o (n, rows, C, V) and the state after them.

    Chunks of a length that is no power of two are padded with tokens that change nothing.
    """
    C = x.k.shape[2]
    x = whole_powers(x)
    terms, outputs = terms_of(x), []
    for i in range(x.k.shape[0]):
        o, state = advance(x, terms, i, state)
        outputs.append(o)
    return torch.stack(outputs)[:, :, :C], state


def whole_powers(x: Operands) -> Operands:
    """Return operands padded with tokens that change nothing, to chunks of a power of two."""
    C = x.k.shape[2]
    missing = (1 << (C - 1).bit_length()) - C
    if not missing:
        return x
    q, k, erased, written = (
        None if y is None else functional.pad(y, (0, 0, 0, missing))
        for y in (x.q, x.k, x.erased, x.written)
    )
    alpha = functional.pad(x.alpha, (0, 0, 0, missing), value=1.0)
    return Operands(q, k, alpha, erased, written)  # type: ignore[arg-type]


def per_row(state: Tensor, heads: int) -> Tensor:
    """Reshape a packed state (G, K, R V) to (G R, K, V)."""
    split: Tensor = state.unflatten(-1, (heads, -1))
    return split.movedim(2, 1).flatten(0, 1)


def packed(state: Tensor, heads: int) -> Tensor:
    """Reshape (G R, K, V) to a packed state (G, K, R V)."""
    split: Tensor = state.unflatten(0, (-1, heads))
    return split.movedim(1, 2).flatten(-2)


def run_segment(x: Segment, state: Tensor, scale: float, has_erase: bool) -> tuple[Tensor, Tensor]:
    """Return the outputs (n, G R, C, V) of a segment, and the packed state after it."""
    heads = x.v.shape[2]
    o, after = run_chunks(operands_of(x, scale, has_erase), per_row(state, heads))
    return o, packed(after, heads)


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
    o, after = run_segment(x, state, scale, has_erase)
    for one, into in zip(o, out, strict=True):
        # (G R, C, V) to (rows, H, R, c, V)
        into.copy_(one.unflatten(0, into.shape[:3])[..., : into.shape[3], :])
    return after


def advance_segment(x: Segment, state: Tensor, scale: float, has_erase: bool) -> Tensor:
    """Return the state after a segment, without its outputs."""
    return run_segment(x, state, scale, has_erase)[1]
