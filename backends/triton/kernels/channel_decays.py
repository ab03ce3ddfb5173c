"""Form products of the decays of channels over blocks of a chunk (docs/math.md §9).

A chunk is halved into blocks of h = C / 2, ..., 2, 1 tokens. Where two blocks of h tokens meet,
what token i of the second reads of token j of the first has decayed by F_i L_j, every channel by
itself:

    F  the decays from the start of a token's block of h tokens to the token, itself included
    L  those behind the token to the end of its block

All are products of gates, and at most 1: nothing is divided and no logarithm is taken, so that an
exact 0, a product too small for a number and every derivative come out right. Tiles are (C, D)
float32, D channels of K.

A token is multiplied by the decays of the other half of its block of 2h, which other threads hold.
These totals go through memory, (2C, D) float32 for a program: a row for every block of every h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_ops.backends.triton.kernels.blocks import ALPHA, operand, rows

WIDTH = tl.constexpr(32)
"""Columns of K that are taken at a time: few, since a program holds many tiles of them."""


@triton.jit
def decays_at(
    gate, row, gate_batch, first, gate_token, hv, gate_head, i, d, left, K: tl.constexpr,
    GATE: tl.constexpr,
):  # fmt: skip
    """Return the decays of tokens i, (C, D) float32, 1 for those from `left` on."""
    from_gate = rows(gate, row, gate_batch, first, gate_token, hv, gate_head, i, d)
    inside = (i < left)[:, None] & (d < K)[None, :]
    if GATE == ALPHA:
        x = tl.load(from_gate, mask=inside, other=1.0).to(tl.float32)
    else:
        x = tl.exp(tl.load(from_gate, mask=inside, other=0.0).to(tl.float32))
    return x


@triton.jit
def levels(C: tl.constexpr):
    """Return how often a chunk of C tokens is halved, down to blocks of one: log2(C)."""
    return 4 + C // 32


@triton.jit
def totals_at(totals, block, level, C: tl.constexpr, D: tl.constexpr):
    """Return the pointers to the totals of blocks of 2**level tokens, (C, D)."""
    before = 2 * C - ((2 * C) >> level)
    return totals + (before + block)[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit
def is_second(i, level):
    """Return which tokens lie in the second of two blocks of 2**level tokens, (C, 1)."""
    return ((i >> level) & 1 == 1)[:, None]


@triton.jit
def is_last(i, level):
    """Return which tokens are the last ones of blocks of 2**level tokens, (C, 1)."""
    return ((i + 1) & ((1 << level) - 1) == 0)[:, None]


@triton.jit
def write_totals(totals, F, i, level):
    """Write the totals of blocks of 2**level tokens, which all threads may then read."""
    C: tl.constexpr = F.shape[0]
    D: tl.constexpr = F.shape[1]
    tl.store(totals_at(totals, i >> level, level, C, D), F, mask=is_last(i, level))
    # Wait: a thread reads what another one has stored.
    tl.debug_barrier()


@triton.jit
def joined(totals, F, L, i, level):
    """Return F and L of blocks of 2h tokens, given those of blocks of h = 2**level."""
    C: tl.constexpr = F.shape[0]
    D: tl.constexpr = F.shape[1]
    total = tl.load(totals_at(totals, (i >> level) ^ 1, level, C, D))
    second = is_second(i, level)
    return F * tl.where(second, total, 1.0), L * tl.where(second, 1.0, total)


@triton.jit
def met(x, level):
    """Return x (C, C) where row and column are in two blocks of 2**level tokens that meet."""
    i, j = tl.arange(0, x.shape[0]) >> level, tl.arange(0, x.shape[1]) >> level
    return tl.where((i ^ 1)[:, None] == j[None, :], x, 0.0)


@triton.jit
def halved(totals, dF, dL, F, L, i, level, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Return the gradients of F and L of blocks of h tokens, given those of blocks of 2h.

    The product of `joined` is differentiated, so that none is divided.
    """
    C: tl.constexpr = F.shape[0]
    D: tl.constexpr = F.shape[1]
    second, last = is_second(i, level), is_last(i, level)
    # A total is that of the last token of its block, and a factor of all of the other block.
    others = (i >> level)[:, None] ^ 1 == (tl.arange(0, C) >> level)[None, :]
    others = tl.where(others & last, 1.0, 0.0).to(dtype)
    d_total = operand(tl.where(second, dF * F, dL * L), dtype, PRECISION)
    total = tl.load(totals_at(totals, (i >> level) ^ 1, level, C, D))
    dF = dF * tl.where(second, total, 1.0)
    dF = tl.dot(others, d_total, dF, input_precision=PRECISION)
    return dF, dL * tl.where(second, 1.0, total)
