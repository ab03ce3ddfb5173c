"""What is split over ranks equals one process: results, final states and all gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdn_ops import GATED_DELTA
from gdn_ops.testing.example import Example, Results
from gdn_ops.testing.oracle import judgement_of
from gdn_ops.testing.runs import installed
from gdn_ops.testing.strategies import calls
from tests.parallel.ranks import Ranks
from tests.parallel.workers import Case, forward_and_gradients

Fragments = tuple[tuple[tuple[int, int], ...], ...]


@st.composite
def fragments(draw: st.DrawFn, tokens: int, ranks: int) -> Fragments:
    """Cut tokens anywhere, and give the runs to ranks in any order; some ranks have none."""
    cuts = draw(st.lists(st.integers(0, tokens), max_size=2 * ranks))
    edges = sorted({0, tokens, *cuts})
    runs = [*itertools.pairwise(edges)]
    runs = draw(st.permutations(runs))
    owners = draw(st.lists(st.integers(0, ranks - 1), min_size=len(runs), max_size=len(runs)))
    return tuple(
        tuple(run for run, owner in zip(runs, owners, strict=True) if owner == rank)
        for rank in range(ranks)
    )


@st.composite
def cases(draw: st.DrawFn, ranks: int, backend: str, strategy: str) -> Case:
    example: Example = draw(calls(GATED_DELTA, installed(backend).limits, max_tokens=40))
    return Case(
        example,
        draw(fragments(example.T, ranks)),
        strategy,
        backend,
        holder=draw(st.integers(0, ranks - 1)),
    )


def assembled(case: Case, parts: list[Results]) -> Results:
    """Return the results of one process, given those of all ranks."""
    found: Results = {}
    for name in parts[0]:
        if name == "final_state":
            assert all(torch.equal(part[name], parts[0][name]) for part in parts)
            found[name] = parts[0][name]
        elif name == "d_initial_state":
            found[name] = sum_of([part[name] for part in parts])
        else:
            found[name] = rejoined(case, [part[name] for part in parts])
    return found


def sum_of(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)


def rejoined(case: Case, parts: list[Tensor]) -> Tensor:
    """Return the tokens of all ranks in the order of the sequences."""
    shape = (parts[0].shape[0], case.example.T, *parts[0].shape[2:])
    whole = torch.full(shape, float("nan"), dtype=parts[0].dtype)
    for runs, part in zip(case.fragments, parts, strict=True):
        done = 0
        for start, stop in runs:
            whole[:, start:stop] = part[:, done : done + stop - start]
            done += stop - start
        assert done == part.shape[1]
    return whole


def judged(case: Case, found: Results, most: float = 1.0) -> None:
    """Check results against those of one process in float64, by the band of one call."""
    example = case.example
    verdict = judgement_of(example.arguments(), example.cotangents(), example)
    worst = verdict.compare(found, verdict.reference, most)
    assert worst.worst <= 1, (worst, case)


@pytest.mark.parametrize("strategy", ["pipeline", "gather"])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_a_split_call_equals_that_of_one_process(
    ranks: Ranks, count: int, backend: str, strategy: str
) -> None:
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(cases(count, backend, strategy))
    def check(case: Case) -> None:
        judged(case, assembled(case, ranks.run(count, forward_and_gradients, case)))

    check()
