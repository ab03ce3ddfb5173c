"""Code over its budget fails, and so does code that has none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gdn_ops.aot.budgets import Budget, over_budget
from gdn_ops.aot.machine_code import Code, Counts, Loop
from gdn_ops.aot.results import CompiledKernel, TimedLaunch
from gdn_ops.aot.sampling import REFERENCE

OUTER = Loop(-1, 0, False, Counts(instructions=100, barriers=2, hgmma=3, register_a=3))
INNER = Loop(0, 1, False, Counts(instructions=10, barriers=1, hgmma=4, register_a=1))
CODE = Code(Counts(instructions=1000, barriers=50), (OUTER, INNER))
LAUNCH = TimedLaunch(f"{REFERENCE} inference", "forward", 0, (1,), 0, trips={0: 128, 1: 5})
ROW = CompiledKernel("walk", LAUNCH.sample, "sm_90", programs=2, code=CODE, launches=(LAUNCH,))
KEY = (REFERENCE, "walk", "forward", "sm_90")
EXACT = Budget(instructions=150, barriers=7, register_a=8, programs=2)


def test_a_budget_is_held_by_code_that_has_exactly_as_much() -> None:
    assert over_budget(ROW, {KEY: EXACT}) == ()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"instructions": 149},
            "instructions a trip of the hot loop are 150, should be at most 149",
        ),
        ({"barriers": 6}, "barriers a trip of the hot loop are 7, should be at most 6"),
        ({"register_a": 9}, "HGMMA with A in registers are 8, should be at least 9"),
        ({"programs": 3}, "programs per processor are 2, should be at least 3"),
    ],
)
def test_each_number_of_a_budget_is_held(change: dict[str, int], text: str) -> None:
    assert over_budget(ROW, {KEY: EXACT._replace(**change)}) == (f"forward: {text}",)


def test_spills_of_the_whole_kernel_are_held() -> None:
    spilling = replace(ROW, spills=3)
    text = "forward: spills are 3, should be at most 2"
    assert over_budget(spilling, {KEY: EXACT._replace(spills=2)}) == (text,)
    assert over_budget(spilling, {KEY: EXACT._replace(spills=3)}) == ()


def test_a_kernel_without_a_budget_fails_where_others_have_one() -> None:
    text = "forward: no budget on sm_90, should be in the table of budgets"
    assert over_budget(ROW, {(REFERENCE, "walk", "backward", "sm_90"): EXACT}) == (text,)
    assert over_budget(ROW, {(REFERENCE, "other", "forward", "sm_90"): EXACT}) == (text,)
    # Nothing is held on a target that has no budgets.
    assert over_budget(ROW, {(REFERENCE, "walk", "forward", "sm_80"): EXACT}) == ()
    assert over_budget(ROW, {}) == ()


def test_a_launch_may_have_a_budget_of_its_own() -> None:
    text = "forward: barriers a trip of the hot loop are 7, should be at most 6"
    tight = EXACT._replace(barriers=6)
    assert over_budget(ROW, {KEY: EXACT, (REFERENCE, "walk", "forward 0", "sm_90"): tight}) == (
        text,
    )
    assert over_budget(ROW, {KEY: tight, (REFERENCE, "walk", "forward 0", "sm_90"): EXACT}) == ()
    assert over_budget(ROW, {KEY: tight, (REFERENCE, "walk", "forward 1", "sm_90"): EXACT}) == (
        text,
    )


def test_a_budget_needs_the_trips() -> None:
    unknown = replace(ROW, launches=(replace(LAUNCH, trips=None),))
    text = "forward: the trips of its loops are not known, should be given for a budget"
    assert over_budget(unknown, {KEY: EXACT}) == (text,)


@pytest.mark.parametrize(
    ("change", "count"),
    [({}, 1), ({"sample": f"{REFERENCE} training"}, 1), ({"sample": "rule delta inference"}, 0)],
)
def test_budgets_are_those_of_their_cases(change: dict[str, Any], count: int) -> None:
    launches = (replace(LAUNCH, **change),) * 2
    over = over_budget(replace(ROW, launches=launches), {KEY: EXACT._replace(barriers=0)})
    assert len(over) == count


def test_code_without_a_loop_is_held_as_a_whole() -> None:
    flat = replace(ROW, code=Code(CODE.outside), launches=(replace(LAUNCH, trips={}),))
    text = "forward: instructions a trip of the hot loop are 1000, should be at most 150"
    budget = EXACT._replace(barriers=50, register_a=0)
    assert over_budget(flat, {KEY: budget}) == (text,)


def test_every_case_has_budgets_of_its_own() -> None:
    other = replace(LAUNCH, sample="kimi-32-8192 training")
    row = replace(ROW, launches=(LAUNCH, other))
    tight = EXACT._replace(barriers=6)
    text = "forward: barriers a trip of the hot loop are 7, should be at most 6"
    own = ("kimi-32-8192", *KEY[1:])
    assert over_budget(row, {KEY: EXACT, own: tight}) == (text,)
    assert over_budget(row, {KEY: EXACT, own: EXACT}) == ()
    assert over_budget(row, {own: EXACT}) == over_budget(row, {KEY: EXACT}) == ()
