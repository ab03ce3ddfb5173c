"""Trips of loops are known where the source says so, and where the machine code can be matched."""

from __future__ import annotations

from typing import Any

import pytest

from gdn_ops.aot.machine_code import Code, Counts, Loop
from gdn_ops.aot.source_loops import SourceLoop, trips_of

PLAIN, PRODUCT = Counts(instructions=10), Counts(instructions=10, matrix=2)


def code(*parents: int, waits: tuple[int, ...] = (), own: Counts = PLAIN) -> Code:
    """Return code whose loops have these parents."""
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    pairs = enumerate(zip(parents, depths, strict=True))
    return Code(PLAIN, tuple(Loop(parent, depth, i in waits, own) for i, (parent, depth) in pairs))


def chunks(trips: int, *inner: SourceLoop) -> SourceLoop:
    return SourceLoop("chunks", trips, inner)


def kept(trips: int, *inner: SourceLoop) -> SourceLoop:
    return SourceLoop("sequences", trips, inner, is_kept=True)


def heads(trips: int, *inner: SourceLoop) -> SourceLoop:
    return SourceLoop("heads", trips, inner, is_constant=True)


@pytest.mark.parametrize(
    ("found", "source", "trips"),
    [
        # Each loop of the source is there.
        (code(-1), [chunks(128)], {0: 128}),
        (code(-1, 0, -1), [heads(4, heads(2)), chunks(7)], {0: 4, 1: 2, 2: 7}),
        (code(), [], {}),
        # One that waits is not in the source.
        (code(-1, 0, waits=(1,)), [chunks(128)], {0: 128}),
        # Constant ones are unrolled, from the inside out.
        (code(), [heads(2)], {}),
        (code(-1), [heads(4, heads(2))], {0: 4}),
        (code(-1, -1), [heads(4, heads(2)), heads(4, heads(2))], {0: 4, 1: 4}),
        (code(-1), [chunks(128, heads(2))], {0: 128}),
        # One of a single trip is dropped, whatever is in it.
        (code(-1), [chunks(1, chunks(9))], {0: 9}),
        (code(-1, 0), [chunks(1, chunks(9))], {0: 1, 1: 9}),
        (code(-1), [chunks(9, chunks(1))], {0: 9}),
        # Two ways that agree.
        (code(-1), [heads(2), heads(2)], {0: 2}),
        # Two that do not, and none.
        (code(-1), [heads(2), heads(4)], None),
        (code(-1), [chunks(1, heads(4))], None),
        # But for one that is kept.
        (code(-1), [kept(1, heads(4))], {0: 1}),
        (code(-1, 0), [kept(1, heads(4))], {0: 1, 1: 4}),
        (code(), [kept(1)], None),
        # A constant of 1 is always dropped.
        (code(-1, -1), [heads(1, heads(4)), heads(1, heads(4))], {0: 4, 1: 4}),
        (code(-1), [heads(1)], None),
        (code(-1, -1), [chunks(128)], None),
        (code(-1, 0), [chunks(128)], None),
        (code(), [chunks(128)], None),
        # Nothing is said, or the flow is not understood.
        (code(-1), None, None),
        (Code(PLAIN, (), 1), [], None),
        # A warp that computes never runs the loops of those that copy; these multiply nothing.
        (code(-1, -1), [chunks(5), chunks(0)], {0: 5, 1: 0}),
        (code(-1, own=PRODUCT), [chunks(0)], None),
        # But for one that may rest.
        (code(-1, own=PRODUCT), [SourceLoop("cuts", 0, may_rest=True)], {0: 0}),
        # Ignore which of the loops inside is left.
        (
            code(-1, 0),
            [SourceLoop("cuts", 0, (heads(2), heads(4)), may_rest=True)],
            {0: 0, 1: 0},
        ),
    ],
)
def test_trips_are_those_of_the_source_or_unknown(
    found: Code, source: Any, trips: dict[int, int] | None
) -> None:
    assert trips_of(found, source) == trips


def test_loops_that_copy_may_stand_before_those_that_compute() -> None:
    own, copied = chunks(5), chunks(0)
    code_of = (Loop(-1, 0, False, PLAIN), Loop(-1, 0, False, PRODUCT))
    found = Code(PLAIN, code_of)
    assert trips_of(found, [own, copied]) is None
    assert trips_of(found, [own, copied], [copied, own]) == {0: 0, 1: 5}
    # Refuse both orders where nothing tells them apart.
    assert trips_of(code(-1, -1), [own, copied], [copied, own]) is None
