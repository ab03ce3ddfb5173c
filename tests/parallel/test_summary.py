"""Summaries of runs give the final states of runs, with their gradients, and compose."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdn_ops import GATED_DELTA, Limits, SpecTypeError
from gdn_ops.parallel import Summary, compose, gated_delta_summary
from gdn_ops.testing.example import Example, Results
from gdn_ops.testing.oracle import judgement_of
from gdn_ops.testing.runs import installed, token_slice
from gdn_ops.testing.strategies import calls
from tests.errors import message_of, refusal

pytestmark = pytest.mark.filterwarnings("ignore:.*emulates its kernels")

BACKENDS = ("naive", "torch", "cpp", "triton")
GATES = ("alpha", "beta", "log_alpha")


def limits(backend: str) -> Limits:
    return installed(backend).limits


def summary_of(arguments: dict[str, Any], backend: str) -> Summary:
    """Summarise the tokens of a call of `gated_delta`."""
    left_out = ("q", "scale", "initial_state")
    given_ = {name: x for name, x in arguments.items() if name not in left_out}
    return gated_delta_summary(**given_, backend=backend)


def by_summary(arguments: dict[str, Any], backend: str, d_state: Tensor) -> Results:
    """Return the final state by a summary, and the gradients of k, v, gates and initial state."""
    names = ("k", "v", *GATES, "initial_state")
    inputs = {n: arguments[n].detach().requires_grad_() for n in names if n in arguments}
    arguments = arguments | inputs
    state = summary_of(arguments, backend).final_state(arguments["initial_state"])
    gradients = torch.autograd.grad(
        state, list(inputs.values()), d_state.to(state.dtype), allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip
    found = {f"d_{n}": g.detach() for n, g in zip(inputs, gradients, strict=True)}
    return {"final_state": state.detach()} | found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_summary_gives_the_final_state_and_its_gradients(backend: str) -> None:
    drawn = calls(GATED_DELTA, limits(backend), max_tokens=40)

    @settings(max_examples=6 if backend == "triton" else 40, deadline=None)
    @given(drawn)
    def check(example: Example) -> None:
        example = replace(example, initial_state=True)
        arguments, (d_o, d_state) = example.arguments(), example.cotangents()
        cotangents = torch.zeros_like(d_o), d_state
        found = by_summary(arguments, backend, d_state)
        # Two results are added, each with its own rounding.
        verdict = judgement_of(arguments, cotangents, example)
        worst = verdict.compare(found, verdict.reference, 3.0)
        assert worst.worst <= 1, (worst, example)

    check()


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_summaries_of_parts_compose_to_that_of_the_whole(backend: str) -> None:
    @settings(max_examples=40, deadline=None)
    @given(calls(GATED_DELTA, limits(backend), max_tokens=70, varlen=False), st.data())
    def check(example: Example, data: Any) -> None:
        example = replace(example, initial_state=True)
        arguments = example.arguments()
        cuts = sorted(data.draw(st.lists(st.integers(0, example.T), max_size=3)))
        ends = [0, *cuts, example.T]
        parts = [
            summary_of(token_slice(arguments, slice(a, b)), backend)
            for a, b in itertools.pairwise(ends)
        ]
        found = functools.reduce(compose, parts).final_state(arguments["initial_state"])
        verdict = judgement_of(arguments, None, example)
        # Each part adds its own rounding.
        got, factor = {"final_state": found}, 2.0 + len(parts)
        worst = verdict.compare(got, {"final_state": verdict.reference["final_state"]}, factor)
        assert worst.worst <= 1, (worst, example)

    check()


def example_of(rule: str = "gated_delta", **changes: Any) -> dict[str, Any]:
    example = Example(rule=rule, T=24, B=2, H=2, R=2, K=8, V=6, dtype="float64")
    return replace(example, **changes).arguments()


def test_the_order_of_runs_matters() -> None:
    arguments = example_of(gate="slow")
    parts = [summary_of(token_slice(arguments, t), "torch") for t in (slice(9), slice(9, None))]
    whole, turned = summary_of(arguments, "torch"), compose(*reversed(parts))
    torch.testing.assert_close(tuple(compose(*parts)), tuple(whole))
    assert not torch.allclose(turned.M, whole.M) and not torch.allclose(turned.R, whole.R)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decay_of_zero_ends_every_influence_exactly(backend: str) -> None:
    arguments = example_of(dtype="float32")
    arguments["alpha"][:, 10] = 0.0
    M, R = summary_of(arguments, backend)
    assert not M.any()
    rest = summary_of(token_slice(arguments, slice(10, None)), backend)
    torch.testing.assert_close(R, rest.R)
    first = Summary(torch.full_like(M, 1e30), torch.full_like(R, 1e30))
    assert torch.equal(compose(first, Summary(M, R)).R, R)


@pytest.mark.parametrize(
    ("rule", "width"), [("gated_delta", 8), ("delta", 8), ("gated", 1), ("linear", 1)]
)
def test_a_rule_without_an_error_term_has_a_number_for_a_map(rule: str, width: int) -> None:
    arguments = example_of(rule)
    M, R = summary_of(arguments, "torch")
    assert M.shape == (2, 4, width, width) and R.shape == (2, 4, 8, 6)
    if rule == "gated":
        torch.testing.assert_close(M[..., 0, 0], arguments["alpha"].double().prod(1))
    if rule == "linear":
        assert torch.equal(M, torch.ones_like(M))


def test_a_map_that_is_a_number_composes_with_a_matrix() -> None:
    gated, delta = (summary_of(example_of(rule), "torch") for rule in ("gated", "delta"))
    state = torch.randn(2, 4, 8, 6, dtype=torch.float64)
    for first, second in ((gated, delta), (delta, gated)):
        expected = second.final_state(first.final_state(state))
        torch.testing.assert_close(compose(first, second).final_state(state), expected)


def test_packed_sequences_have_a_summary_each() -> None:
    arguments = example_of(B=1, T=20, lengths=(7, 0, 13))
    M, R = summary_of(arguments, "torch")
    del arguments["cu_seqlens"]
    for n, t in enumerate((slice(0, 7), slice(7, 7), slice(7, 20))):
        alone = summary_of(token_slice(arguments, t), "torch")
        torch.testing.assert_close((M[n : n + 1], R[n : n + 1]), tuple(alone))
    assert torch.equal(M[1], torch.eye(8, dtype=M.dtype).expand_as(M[1])) and not R[1].any()


def test_products_stay_in_float32_under_autocast() -> None:
    summary = summary_of(example_of(dtype="float32"), "torch")
    state = torch.randn(2, 4, 8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = summary.final_state(state), *compose(summary, summary)
    assert all(map(torch.equal, inside, (summary.final_state(state), *compose(summary, summary))))


def test_mistakes_are_named() -> None:
    arguments = example_of()
    k, v, alpha, beta = (arguments[n] for n in ("k", "v", "alpha", "beta"))
    text = refusal(gated_delta_summary, k, v[:, 1:], alpha, beta)
    assert text == (
        "gated_delta_summary: v has shape (2, 23, 4, 6), should be (B, T, HV, V) = (2, 24, 4, 6); "
        "T is fixed by k"
    )
    text = message_of(SpecTypeError, gated_delta_summary, None, v, alpha, beta)
    assert text == "gated_delta_summary: k is None, should be a torch.Tensor"
    summary = gated_delta_summary(k, v, alpha, beta)
    state = torch.zeros(2, 4, 6, 8)
    expected = "final_state: initial_state has shape (2, 4, 6, 8), should be (2, 4, 8, 6)"
    assert refusal(summary.final_state, state) == expected
    other = Summary(summary.M, summary.R[:1])
    assert refusal(compose, summary, other) == (
        "compose: second.R has shape (1, 4, 8, 6), should be that of first.R, (2, 4, 8, 6)"
    )
    narrow = Summary(summary.M.float(), summary.R.float())
    assert refusal(compose, summary, narrow) == (
        "compose: second.R is torch.float32, should be that of first.R, torch.float64"
    )
    text = message_of(SpecTypeError, compose, tuple(summary), summary)
    assert text == "compose: first is a tuple, should be a Summary"
