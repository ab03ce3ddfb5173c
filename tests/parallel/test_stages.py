"""Sequences that ranks gather summaries of, by a backend with stages, equal one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gdn_ops.testing.example import Example
from tests.parallel.mutants import mutated_call
from tests.parallel.ranks import Ranks
from tests.parallel.test_sequence import assembled, cases, judged
from tests.parallel.workers import (
    Case,
    called_as_in_stages,
    forward_and_gradients,
    launches,
    order_of_parts,
    reset_at,
)

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def slow_ranks() -> Iterator[Ranks]:
    """Ranks that wait for each other's emulations."""
    started = Ranks(most=3, patience=100)
    yield started
    started.close()


@pytest.mark.parametrize("count", [2, 3])
def test_a_call_in_stages_equals_that_of_one_process(slow_ranks: Ranks, count: int) -> None:
    @settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(cases(count, "triton", "gather"))
    def check(case: Case) -> None:
        # The results of a part are rounded once more where the next one starts.
        judged(case, assembled(case, slow_ranks.run(count, forward_and_gradients, case)))

    check()


CONTIGUOUS = (((0, 20),), ((20, 47),), ((47, 70),))
ZIGZAG = (((0, 12), (60, 70)), ((12, 25), (47, 60)), ((25, 47),))

