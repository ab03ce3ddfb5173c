"""Match the loops of a kernel's source with those of its machine code, to know their trips.

A backend says which loops a launch of its kernel has, in the order of the source, and how often
each is run. A compiler leaves some out: it unrolls a loop whose number of trips is a constant, from
the inside out, and drops one of a single trip, always where that is a constant. All ways in which
it may have done so are tried; where none gives the loops of the machine code, or several do with
different trips, the trips are not known. A loop that is unrolled in part, with nothing left over,
is not noticed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gdn_ops.aot.machine_code import Code


@dataclass(frozen=True)
class SourceLoop:
    """Describe a loop of a kernel's source for one launch.

    Attributes:
        name: what it goes over, like "chunks".
        trips: how often a warp that computes runs it each time it is entered.
        inner: the loops in it.
        is_constant: whether the number is known to the compiler, which then may unroll the loop;
            or another reason why the loop may not be there.
        is_kept: whether the compiler cannot know it, and always keeps the loop.
        may_rest: whether a launch may never run it though it multiplies.
    """

    name: str
    trips: int
    inner: tuple[SourceLoop, ...] = ()
    is_constant: bool = False
    is_kept: bool = False
    may_rest: bool = False


_RESTS = -1
"""Stands for no trips of a loop that multiplies where it is run."""

Nest = tuple[tuple[int, "Nest"], ...]
"""Loops as pairs: a number, and the loops inside."""


def trips_of(
    code: Code,
    source: Sequence[SourceLoop] | None,
    turned: Sequence[SourceLoop] | None = None,
) -> dict[int, int] | None:
    """Return the trips of every loop that counts, or None where they are not known.

    Args:
        code: the machine code.
        source: the loops of its source, or None where the backend does not say.
        turned: the same in another order in which a compiler may leave them, or None.
    """
    if source is None or code.irregular:
        return None
    found = _found(code, -1)
    fitting: set[tuple[int, ...]] = set()
    for loops in (source, turned):
        nests = _forms(tuple(loops)) if loops is not None else ()
        fitting |= {_numbers(nest) for nest in nests if _shape(nest) == _shape(found)}
    numbers = _numbers(found)
    # Drop forms in which a loop that multiplies is never run: only copies and searches are.
    multiplies = [bool(code.loops[i].own.matrix) for i in numbers]
    fitting = {
        trips
        for trips in fitting
        if not any(n == 0 and own for n, own in zip(trips, multiplies, strict=True))
    }
    if len(fitting) != 1:
        return None
    return {i: max(n, 0) for i, n in zip(numbers, fitting.pop(), strict=True)}


def _found(code: Code, parent: int) -> Nest:
    return tuple((index, _found(code, index)) for index in code.children(parent))


def _forms(loops: tuple[SourceLoop, ...]) -> Iterator[Nest]:
    """Yield the nests that a compiler may make of loops, with their trips."""
    for chosen in itertools.product(*([*_forms_of(loop)] for loop in loops)):
        yield tuple(itertools.chain(*chosen))


def _forms_of(loop: SourceLoop) -> Iterator[Nest]:
    for inner in _forms(loop.inner):
        if loop.trips == 1 and not loop.is_kept:
            yield inner
            if loop.is_constant:
                continue
        elif loop.is_constant and not inner:
            yield ()
        if loop.may_rest and not loop.trips:
            yield ((_RESTS, _at_rest(inner)),)
        else:
            yield ((loop.trips, inner),)


def _at_rest(nest: Nest) -> Nest:
    """Return a nest of which nothing is run: which of two loops a compiler has kept is the same."""
    return tuple((_RESTS, _at_rest(inner)) for _, inner in nest)


def _shape(nest: Nest) -> tuple[object, ...]:
    return tuple(_shape(inner) for _, inner in nest)


def _numbers(nest: Nest) -> tuple[int, ...]:
    return tuple(n for number, inner in nest for n in (number, *_numbers(inner)))
