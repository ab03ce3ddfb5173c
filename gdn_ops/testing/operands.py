"""Measure the terms of the results of a call, whose roundings stay where they cancel."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn_ops.call.numerics import inverse_norm
from gdn_ops.spec.ops import GATED_DELTA
from gdn_ops.testing.example import Example, Results

Cotangents = tuple[Tensor, Tensor]


class _Run(NamedTuple):
    """Hold sequences of one length in float64, heads repeated and gates ready to be multiplied.

    Attributes:
        q, k: (N, T, HV, K, 1), normalised where the call asks for it, q with its scale.
        v, d_o: (N, T, HV, 1, V).
        alpha: (N, T, HV, 1, 1), or (N, T, HV, K, 1) of channels.
        erase: (N, T, HV, 1, 1), or (N, T, HV, K, 1) of channels; 0 for a rule that does not.
        write: (N, T, HV, 1, 1), or (N, T, HV, 1, V) of channels.
        start, d_final: (N, HV, K, V).
        has_erase: 1.0 for a rule that erases, else 0.0.
        chunk: tokens of a chunk.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor
    erase: Tensor
    write: Tensor
    d_o: Tensor
    start: Tensor
    d_final: Tensor
    has_erase: float
    chunk: int


class _Token(NamedTuple):
    """Hold what the forward of a token leaves to its backward, each with what it is made of.

    Attributes:
        before, all_before: the state before the token and the sum of what was written to it.
        u, u_terms: w v - S^T (e k) and the root of the sum of squares of its terms.
        error, error_terms: v - S^T k, which beta multiplies, likewise.
        all_after: the sum of what was written to the state after the token.
    """

    before: Tensor
    all_before: Tensor
    u: Tensor
    u_terms: Tensor
    error: Tensor
    error_terms: Tensor
    all_after: Tensor


def operand_sizes(
    arguments: dict[str, Any], cotangents: Cotangents | None, example: Example, chunk: int
) -> Results:
    """Return, for each result, its norm if its terms did not cancel.

    Backends add up a chunk's writes to the state as a matrix product, and a write that a later one
    takes off again leaves its rounding. So the terms of a state are all that was written to it, as
    far as it has decayed: in the notation of docs/math.md §2 and element by element A_T, where
    A_0 = |S_0| and A_t = alpha_t A_{t-1} + |k_t u_t^T|. The same holds along the gradient of the
    state (§5), where a chunk takes off W^T dU, with a dU of which nothing is taken off yet.
    Roundings of alike writes are alike, and add up by their sizes. Every other result is a sum of
    products with elements of states, whose roundings are independent: it gets the root of the sum
    of squares of its terms, with A for the state.

    Args:
        arguments: of a call.
        cotangents: of o and of the final state, or None for no gradients.
        example: what the call was made from.
        chunk: tokens of the longest chunk that a backend may form.

    Returns:
        float64, the shape of each result: "o", "final_state" and, with cotangents, every gradient.
    """
    runs = list(_runs(arguments, cotangents, example, chunk))
    if not runs:
        return {}
    sizes: dict[str, list[Tensor]] = {}
    for run in runs:
        tokens, results = _forward(run)
        if cotangents is not None:
            results |= _backward(run, tokens)
        for name, x in results.items():
            sizes.setdefault(name, []).append(x)
    joined = {
        name: torch.cat(parts, 0 if name.endswith("state") else 1) for name, parts in sizes.items()
    }
    return _as_given(joined, arguments, example)


def _forward(x: _Run) -> tuple[list[_Token], Results]:
    state, written, o, tokens = x.start, x.start.abs(), [], []
    for t in range(x.k.shape[1]):
        k, alpha = x.k[:, t], x.alpha[:, t]
        u = _difference(x.write[:, t] * x.v[:, t], x.erase[:, t] * alpha * k, state, written)
        error = _difference(x.v[:, t], x.has_erase * alpha * k, state, written)
        write = k * u[0]
        before, all_before = state, written
        state, written = alpha * state + write, alpha * written + write.abs()
        o.append(torch.sqrt((written * x.q[:, t]).square().sum(-2)))
        tokens.append(_Token(before, all_before, *u, *error, written))
    empty = x.v.squeeze(-2)
    return tokens, {"o": torch.stack(o, 1) if o else empty, "final_state": written}