SPLITS = {
    "three runs": Case(
        Example(T=70, R=2, K=16, V=24, gate="slow", chunk_size=16, initial_state=True),
        CONTIGUOUS, "gather", "triton",
    ),
    "rows": Case(
        Example(B=2, T=70, K=16, V=8, dtype="bfloat16", chunk_size=16, qk_l2norm=True),
        ZIGZAG, "gather", "triton", holder=1,
    ),
    "zeros in the gate": Case(
        Example(T=70, R=2, K=24, V=16, gate="extreme", beta="wide", initial_state=True, seed=3),
        ZIGZAG, "gather", "triton", holder=2,
    ),
    "packed": Case(
        Example(T=70, lengths=(43, 0, 1, 26), K=16, V=24, chunk_size=16, initial_state=True),
        ZIGZAG, "gather", "triton",
    ),
    "without an error term": Case(
        Example(T=70, K=16, V=24, rule="gated", gate="extreme", chunk_size=16, seed=1),
        CONTIGUOUS, "gather", "triton",
    ),
    "decays of channels": Case(
        Example(
            T=70, R=2, K=24, V=16, gate="extreme", channels=True, chunk_size=16,
            initial_state=True, seed=4,
        ),
        ZIGZAG, "gather", "triton", holder=1,
    ),
    "decays of channels without an error term": Case(
        Example(T=70, K=16, V=24, rule="gated", channels=True, chunk_size=16, seed=5),
        CONTIGUOUS, "gather", "triton",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_runs_between_others_are_summarised_and_resumed(slow_ranks: Ranks, name: str) -> None:
    case = SPLITS[name]
    first, second = (slow_ranks.run(3, forward_and_gradients, case) for _ in range(2))
    judged(case, assembled(case, first))
    for x, y in zip(first, second, strict=True):
        assert all(torch.equal(x[key], y[key]) for key in x)


@pytest.mark.parametrize("has_state", [True, False])
def test_the_first_piece_of_a_sequence_is_run_in_stages(slow_ranks: Ranks, has_state: bool) -> None:
    @settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(cases(2, "triton", "gather"), st.integers(1, 39), st.sampled_from([(0, 1), (1, 0)]))
    def check(case: Case, cut: int, order: tuple[int, int]) -> None:
        example = replace(case.example, T=40, lengths=None, initial_state=has_state)
        runs = ((0, cut),), ((cut, 40),)
        drawn = replace(case, example=example, fragments=tuple(runs[i] for i in order))
        judged(drawn, assembled(drawn, slow_ranks.run(2, forward_and_gradients, drawn)))

    check()


def test_a_final_state_without_what_the_initial_one_adds_is_caught(slow_ranks: Ranks) -> None:
    # M of a first piece is applied on its own rank, to the initial state; two pieces have no other.
    case = replace(SPLITS["three runs"], fragments=(((0, 20),), ((20, 70),)))
    judged(case, assembled(case, slow_ranks.run(2, forward_and_gradients, case)))
    with pytest.raises(AssertionError):
        judged(case, assembled(case, slow_ranks.run(2, mutated_call, "maps dropped", case)))


@pytest.mark.parametrize("token", [3, 6])
@pytest.mark.parametrize("rule", ["gated_delta", "gated"])
def test_a_reset_stops_every_influence_between_stages(
    slow_ranks: Ranks, rule: str, token: int
) -> None:
    # Inside of the first piece, or where the second one starts.
    given = token, 18, rule, "gather"
    first, second = (slow_ranks.run(3, reset_at, *given, seed, "triton") for seed in (0, 1))
    for rank, (one, other) in enumerate(zip(first, second, strict=True)):
        o, state, d_v, d_initial = one
        before = token if rank == 0 else 0
        assert torch.equal(state, other[1])
        assert torch.equal(o[:, before:], other[0][:, before:])
        assert torch.equal(o, other[0]) == (rank > 0)
        # The loss reads what is behind the reset alone.
        assert not bool(d_v[:, :before].any()) and not bool(d_initial.any())
        assert bool(d_v[:, before:].any()) == (before < 6)


# Two sequences that ranks share, one on the second rank alone.
WHOLE = Case(
    Example(T=70, lengths=(30, 20, 20), K=16, V=8, chunk_size=16),
    (((0, 20),), ((20, 60),), ((60, 70),)), "gather", "triton",
)  # fmt: skip


def test_nothing_but_walks_is_launched_twice(slow_ranks: Ranks) -> None:
    gradients = ["walk_back", "token_gradients"]
    staged = ["prepare", "walk", "walk", "walk_back", *gradients]
    assert slow_ranks.run(3, launches, SPLITS["three runs"]) == [staged] * 3
    # In zigzag two pieces share their launches, the first of the sequence and the last among them.
    zigzag = replace(SPLITS["three runs"], fragments=ZIGZAG)
    assert slow_ranks.run(3, launches, zigzag) == [staged] * 3
    alone = replace(SPLITS["three runs"], fragments=(((0, 70),), (), ()))
    assert slow_ranks.run(3, launches, alone) == [["prepare", "walk", *gradients], [], []]


def test_the_first_stage_of_every_piece_is_before_an_exchange(slow_ranks: Ranks) -> None:
    forward = ["summarise", "gather", "resume"]
    backward = ["summarise_gradients", "gather", "resume_gradients"]
    case = SPLITS["three runs"]
    assert slow_ranks.run(3, order_of_parts, case) == [[*forward, *backward]] * 3
    # A sequence that no other rank waits for, behind the exchange where that ends first.
    backward.insert(2, "backward")
    first, between, last = slow_ranks.run(3, order_of_parts, WHOLE)
    assert between == ["forward", *forward, *backward]
    backward.remove("backward")
    assert first == last == [*forward, *backward]


def test_without_stages_the_first_piece_is_run_before_an_exchange(slow_ranks: Ranks) -> None:
    found = slow_ranks.run(3, order_of_parts, replace(SPLITS["three runs"], backend="torch"))
    assert found == [
        ["forward", "gather", "gather", "backward"],
        ["gather", "forward", "backward", "gather", "backward"],
        ["gather", "forward", "backward", "gather"],
    ]


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("name", ["three runs", "rows", "packed"])
def test_a_backend_without_stages_can_make_the_calls_of_one_that_has_them(
    slow_ranks: Ranks, name: str, backend: str
) -> None:
    case = replace(SPLITS[name], backend=backend)
    for has_state in (True, False):
        example = replace(case.example, dtype="float32", chunk_size=None, initial_state=has_state)
        own = replace(case, example=example)
        judged(own, assembled(own, slow_ranks.run(3, called_as_in_stages, own)))
