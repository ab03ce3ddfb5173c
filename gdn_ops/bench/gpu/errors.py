"""Compute a row's worst errors, over sequences and heads, against the definition in float64.

The definition walks token by token, which takes tens of microseconds each on a GPU. So it walks
what fits into the time given: whole sequences, or the beginning of one, all heads of it. Gradients
of the last tokens depend on nothing but the state before them, so a window at the end of the last
sequence is exact; its first state is formed chunk by chunk in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gdn_ops.bench.gpu.inputs import GRADIENTS, Problem
from gdn_ops.ops import gated_delta, gated_delta_step

PACE_TOKENS = 32
"""Tokens that are walked to learn the pace."""

WINDOW = 256
"""Tokens at the end whose gradients are checked."""

KEY_HEADS = 2
"""Key heads, with their value heads, whose gradients are checked; the last ones."""


@dataclass(frozen=True)
class Piece:
    """Hold a part of a result and its exact values.

    Attributes:
        what: "o", "state", "dq", ...
        part: takes the part out of the whole result.
        index: of the result among all results.
        exact: (rows, tokens, heads, width) or (rows, heads, K, V) float64.
        head_axis: of the part.
    """

    what: str
    index: int
    part: Callable[[Tensor], Tensor]
    exact: Tensor
    head_axis: int

    def error(self, results: Sequence[Tensor]) -> float:
        """Return the worst |x - exact| / |exact| over rows and heads; NaN stays NaN."""
        x = self.part(results[self.index]).double()
        axes = [a for a in range(1, x.dim()) if a != self.head_axis]
        size = _norm(self.exact, axes).clamp(min=torch.finfo(torch.float32).tiny)
        found = _norm(x - self.exact, axes) / size
        return float(found.max()) if found.numel() else 0.0


def _norm(x: Tensor, axes: list[int]) -> Tensor:
    squares = x.square()
    return (squares.sum(axes) if axes else squares).sqrt()


def _sequences(p: Problem) -> list[tuple[slice, slice, slice]]:
    """Return slices (rows, tokens, states) of the parts walked at once, last sequence first."""
    if p.cu_seqlens is None:
        return [(slice(None), slice(0, p.row.sizes.T), slice(None))]
    bounds = list(pairwise(p.cu_seqlens.tolist()))
    found = [(slice(0, 1), slice(a, b), slice(n, n + 1)) for n, (a, b) in enumerate(bounds)]
    return found[::-1]


def _walk(p: Problem, rows: slice, tokens: slice, states: slice) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = (x[rows, tokens].double() for x in p.operands()[:5])
    start = p.state[states].double()
    return gated_delta(
        q, k, v, None, beta, log_alpha=g, initial_state=start, return_state=True, backend="naive"
    )


def exact_forward(
    p: Problem, seconds: float, clock: Callable[[], float], finish: Callable[[], None]
) -> list[Piece]:
    """Walk the tokens that fit into a time; return o, and the final states of complete sequences.

    Args:
        p: the problem.
        seconds: for all of it; at least PACE_TOKENS are walked.
        clock: seconds; monotonic.
        finish: waits for the device.
    """
    pieces: list[Piece] = []
    start = clock()
    with torch.no_grad():
        pace = 0.0
        for rows, tokens, states in _sequences(p):
            if not pace:
                short = slice(tokens.start, min(tokens.stop, tokens.start + PACE_TOKENS))
                _walk(p, rows, short, states)
                finish()
                before = clock()
                _walk(p, rows, short, states)
                finish()
                pace = max(clock() - before, 1e-9) / max(1, short.stop - short.start)
            left = seconds - (clock() - start)
            fits = max(0 if pieces else PACE_TOKENS, int(left / pace))
            whole = tokens.stop - tokens.start <= fits
            if not whole and pieces:
                break
            taken = slice(tokens.start, min(tokens.stop, tokens.start + fits))
            o, final = _walk(p, rows, taken, states)
            finish()
            pieces.append(Piece("o", 0, _take(rows, taken), o, 2))
            if not whole:
                break
            pieces.append(Piece("state", 1, _take(states), final, 1))
    return pieces


def _take(*index: slice) -> Callable[[Tensor], Tensor]:
    return lambda x: x[index]


def exact_step(p: Problem) -> list[Piece]:
    """Return the exact o and new state of a step."""
    with torch.no_grad():
        q, k, v, g, beta, state = (x.double() for x in p.operands())
        o, new = gated_delta_step(q, k, v, None, beta, state, log_alpha=g, backend="naive")
    return [Piece("o", 0, _take(), o, 1), Piece("state", 1, _take(), new, 1)]


def exact_backward(p: Problem, d_o: Tensor, d_state: Tensor) -> list[Piece]:
    """Return exact gradients of the last heads over the last tokens, in the order of GRADIENTS."""
    s = p.row.sizes
    rows, tokens, states = _sequences(p)[0]
    window = slice(max(tokens.start, tokens.stop - WINDOW), tokens.stop)
    keys = slice(max(0, s.H - KEY_HEADS), s.H)
    values = slice(keys.start * s.R, s.HV)
    heads = (keys, keys, values, values, values)

    def part(span: slice) -> list[Tensor]:
        operands = p.operands()[:5]
        return [x.detach()[rows, span, h].double() for x, h in zip(operands, heads, strict=True)]

    start = p.state.detach()[states, values].double()
    if window.start > tokens.start:
        q, k, v, g, beta = part(slice(tokens.start, window.start))
        with torch.no_grad():
            _, start = gated_delta(
                q, k, v, None, beta, log_alpha=g, initial_state=start, return_state=True,
                backend="torch",
            )  # fmt: skip
    leaves = [x.requires_grad_() for x in (*part(window), start.clone())]
    q, k, v, g, beta, state = leaves
    with torch.enable_grad():
        o, final = gated_delta(
            q, k, v, None, beta, log_alpha=g, initial_state=state, return_state=True,
            backend="naive",
        )  # fmt: skip
    cotangents = (d_o[rows, window, values].double(), d_state[states, values].double())
    exact = torch.autograd.grad((o, final), leaves, cotangents)
    pieces = [Piece(GRADIENTS[i], i, _take(rows, window, heads[i]), exact[i], 2) for i in range(5)]
    if window.start == tokens.start:
        pieces.append(Piece(GRADIENTS[5], 5, _take(states, values), exact[5], 1))
    return pieces


def worst_error(pieces: Sequence[Piece], results: Sequence[Tensor]) -> tuple[float, str]:
    """Return the largest error and the name of its result; NaN counts as the largest."""
    found = [(piece.error(results), piece.what) for piece in pieces]
    return max(found, key=lambda e: float("inf") if e[0] != e[0] else e[0])
