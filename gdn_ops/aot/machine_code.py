"""Hold what the machine code of a kernel does: the instructions of its loops, by kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Counts:
    """Count instructions by kind, as one warp (AMD: wave) executes them.

    Attributes:
        instructions: all of them.
        matrix: of matrix units.
        hgmma: of these, asynchronous products of a warp group on Hopper.
        register_a: of these, with operand A in registers instead of shared memory.
        multiply_adds: of the matrix instructions, a warp's share, as many as take equal time in
            16 bits; 0 where the text does not say how large a product is (Blackwell).
        barriers: on which the warps of a program wait for each other.
        waits: for products of a warp group (WARPGROUP.DEPBAR).
        phase_waits: for a copy or a product that signals a barrier in shared memory (SYNCS).
        shared_loads, shared_stores: of shared memory.
        shuffles: between the lanes of a warp.
        spills: that move a register to memory or back.
        special: of the unit for exp, log, 1/x and their like (MUFU).
        calls: of functions, whose own instructions are not counted.
    """

    instructions: int = 0
    matrix: int = 0
    hgmma: int = 0
    register_a: int = 0
    multiply_adds: int = 0
    barriers: int = 0
    waits: int = 0
    phase_waits: int = 0
    shared_loads: int = 0
    shared_stores: int = 0
    shuffles: int = 0
    spills: int = 0
    special: int = 0
    calls: int = 0

    def plus(self, other: Counts, times: int = 1) -> Counts:
        """Return the sum of these counts and `times` the other ones."""
        return Counts(*(getattr(self, n) + times * getattr(other, n) for n in _NAMES))


_NAMES = tuple(field.name for field in fields(Counts))


def total(counts: Iterable[Counts]) -> Counts:
    """Return the sum of counts."""
    whole = Counts()
    for one in counts:
        whole = whole.plus(one)
    return whole


@dataclass(frozen=True)
class Loop:
    """Describe a loop of machine code.

    Attributes:
        parent: the index of the loop around it in `Code.loops`, or -1.
        depth: 0 where there is none, else one more than that of its parent.
        is_wait: whether it only asks until something has arrived; its instructions count once.
        own: its instructions without those of the loops in it.
    """

    parent: int
    depth: int
    is_wait: bool
    own: Counts


@dataclass(frozen=True)
class Code:
    """Describe the machine code of a kernel.

    Attributes:
        outside: the instructions that are in no loop.
        loops: in the order of their first instructions, so that an outer loop precedes its inner
            ones.
        irregular: how many jumps are not understood: to a place that is computed, into a loop
            beside its head, or one that is missing, since no way leads to a product.
    """

    outside: Counts = Counts()
    loops: tuple[Loop, ...] = ()
    irregular: int = 0

    @property
    def counting(self) -> list[int]:
        """Return the indices of the loops that do not only wait."""
        return [i for i, loop in enumerate(self.loops) if not loop.is_wait]

    def children(self, parent: int) -> list[int]:
        """Return the indices of the loops right inside a loop, or of the outermost ones of -1."""
        return [i for i in self.counting if self.loops[i].parent == parent]

    def trip(self, index: int, trips: Mapping[int, int]) -> Counts:
        """Return what one trip of a loop executes, with all trips of the loops in it.

        Args:
            index: of the loop, or -1 for the whole kernel.
            trips: of every loop that counts, each time it is entered.
        """
        whole = self.outside if index < 0 else self.loops[index].own
        for i in self._waits(index):
            whole = whole.plus(self.loops[i].own)
        for i in self.children(index):
            whole = whole.plus(self.trip(i, trips), trips[i])
        return whole

    def _waits(self, parent: int) -> list[int]:
        return [i for i, x in enumerate(self.loops) if x.is_wait and x.parent == parent]

    def hot(self, trips: Mapping[int, int]) -> int:
        """Return the outermost loop that executes most instructions, -1 where there is none."""
        outermost = self.children(-1)
        cost = {i: trips[i] * self.trip(i, trips).instructions for i in outermost}
        return max(outermost, key=cost.__getitem__, default=-1)

    def values(self) -> dict[str, Any]:
        """Return the code as values of JSON, without counts that are 0."""
        return {
            "outside": values(self.outside),
            "loops": [
                {"parent": x.parent, "depth": x.depth, "is_wait": x.is_wait, "own": values(x.own)}
                for x in self.loops
            ],
            "irregular": self.irregular,
        }

    @staticmethod
    def of(value: Mapping[str, Any]) -> Code:
        """Return the code that `values` was made of."""
        loops = tuple(Loop(**x | {"own": Counts(**x["own"])}) for x in value["loops"])
        return Code(Counts(**value["outside"]), loops, value["irregular"])


def values(counts: Counts) -> dict[str, int]:
    """Return counts by name, without those that are 0."""
    return {name: getattr(counts, name) for name in _NAMES if getattr(counts, name)}


class Line(NamedTuple):
    """Describe one instruction of a listing.

    Attributes:
        counts: of this instruction alone.
        targets: indices of the lines that it may jump to.
        goes_on: whether the next line may follow it.
        polls: whether it asks for what may not have arrived yet, or for lanes that differ.
        is_irregular: whether it may jump to a place that the listing does not name.
    """

    counts: Counts
    targets: Sequence[int] = ()
    goes_on: bool = True
    polls: bool = False
    is_irregular: bool = False
