"""Hold compiled kernels to budgets, so that code which became slower is seen without a GPU.

A backend has a table of budgets for a version of its compiler. They are held at the defaults, in
the launches of the cases and on the targets that the table has. There, a kernel without a budget
fails too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from gdn_ops.aot.results import CompiledKernel, TimedLaunch


class Budget(NamedTuple):
    """Say what a launch may cost. The hot loop is `Code.hot`, a trip of it has its inner loops.

    Attributes:
        instructions: the most that a warp executes in a trip of the hot loop.
        barriers: the most in a trip of it.
        register_a: the fewest HGMMA of a trip with operand A in registers.
        programs: the fewest that a processor holds.
        spills: the most in the whole kernel.
    """

    instructions: int
    barriers: int
    register_a: int
    programs: int
    spills: int = 0


Budgets = Mapping[tuple[str, str, str, str], Budget]
"""(case, kernel, direction, target) -> its budget.

Where a kernel is launched more than once in a direction, the direction may have the place of the
launch behind it, counted from 0: "forward 3".
"""


def over_budget(row: CompiledKernel, budgets: Budgets) -> tuple[str, ...]:
    """Return what a compiled kernel has beyond its budgets, or that it lacks one."""
    cases = {case for case, _, _, target in budgets if target == row.target}
    texts = (
        f"{launch.direction}: {text}"
        for launch in row.launches
        if _case_of(launch) in cases
        for text in _excess(row, launch, _budget_of(row, launch, budgets))
    )
    return tuple(dict.fromkeys(texts))


def _budget_of(row: CompiledKernel, launch: TimedLaunch, budgets: Budgets) -> Budget | None:
    """Return the budget of a launch: that of its place, or of all launches of its kernel."""
    case, place = _case_of(launch), f"{launch.direction} {launch.order}"
    own = budgets.get((case, row.kernel, place, row.target))
    return own or budgets.get((case, row.kernel, launch.direction, row.target))


def _case_of(launch: TimedLaunch) -> str:
    """Return the name of the case of a launch, or what its sample is called otherwise."""
    return launch.sample.rpartition(" ")[0]


def _excess(row: CompiledKernel, launch: TimedLaunch, budget: Budget | None) -> Iterator[str]:
    """Yield where a launch is over its budget."""
    if budget is None:
        yield f"no budget on {row.target}, should be in the table of budgets"
        return
    if launch.trips is None:
        yield "the trips of its loops are not known, should be given for a budget"
        return
    trip = row.code.trip(row.code.hot(launch.trips), launch.trips)
    for name, value, most in (
        ("instructions a trip of the hot loop", trip.instructions, budget.instructions),
        ("barriers a trip of the hot loop", trip.barriers, budget.barriers),
        ("spills", row.spills, budget.spills),
    ):
        if value > most:
            yield f"{name} are {value}, should be at most {most}"
    for name, value, least in (
        ("HGMMA with A in registers", trip.register_a, budget.register_a),
        ("programs per processor", row.programs, budget.programs),
    ):
        if value < least:
            yield f"{name} are {value}, should be at least {least}"
