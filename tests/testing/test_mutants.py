"""The kit catches every classic mistake, in every backend that it is planted in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from gdn_ops.dispatch.backend import is_missing
from gdn_ops.dispatch.registry import register_backend, unregister_backend
from gdn_ops.spec.rules import Limits, Width
from gdn_ops.testing.conformance import Subject, run_subject, subjects
from gdn_ops.testing.mutants import (
    CALL_MUTATIONS,
    DECODE_MUTATIONS,
    MUTATIONS,
    SEQUENCE_MUTATIONS,
    can_show,
    mutant,
    unguarded,
)
from gdn_ops.testing.runs import installed

BACKENDS = ("naive", "torch", "cpp", *(["tilelang"] if not is_missing("tilelang") else []))

EXAMPLES = 200
"""Drawn calls per subject, at most: the rarest mistake shows in one of twenty, and what is drawn
changes with every number that any module of the package contains."""

pytestmark = pytest.mark.filterwarnings("ignore:backend '.*' emulates its kernels")


PAIRS = [(m, b) for m in MUTATIONS for b in BACKENDS if can_show(m, installed(b).limits)]


@pytest.fixture(params=PAIRS, ids="-".join)
def planted(request: pytest.FixtureRequest) -> Iterator[str]:
    mutation, base = request.param
    cls = register_backend(mutant(mutation, base))
    with unguarded(mutation):
        yield cls.name
    unregister_backend(cls.name)


def telling_subjects(planted: str) -> list[Subject]:
    """Return the subjects that have to catch a mutant: two, not every law that happens to.

    A mistake in what is read of a call has to show in sequences, where they take such calls.
    """
    mutation, limits = planted.partition("_in_")[0], installed(planted).limits
    of_sequences = mutation in CALL_MUTATIONS and can_show(mutation, limits.of(decode=False))
    if mutation in SEQUENCE_MUTATIONS or of_sequences:
        return list(subjects(installed(planted))[:2])
    return decode_subjects(planted)


def decode_subjects(planted: str) -> list[Subject]:
    its_subjects = subjects(installed(planted))
    return [subject for subject in its_subjects if subject.law and subject.law.draws_decode]


def test_a_mutant_is_caught_with_the_call_that_shows_it(planted: str) -> None:
    for subject in telling_subjects(planted):
        row = run_subject(planted, subject, examples=EXAMPLES, shrink=False)
        if not row.passed:
            assert row.failure is not None
            assert "WRONG" in row.failure, "a mutant must fail by its numbers, not by an error"
            assert "Example(" in row.failure and planted in row.failure
            return
    pytest.fail(f"{planted} passed {row.examples} examples, but should be caught")


@pytest.mark.parametrize("planted", [("dropped_scale", "torch")], indirect=True, ids=["sequence"])
def test_a_mutant_of_one_kind_does_the_other_kind_right(planted: str) -> None:
    rows = [run_subject(planted, subject, examples=10) for subject in decode_subjects(planted)]
    assert [row.passed for row in rows] == [True] * 4


def test_the_list_of_mutants_is_the_one_that_is_promised() -> None:
    assert set(MUTATIONS) == {
        "dropped_scale",
        "decay_after_the_error",
        "ungated_inverse",
        "first_chunk_only",
        "one_wrong_head_of_sixteen",
        "no_gradient_at_zero",
        "tiled_heads",
        "state_of_the_padded_tail",
        "narrow_products",
        "half_states_of_chunks",
        "normalised_values",
        "skipped_rows_run",
        "states_before_each_token",
        "a_copied_pool",
        "flushed_decays",
        "states_in_order_of_memory",
        "inputs_read_late",
        "an_overlap_is_allowed",
        "one_decay_for_all_channels",
        "erase_and_write_swapped",
    }
    assert set(MUTATIONS) == {*SEQUENCE_MUTATIONS, *DECODE_MUTATIONS, *CALL_MUTATIONS}


def test_a_mistake_is_planted_where_any_op_takes_calls_that_show_it() -> None:
    narrow = Limits(devices=("cpu",))
    widths: tuple[Width, ...] = ("none", "scalar", "channel")
    decoded = replace(narrow, decode_decays=widths, decode_apart=True)
    for mutation in CALL_MUTATIONS:
        assert not can_show(mutation, narrow)
        assert can_show(mutation, decoded) and can_show(mutation, decoded.of(decode=True))
        assert not can_show(mutation, decoded.of(decode=False))
    assert all(can_show(mutation, narrow) for mutation in (*SEQUENCE_MUTATIONS, *DECODE_MUTATIONS))


IN_TORCH = [(m, "torch") for m in CALL_MUTATIONS]


@pytest.mark.parametrize("planted", IN_TORCH, indirect=True, ids="-".join)
def test_a_mistake_in_what_is_read_shows_in_decode_ops_too(planted: str) -> None:
    rows = [
        run_subject(planted, subject, examples=EXAMPLES, shrink=False)
        for subject in decode_subjects(planted)
        if "one step after another" in subject.name
    ]
    assert [row.passed for row in rows] == [False]
    assert rows[0].failure is not None and "WRONG" in rows[0].failure
