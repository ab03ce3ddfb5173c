"""Ranks that disagree, have errors or end are named on every rank, in exact words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.parallel.ranks import Ranks
from tests.parallel.workers import (
    call_with,
    die,
    enter_with,
    fail_inside,
    layer_with,
    make_split,
    raised,
    second_derivative,
)

SPLITS: dict[str, tuple[Any, Any, str]] = {
    "ranks": (
        [[(0, 4)]],
        None,
        "SpecError: SequenceSplit: fragments are of 1 ranks, should be of 2",
    ),
    "a hole": (
        [[(0, 3)], [(5, 8)]],
        None,
        "SpecError: SequenceSplit: tokens 3 to 5 are on no rank, should be on one",
    ),
    "the first token": (
        [[(1, 3)], []],
        None,
        "SpecError: SequenceSplit: tokens 0 to 1 are on no rank, should be on one",
    ),
    "an overlap": (
        [[(0, 5)], [(3, 8)]],
        None,
        "SpecError: SequenceSplit: tokens 3 to 5 are on ranks 0 and 1, should be on one",
    ),
    "twice on a rank": (
        [[(0, 5), (2, 4)], [(5, 8)]],
        None,
        "SpecError: SequenceSplit: tokens 2 to 4 are on rank 0 twice, should be on one",
    ),
    "backward": (
        [[(3, 0)], [(3, 8)]],
        None,
        "SpecError: SequenceSplit: rank 0 has the fragment (3, 0), should have start <= stop",
    ),
    "negative": (
        [[(-1, 4)], []],
        None,
        "SpecError: SequenceSplit: a start is -1, should be at least 0",
    ),
    "float": (
        [[(0, 4.5)], []],
        None,
        "SpecTypeError: SequenceSplit: a stop is 4.5, should be an integer",
    ),
    "boundaries that fall": (
        [[(0, 4)], [(4, 8)]],
        [0, 5, 3, 8],
        "SpecError: SequenceSplit: cu_seqlens is [0, 5, 3, 8], should rise from 0 to T=8",
    ),
    "boundaries of others": (
        [[(0, 4)], [(4, 8)]],
        [0, 7],
        "SpecError: SequenceSplit: cu_seqlens is [0, 7], should rise from 0 to T=8",
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_that_is_none_is_refused(ranks: Ranks, name: str) -> None:
    fragments, cuts, expected = SPLITS[name]
    assert ranks.run(2, raised, make_split, fragments, cuts) == [expected] * 2


NAME = "gdn_ops.parallel.gated_delta"

DISAGREEMENTS: dict[str, tuple[dict[int, dict[str, Any]], str]] = {
    "rule": (
        {2: {"rule": "delta"}},
        "ranks disagree: rule is gated_delta on rank 0, delta on rank 2",
    ),
    "scale": ({1: {"scale": 2.0}}, "ranks disagree: scale is 0.5 on rank 0, 2.0 on rank 1"),
    "tokens": (
        {1: {"tokens": 9}},
        "ranks disagree: split is SequenceSplit(6 tokens; rank 0: 0-2, rank 1: 2-4, rank 2: 4-6) "
        "on rank 0, SequenceSplit(9 tokens; rank 0: 0-3, rank 1: 3-6, rank 2: 6-9) on rank 1",
    ),
    "strategy": (
        {1: {"strategy": "gather"}},
        "ranks disagree: strategy is auto on rank 0, gather on rank 1",
    ),
    "state": (
        {0: {"state": (1, 2, 4, 3)}},
        "ranks disagree: initial_state is float32 on rank 0, not given on rank 1",
    ),
    "gradients": (
        {1: {"grad": True}},
        "ranks disagree: whether gradients are needed is False on rank 0, True on rank 1",
    ),
    "return_state": (
        {1: {"return_state": True}},
        "ranks disagree: return_state is False on rank 0, True on rank 1",
    ),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_disagree_are_named_on_every_rank(ranks: Ranks, name: str) -> None:
    changes, expected = DISAGREEMENTS[name]
    found = ranks.run(3, raised, call_with, changes)
    assert found == [f"ParallelError: {NAME}: {expected}"] * 3


def test_dtypes_that_differ_are_named(ranks: Ranks) -> None:
    import torch

    found = ranks.run(3, raised, call_with, {1: {"dtype": torch.bfloat16}})
    text = "ranks disagree: the dtype of q is float32 on rank 0, bfloat16 on rank 1"
    assert found == [f"ParallelError: {NAME}: {text}"] * 3


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "tokens of another rank": (
        {"local": 3},
        "SpecError: gdn_ops.parallel.gated_delta: q has T=3 tokens, should have 2: those of rank 1 "
        "in SequenceSplit(6 tokens; rank 0: 0-2, rank 1: 2-4, rank 2: 4-6)",
    ),
    "state": (
        {"state": (2, 2, 4, 3)},
        "SpecError: gated_delta: initial_state has shape (2, 2, 4, 3), should be (N, HV, K, V) = "
        "(1, 2, 4, 3)",
    ),
    "backend": ({"backend": "none"}, "SpecError: "),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_one_rank_is_raised_by_all(ranks: Ranks, name: str) -> None:
    change, expected = ERRORS[name]
    first, own, last = ranks.run(3, raised, call_with, {1: change})
    assert own.startswith(expected)
    assert first == last == f"ParallelError: rank 1: {own}"


def test_arguments_with_wrong_values_are_refused(ranks: Ranks) -> None:
    known = "auto, pipeline, gather"
    assert ranks.run(2, raised, enter_with, {"strategy": "ring"}) == [
        f"SpecError: sequence_parallel: strategy is 'ring', should be one of {known}"
    ] * 2  # fmt: skip
    assert ranks.run(2, raised, enter_with, {"split": 3}) == [
        "SpecTypeError: sequence_parallel: split is a int, should be a SequenceSplit"
    ] * 2  # fmt: skip
    both = {r: {"strategy": "ring"} for r in range(2)}
    assert ranks.run(2, raised, call_with, both) == [
        f"SpecError: {NAME}: strategy is 'ring', should be one of {known}"
    ] * 2  # fmt: skip


def test_second_derivatives_are_refused(ranks: Ranks) -> None:
    text = f"RuntimeError: second derivatives of {NAME} are not computed: run it on one process"
    assert ranks.run(2, raised, second_derivative) == [text] * 2


OF_SPLIT = "rank 0 in SequenceSplit(6 tokens; rank 0: 0-3, rank 1: 3-6)"

LAYERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "state": (
        "G",
        {"state": True},
        "GatedDeltaNet: state is given, should be None under sequence_parallel",
    ),
    "mask": (
        "G",
        {"mask": True},
        "GatedDeltaNet: mask is given, should be None under sequence_parallel",
    ),
    "ring": (
        "A",
        {"state": True},
        "SlidingWindowAttention: state is given, should be None under sequence_parallel",
    ),
    "all tokens": (
        "G",
        {"tokens": 6},
        f"GatedDeltaNet: x has T=6 tokens, should have 3: those of {OF_SPLIT}",
    ),
    "rows": (
        "A",
        {"rows": 2, "cuts": [0, 2, 6]},
        "SlidingWindowAttention: x has B=2 rows, should be 1: sequences are packed",
    ),
    "packed ring": (
        "A",
        {"cuts": [0, 2, 6], "return_state": True},
        "SlidingWindowAttention: return_state is True with packed sequences, should be False: its "
        "state counts the tokens of all rows at once",
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_refuses_what_the_split_says_already(ranks: Ranks, name: str) -> None:
    kind, given, expected = LAYERS[name]
    first, second = ranks.run(2, raised, layer_with, kind, given)
    assert first == f"SpecError: {expected}"
    assert second.startswith("SpecError: ")


@pytest.fixture
def three() -> Iterator[Ranks]:
    """Start ranks that may end, with little patience."""
    started = Ranks(3, patience=8)
    yield started
    started.close()


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_rank_that_ends_is_named_by_the_others(three: Ranks, when: str) -> None:
    answers = three.try_run(3, die, 1, when)
    pid = three.processes[1].pid
    for rank in (0, 2):
        seconds, text = answers[rank].split(" ", 1)
        assert float(seconds) < 8 + 4
        assert re.match(rf"ParallelError: rank {rank}: exchange of .* failed: ", text)
        assert text.endswith(f"; rank 1 has ended (process {pid})"), text


@pytest.mark.parametrize("strategy", ["pipeline", "gather"])
def test_an_error_in_the_middle_of_a_call_reaches_the_others(three: Ranks, strategy: str) -> None:
    first, second, third = three.try_run(3, fail_inside, 0, strategy)
    assert first == "MemoryError: no memory for o"
    for text in (second, third):
        assert text.endswith("; rank 0 failed: MemoryError: no memory for o"), text
