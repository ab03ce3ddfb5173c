"""Sequences that ranks gather summaries of, by a backend with stages, equal one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from gdn_ops.testing.example import Example
from tests.parallel.ranks import Ranks
from tests.parallel.test_sequence import assembled, cases, judged
from tests.parallel.workers import Case, forward_and_gradients, launches

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
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_runs_between_others_are_summarised_and_resumed(slow_ranks: Ranks, name: str) -> None:
    case = SPLITS[name]
    first, second = (slow_ranks.run(3, forward_and_gradients, case) for _ in range(2))
    judged(case, assembled(case, first))
    for x, y in zip(first, second, strict=True):
        assert all(torch.equal(x[key], y[key]) for key in x)


def test_nothing_but_walks_is_launched_twice(slow_ranks: Ranks) -> None:
    first, between, last = slow_ranks.run(3, launches, SPLITS["three runs"])
    gradients = ["walk_back", "token_gradients"]
    assert first == ["prepare", "walk", *gradients]
    assert between == last == ["prepare", "walk", "walk", "walk_back", *gradients]
    case = SPLITS["three runs"]
    alone = replace(case, fragments=(((0, 70),), (), ()))
    assert slow_ranks.run(3, launches, alone) == [first, [], []]
