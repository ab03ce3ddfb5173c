"""Compute the chunkwise form of docs/math.md §3 so that every transform of torch.func sees through.

Nothing is written in place, no value is read, and decays are products of gates, not differences of
logarithms: a polynomial in the gates, whose derivatives of every order, forward and reverse, are
right at an exact 0 too. That takes memory of the order of T (C + K V / C) per value head.

    q, k  (rows, n, C, K)    v, U  (rows, n, C, V)    D  (rows, n, C, C + 1)    S  (rows, K, V)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gdn_ops.backends.torch import channels
from gdn_ops.backends.torch.loading import wide_gates
from gdn_ops.call.bind import Call
from gdn_ops.call.numerics import l2norm
from gdn_ops.call.transforms import integers

CHUNK = 32
"""Tokens per chunk where a call does not say."""


class Operands(NamedTuple):
    """Hold the operands of sequences in the compute dtype, a row per value head.

    Attributes:
        q, k: (rows, T, K), q times the scale.
        v: (rows, T, V).
        alpha, beta: (rows, T), or None for 1.
        wide: in a call whose gates are wide (docs/math.md §9), alpha, erase and write with a
            channel axis in place of alpha; else None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor | None
    beta: Tensor | None
    wide: tuple[Tensor | None, ...] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Operands:
        """Return the results of a function of every tensor that is there."""

        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else function(x)

        wide = None if self.wide is None else tuple(of(x) for x in self.wide)
        return Operands(
            function(self.q),
            function(self.k),
            function(self.v),
            of(self.alpha),
            of(self.beta),
            wide,
        )

    def tokens(self, start: int, stop: int) -> Operands:
        """Return some of the tokens."""
        return self.map(lambda x: x[:, start:stop])


def pure(call: Call) -> tuple[Tensor, Tensor]:
    """Run `gated_delta`; return o (B, T, HV, V) and the final state (N, HV, K, V)."""
    s, x, state = call.sizes, _operands(call), call.state
    if state is None:
        state = x.v.new_zeros((s.N, s.HV, s.K, s.V))
    state = state.to(call.compute_dtype)
    chunk_size, has_erase = call.chunk_size or CHUNK, call.rule.has_erase
    if call.cu_seqlens is None:
        o, new = _run(x, state.flatten(0, 1), chunk_size, has_erase)
        new = new.unflatten(0, (s.N, s.HV))
    elif s.N == 0:
        o, new = x.v, state
    else:
        # §6 each sequence starts from its own state
        bounds = itertools.pairwise(integers(call.cu_seqlens))
        parts = [
            _run(x.tokens(*ends), state[n], chunk_size, has_erase) for n, ends in enumerate(bounds)
        ]
        o = torch.cat([part for part, _ in parts], 1)
        new = torch.stack([part for _, part in parts])
    o = o.unflatten(0, (s.B, s.HV)).transpose(1, 2).to(call.tokens.v.dtype)
    # A result never is an argument: without tokens both are.
    return o.clone(memory_format=torch.contiguous_format), new if s.T else new.clone()


def _operands(call: Call) -> Operands:
    """Return the operands of a call, q and k repeated for every value head."""
    s, dtype = call.sizes, call.compute_dtype

    def rows(x: Tensor) -> Tensor:
        return x.to(dtype).transpose(1, 2).flatten(0, 1)

    def keys(x: Tensor) -> Tensor:
        x = l2norm(x) if call.qk_l2norm else x
        return rows(x.unsqueeze(3).expand(s.B, s.T, s.H, s.R, s.K).flatten(2, 3))

    q, k, v, alpha, log_alpha, beta = call.tokens[:6]
    if call.widths.wide:
        wide = tuple(None if x is None else rows(x) for x in wide_gates(call))
        strength = None if beta is None else rows(beta)
        return Operands(keys(q) * call.scale, keys(k), rows(v), None, strength, wide)
    decay = None if alpha is None else rows(alpha)
    if log_alpha is not None:
        decay = rows(log_alpha).exp()
    return Operands(
        keys(q) * call.scale, keys(k), rows(v), decay, None if beta is None else rows(beta)
    )