def _difference(v: Tensor, read: Tensor, state: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    """Return v - S^T read, and the root of the sum of squares of its terms."""
    terms = torch.sqrt(v.square() + (written * read).square().sum(-2, keepdim=True))
    return v - (state * read).sum(-2, keepdim=True), terms


def _backward(x: _Run, tokens: list[_Token]) -> Results:
    d_state, written = x.d_final, x.d_final.abs()
    unerased = d_state
    grads: dict[str, list[Tensor]] = {f"d_{name}": [] for name in _DIFFERENTIABLE}
    for t, token in reversed(list(enumerate(tokens))):
        k, alpha, d_o, v = x.k[:, t], x.alpha[:, t], x.d_o[:, t], x.v[:, t]
        e, w = x.erase[:, t], x.write[:, t]
        write = x.q[:, t] * d_o
        if (t + 1) % x.chunk == 0:
            unerased = d_state
        d_state, unerased, written = d_state + write, unerased + write, written + write.abs()
        d_u = (d_state * k).sum(-2, keepdim=True)
        d_u_terms = torch.sqrt((written * k).square().sum(-2, keepdim=True))
        grads["d_q"].append(torch.sqrt((token.all_after * d_o).square().sum(-1)))
        grads["d_v"].append((w * d_u_terms).squeeze(-2))
        grads["d_write"].append(_root_of_squares(v * d_u_terms, w))
        d_beta = (token.error_terms * d_u).square() + (token.error * d_u_terms).square()
        grads["d_beta"].append(torch.sqrt(d_beta.sum((-2, -1))))
        read = (alpha * token.all_before * d_u).square()
        read = torch.sqrt(read + (alpha * token.before * d_u_terms).square())
        grads["d_erase"].append(_root_of_squares(k * read, e))
        d_k = (written * token.u).square() + (d_state * token.u_terms).square()
        d_k = d_k + (e * read).square()
        grads["d_k"].append(torch.sqrt(d_k.sum(-1)))
        d_u_whole = (unerased * k).sum(-2, keepdim=True)
        erase = e * k
        d_state = d_state - erase * d_u
        written = written + erase.abs() * torch.maximum(d_u.abs(), d_u_whole.abs())
        d_alpha = (token.before * written).square() + (token.all_before * d_state).square()
        grads["d_alpha"].append(_root_of_squares(torch.sqrt(d_alpha), alpha))
        d_state, unerased, written = alpha * d_state, alpha * unerased, alpha * written
    shapes = {"d_q": x.q.squeeze(-1), "d_k": x.k.squeeze(-1), "d_v": x.v.squeeze(-2)}
    shapes |= {"d_alpha": x.alpha, "d_erase": x.erase, "d_write": x.write}
    shapes |= {"d_beta": x.write[..., 0, 0]}
    stacked = {n: torch.stack(g[::-1], 1) if g else shapes[n] for n, g in grads.items()}
    return stacked | {"d_initial_state": written}


_DIFFERENTIABLE = ("q", "k", "v", "alpha", "beta", "erase", "write")


def _root_of_squares(terms: Tensor, like: Tensor) -> Tensor:
    """Return the root of the sum of squares over the axes in which a gate has one number."""
    return torch.sqrt(terms.square().sum_to_size(like.shape))


def _as_given(sizes: Results, arguments: dict[str, Any], example: Example) -> Results:
    """Return the sizes for the tensors that were given, from those for what they stand for."""
    if "d_q" not in sizes:
        return sizes
    heads = example.sizes
    for name in ("q", "k"):
        per_head = sizes[f"d_{name}"].unflatten(2, (heads.H, heads.R))
        size = torch.sqrt(per_head.square().sum(3))
        if name == "q":
            size = size * abs(_scale(example))
        if example.qk_l2norm:
            wide = arguments[name].double()
            inverse = inverse_norm(wide)
            unit = wide * inverse
            along = torch.sqrt((unit * size).square().sum(-1, keepdim=True))
            size = (size + unit.abs() * along) * inverse
        sizes[f"d_{name}"] = size
    for name in ("alpha", "erase", "write"):
        given = arguments.get("log_alpha" if name == "alpha" and example.log_gate else name)
        if given is not None:
            sizes[f"d_{name}"] = sizes[f"d_{name}"].view(given.shape)
    if arguments.get("log_alpha") is not None:
        sizes["d_log_alpha"] = sizes["d_alpha"] * arguments["log_alpha"].double().exp()
    return sizes


def _runs(
    arguments: dict[str, Any], cotangents: Cotangents | None, example: Example, chunk: int
) -> Iterator[_Run]:
    """Yield a batch as one run, packed sequences as a run each."""
    s, v = example.sizes, arguments["v"].double()
    q, k = (arguments[name].double() for name in ("q", "k"))
    if example.qk_l2norm:
        q, k = (x * inverse_norm(x) for x in (q, k))
    q, k = (x.repeat_interleave(s.R, 2).unsqueeze(-1) for x in (q, k))
    alpha, beta = arguments.get("alpha"), arguments.get("beta")
    erase, write = arguments.get("erase", beta), arguments.get("write", beta)
    if arguments.get("log_alpha") is not None:
        alpha = arguments["log_alpha"].double().exp()
    ones, has_erase = v.new_ones(s.B, s.T, s.HV), GATED_DELTA.rule[example.rule].has_erase
    gates = [ones if x is None else x.double() for x in (alpha, erase, write)]
    gates = [x if x.dim() == 4 else x[..., None] for x in gates]
    gates = [gates[0][..., None], has_erase * gates[1][..., None], gates[2].unsqueeze(-2)]
    start, zeros = arguments.get("initial_state"), v.new_zeros(s.N, s.HV, s.K, s.V)
    start = zeros if start is None else start
    d_o, d_final = (torch.zeros_like(v), zeros) if cotangents is None else cotangents
    tokens = [q * _scale(example), k, v.unsqueeze(-2), *gates, d_o.double().unsqueeze(-2)]
    last = (float(has_erase), chunk)
    if example.lengths is None:
        yield _Run._make((*tokens, start.double(), d_final.double(), *last))
        return
    ends = itertools.accumulate(example.lengths, initial=0)
    for n, (a, b) in enumerate(itertools.pairwise(ends)):
        states = [x[n : n + 1].double() for x in (start, d_final)]
        yield _Run._make((*(x[:, a:b] for x in tokens), *states, *last))


def _scale(example: Example) -> float:
    return example.K**-0.5 if example.scale is None else example.scale
