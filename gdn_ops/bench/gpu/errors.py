"""Compute a row's worst errors, over sequences and heads, against the definition in float64.

The definition walks token by token, which takes tens of microseconds each on a GPU. So it walks
what fits into the time given: whole sequences, or the beginning of one, all heads of it. Gradients
of the last tokens depend on nothing but the state before them, so a window at the end of the last
sequence is exact; its first state is formed chunk by chunk in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from gdn_ops.bench.inputs import Inputs
from gdn_ops.bench.verify import GRADIENTS, Part, define, define_step, take

PACE_TOKENS = 32
"""Tokens that are walked to learn the pace."""

WINDOW = 256
"""Tokens at the end whose gradients are checked."""

KEY_HEADS = 2
"""Key heads, with their value heads, whose gradients are checked; the last ones."""

_ALL = slice(None)


def _part(
    what: str, index: int, taken: Callable[[Tensor], Tensor], exact: Tensor, head_axis: int
) -> Part:
    """Return a part whose error is in the 2-norm, of the worst row and head."""
    axes = tuple(a for a in range(1, exact.dim()) if a != head_axis)
    return Part(what, index, taken, exact, axes, order=2)


def _state_of(x: Inputs) -> Tensor:
    assert x.state is not None
    return x.state.detach()


def _sequences(x: Inputs) -> list[tuple[slice, slice, slice]]:
    """Return slices (rows, tokens, states) of the parts walked at once, last sequence first."""
    if x.cu_seqlens is None:
        return [(_ALL, slice(0, x.q.shape[1]), _ALL)]
    bounds = list(pairwise(x.cu_seqlens.tolist()))
    slices = [(slice(0, 1), slice(a, b), slice(n, n + 1)) for n, (a, b) in enumerate(bounds)]
    return slices[::-1]


def exact_forward(
    x: Inputs, seconds: float, clock: Callable[[], float], finish: Callable[[], None]
) -> list[Part]:
    """Walk the tokens that fit into a time; return o, and the final states of complete sequences.

    At least PACE_TOKENS are walked; `finish` waits for the device.
    """
    parts: list[Part] = []
    start = clock()

    def walk(rows: slice, tokens: slice, states: slice) -> tuple[Tensor, Tensor]:
        outputs = define(
            replace(x.select(rows, tokens, _ALL, _ALL), state=_state_of(x)[states]).double()
        )
        finish()
        return outputs

    with torch.no_grad():
        pace = 0.0
        for rows, tokens, states in _sequences(x):
            if not pace:
                short = slice(tokens.start, min(tokens.stop, tokens.start + PACE_TOKENS))
                walk(rows, short, states)
                before = clock()
                walk(rows, short, states)
                pace = max(clock() - before, 1e-9) / max(1, short.stop - short.start)
            left = seconds - (clock() - start)
            fits = max(0 if parts else PACE_TOKENS, int(left / pace))
            is_whole = tokens.stop - tokens.start <= fits
            if not is_whole and parts:
                break
            taken = slice(tokens.start, min(tokens.stop, tokens.start + fits))
            o, final = walk(rows, taken, states)
            parts.append(_part("o", 0, take(rows, taken), o, 2))
            if not is_whole:
                break
            parts.append(_part("state", 1, take(states), final, 1))
    return parts


def exact_step(x: Inputs) -> list[Part]:
    """Return the exact o and new state of a step."""
    with torch.no_grad():
        o, new = define_step(x)
    return [_part("o", 0, take(), o, 1), _part("state", 1, take(), new, 1)]


def exact_backward(x: Inputs, d_o: Tensor, d_state: Tensor) -> list[Part]:
    """Return exact gradients of the last heads over the last tokens, in the order of GRADIENTS."""
    h, hv = x.q.shape[2], x.v.shape[2]
    rows, tokens, states = _sequences(x)[0]
    window = slice(max(tokens.start, tokens.stop - WINDOW), tokens.stop)
    keys = slice(max(0, h - KEY_HEADS), h)
    values = slice(keys.start * (hv // h if h else 1), hv)
    start = _state_of(x)[states, values]
    if window.start > tokens.start:
        before = x.select(rows, slice(tokens.start, window.start), keys, values)
        with torch.no_grad():
            _, start = define(replace(before, state=start).double(), "torch")
    part = replace(x.select(rows, window, keys, values), state=start)
    leaves = part.double().with_grad()
    with torch.enable_grad():
        results = define(leaves)
    cotangents = (d_o[rows, window, values].double(), d_state[states, values].double())
    exact = torch.autograd.grad(results, leaves.operands(), cotangents)
    heads = (keys, keys, values, values, values)
    parts = [_part(GRADIENTS[i], i, take(rows, window, heads[i]), exact[i], 2) for i in range(5)]
    if window.start == tokens.start:
        parts.append(_part(GRADIENTS[5], 5, take(states, values), exact[5], 1))
    return parts


def worst_error(parts: Sequence[Part], results: Sequence[Tensor]) -> tuple[float, str]:
    """Return the largest error and the name of its result; NaN counts as the largest."""
    errors = [(part.error(results), part.what) for part in parts]
    return max(errors, key=lambda e: float("inf") if e[0] != e[0] else e[0])