def _run(x: Operands, state: Tensor, chunk_size: int, has_erase: bool) -> tuple[Tensor, Tensor]:
    """Run sequences of one length from (rows, K, V); return o (rows, T, V) and the state."""
    tokens = x.v.shape[1]
    if tokens == 0:
        return x.v, state
    cut = _in_chunks(x, min(chunk_size, tokens))
    if cut.wide is not None:
        # §9, a segment of all chunks
        cut = cut.map(lambda y: y.transpose(0, 1))
        beta = None if cut.beta is None else cut.beta.unsqueeze(-1)
        operands = channels.Operands.of(cut.q, cut.k, cut.v, cut.wide, beta, has_erase)  # type: ignore[arg-type]
        o, new = channels.run_chunks(operands, state)
        return o.transpose(0, 1).flatten(1, 2)[:, :tokens], new
    q, k, v, alpha, beta, _ = cut
    D = None if alpha is None else _decays(alpha)
    # §3 K Kᵀ and Q Kᵀ                                [C, C]
    KK, QK = k @ k.mT, q @ k.mT
    if D is not None:
        KK, QK = KK * D[..., 1:], QK * D[..., 1:]
    # §3 T = (I + A)⁻¹,  A = strict_lower(diag(β) (K Kᵀ ⊙ D))            [C, C]
    T = None
    if has_erase:
        A = KK if beta is None else KK * beta.unsqueeze(-1)
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        T = torch.linalg.solve_triangular(A, eye.expand(A.shape), upper=False, unitriangular=True)
        T = T if beta is None else T * beta.unsqueeze(-2)
    elif beta is not None:
        v = v * beta.unsqueeze(-1)
    b_k, k_d = k, k
    if D is not None:
        q, b_k, k_d = q * D[..., :1], k * D[..., :1], k * D[..., -1, 1:, None]
    states, corrections = [state], []
    for i in range(v.shape[1]):
        # §3 U = T diag(β) (V − diag(b) K S)          [C, V]
        U = v[:, i] if T is None else T[:, i] @ (v[:, i] - b_k[:, i] @ states[-1])
        # §3 S_C = b_C S + (diag(d) K)ᵀ U             [K, V]
        held = states[-1] if D is None else states[-1] * D[:, i, -1:, :1]
        states.append(held + k_d[:, i].mT @ U)
        corrections.append(U)
    # §3 O = s (diag(b) Q S + lower(Q Kᵀ ⊙ D) U)      [C, V]
    o = q @ torch.stack(states[:-1], 1) + QK.tril() @ torch.stack(corrections, 1)
    return o.flatten(1, 2)[:, :tokens], states[-1]


def _in_chunks(x: Operands, chunk_size: int) -> Operands:
    """Return operands as (rows, n, C, ...); padded tokens are the identity (α=1, β=0)."""
    tokens = x.v.shape[1]
    chunks = -(-tokens // chunk_size)
    missing = chunks * chunk_size - tokens

    def cut(y: Tensor, fill: float = 0.0) -> Tensor:
        sides = (0, 0) * (y.dim() - 2) + (0, missing)
        padded: Tensor = functional.pad(y, sides, value=fill)
        return padded.unflatten(1, (chunks, chunk_size))  # type: ignore[no-any-return]

    whole = x.map(cut)
    if x.alpha is not None:
        whole = whole._replace(alpha=cut(x.alpha, 1.0))
    if x.wide is not None and whole.wide is not None and x.wide[0] is not None:
        whole = whole._replace(wide=(cut(x.wide[0], 1.0), *whole.wide[1:]))
    return whole


def _decays(alpha: Tensor) -> Tensor:
    """Return D (..., C, C + 1): first b, then D_ij, 0 above the diagonal; alpha is (..., C)."""
    ends = torch.eye(alpha.shape[-1] + 1, dtype=alpha.dtype, device=alpha.device)
    row, rows = ends[0], []
    for i in range(alpha.shape[-1]):
        # §3 D_ij = Π_{j<l≤i} α_l,  b_i = D_{i,start}
        row = row * alpha[..., i, None] + ends[i + 1]
        rows.append(row)
    return torch.stack(rows, -2)
