"""Measure all that is written to the states of a call, what later writes take off again too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn_ops.call.numerics import l2norm
from gdn_ops.testing.example import Example

Cotangents = tuple[Tensor, Tensor]


class _Run(NamedTuple):
    """Hold sequences of one length in float64, heads repeated and gates ready to be multiplied.

    Attributes:
        q, k: (N, T, HV, K, 1), q with its scale.
        v, d_o: (N, T, HV, 1, V).
        alpha, beta: (N, T, HV, 1, 1).
        start, d_final: (N, HV, K, V).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor
    beta: Tensor
    d_o: Tensor
    start: Tensor
    d_final: Tensor


def written(
    arguments: dict[str, Any], cotangents: Cotangents | None, example: Example
) -> dict[str, Tensor]:
    """Return the root of the sum of squares of all writes to a state, as far as they have decayed.

    Roundings of writes add up like that. In the notation of docs/math.md §2 and element by element,
    it is the root of A_T, where A_0 = S_0^2 and A_t = alpha_t^2 A_{t-1} + (k_t u_t^T)^2, and the
    same along the gradient of the state (§5).

    Args:
        arguments: of a call of a rule that erases.
        cotangents: of o and of the final state, or None for no gradients.
        example: what the call was made from.

    Returns:
        float64 (N, HV, K, V) for "final_state" and, with cotangents, "d_initial_state"; for "o"
        what is read of A, the root of A_t^T (s q_t)^2, (B, T, HV, V).
    """
    runs = list(_runs(arguments, cotangents, example))
    if not runs:
        return {}
    o, final_state = zip(*map(_along_the_state, runs), strict=True)
    sizes = {"o": torch.cat(o, 1), "final_state": torch.cat(final_state)}
    if cotangents is not None:
        sizes["d_initial_state"] = torch.cat([_along_its_gradient(run) for run in runs])
    return sizes


def _along_the_state(x: _Run) -> tuple[Tensor, Tensor]:
    state, size, o = x.start, x.start.square(), torch.zeros_like(x.v)
    for t in range(x.k.shape[1]):
        k, state = x.k[:, t], x.alpha[:, t] * state
        write = k * x.beta[:, t] * (x.v[:, t] - (state * k).sum(-2, keepdim=True))
        state, size = state + write, x.alpha[:, t].square() * size + write.square()
        o[:, t] = (size * x.q[:, t].square()).sum(-2, keepdim=True).sqrt()
    return o.squeeze(-2), size.sqrt()


def _along_its_gradient(x: _Run) -> Tensor:
    d_state, size = x.d_final, x.d_final.square()
    for t in reversed(range(x.k.shape[1])):
        k, write = x.k[:, t], x.q[:, t] * x.d_o[:, t]
        d_state = d_state + write
        erased = k * x.beta[:, t] * (d_state * k).sum(-2, keepdim=True)
        d_state = x.alpha[:, t] * (d_state - erased)
        size = x.alpha[:, t].square() * (size + write.square() + erased.square())
    return size.sqrt()


def _runs(
    arguments: dict[str, Any], cotangents: Cotangents | None, example: Example
) -> Iterator[_Run]:
    """Yield a batch as one run, packed sequences as a run each."""
    s, v = example.sizes, arguments["v"].double()
    q, k = (
        l2norm(x.double()) if example.qk_l2norm else x.double()
        for x in (arguments["q"], arguments["k"])
    )
    q, k = (x.repeat_interleave(s.R, 2).unsqueeze(-1) for x in (q, k))
    q = q * (s.K**-0.5 if example.scale is None else example.scale)
    alpha, beta = arguments.get("alpha"), arguments.get("beta")
    if arguments.get("log_alpha") is not None:
        alpha = arguments["log_alpha"].exp()
    ones = v.new_ones(s.B, s.T, s.HV)
    gates = [(ones if x is None else x.double())[..., None, None] for x in (alpha, beta)]
    start, zeros = arguments.get("initial_state"), v.new_zeros(s.N, s.HV, s.K, s.V)
    start = zeros if start is None else start
    d_o, d_final = (torch.zeros_like(v), zeros) if cotangents is None else cotangents
    tokens = [q, k, v.unsqueeze(-2), *gates, d_o.double().unsqueeze(-2)]
    if example.lengths is None:
        yield _Run._make((*tokens, start.double(), d_final.double()))
        return
    ends = itertools.accumulate(example.lengths, initial=0)
    for n, (a, b) in enumerate(itertools.pairwise(ends)):
        states = [x[n : n + 1].double() for x in (start, d_final)]
        yield _Run._make((*(x[:, a:b] for x in tokens), *states))
