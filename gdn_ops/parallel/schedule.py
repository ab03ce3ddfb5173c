"""Order the work of all ranks: which calls a rank makes, when, and what state goes where.

A step is one call of the op: pieces of a rank that stand at the same place of their chains. It can
start when its ticks have come: the length of the longest way to it through the chains.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gdn_ops.parallel.split import Piece, SequenceSplit


@dataclass(frozen=True)
class Step:
    """Describe one call of a rank.

    Attributes:
        rank: of the group.
        pieces: those that it computes, in the order in which the rank holds them.
        forward: its tick in a forward, from 0.
        backward: its tick in a backward, from 0.
    """

    rank: int
    pieces: tuple[Piece, ...]
    forward: int
    backward: int

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Return the boundaries of the pieces, packed one after the other."""
        return (0, *itertools.accumulate(piece.length for piece in self.pieces))

    @property
    def runs(self) -> tuple[slice, ...]:
        """Return its tokens among those of the rank, as few slices as there can be."""
        runs: list[slice] = []
        for piece in self.pieces:
            if runs and runs[-1].stop == piece.local:
                runs[-1] = slice(runs[-1].start, piece.own.stop)
            else:
                runs.append(piece.own)
        return tuple(runs)


class Hop(NamedTuple):
    """Describe a state that goes from one piece to the next, of another rank.

    Attributes:
        source: the piece that makes it.
        target: the piece that starts from it.
    """

    source: Piece
    target: Piece


class Schedule:
    """Hold the steps of all ranks, and the hops between them.

    Args:
        split: what is computed.
        merges: whether pieces of one place share a call, as packed sequences; else each has one.

    Attributes:
        steps: of this rank, in order of the forward.
        ticks: how many there are, of a call in one go.
    """

    def __init__(self, split: SequenceSplit, *, merges: bool) -> None:
        self.split = split
        self._of_piece: dict[tuple[int, int], Step] = {}
        for step in _steps(split, merges):
            for piece in step.pieces:
                self._of_piece[piece.sequence, piece.position] = step
        unique = {id(step): step for step in self._of_piece.values()}
        own = (step for step in unique.values() if step.rank == split.rank)
        self.steps = tuple(sorted(own, key=lambda step: (step.forward, step.pieces[0].local)))
        self.ticks = 1 + max((step.forward for step in unique.values()), default=-1)
        self.hops = tuple(
            Hop(source, target)
            for n in range(split.sequences)
            for source, target in itertools.pairwise(split.chain(n))
        )

    def of(self, piece: Piece) -> Step:
        """Return the step of a piece."""
        return self._of_piece[piece.sequence, piece.position]


def _steps(split: SequenceSplit, merges: bool) -> Iterator[Step]:
    """Yield the steps of all ranks."""
    groups: dict[tuple[int, ...], list[Piece]] = {}
    for piece in split.pieces:
        key = (piece.rank, piece.position, *(() if merges else (piece.sequence,)))
        groups.setdefault(key, []).append(piece)
    # From the last places to the first: those behind a step are known before it.
    ticks: dict[tuple[int, int], int] = {}
    for key in sorted(groups, key=lambda key: -key[1]):
        behind = [ticks.get((p.sequence, p.position + 1), -1) for p in groups[key]]
        for piece in groups[key]:
            ticks[piece.sequence, piece.position] = 1 + max(behind)
    for pieces in groups.values():
        own = tuple(sorted(pieces, key=lambda piece: piece.local))
        first = own[0]
        yield Step(first.rank, own, first.position, ticks[first.sequence, first.position])


class Heads(NamedTuple):
    """Describe a group of heads: slices of the key heads and of the value heads."""

    keys: slice
    values: slice


def head_groups(H: int, HV: int, count: int) -> tuple[Heads, ...]:
    """Return groups of heads, about as large, each of whole key heads or of parts of one.

    Args:
        H: key heads.
        HV: value heads.
        count: how many groups; at most HV are made.
    """
    ratio = HV // H
    if count <= H:
        cuts = [H * i // count for i in range(count + 1)]
        pairs = itertools.pairwise(cuts)
        return tuple(Heads(slice(a, b), slice(a * ratio, b * ratio)) for a, b in pairs)
    each = min(-(-count // H), ratio)
    parts = [ratio * i // each for i in range(each + 1)]
    return tuple(
        Heads(slice(h, h + 1), slice(h * ratio + a, h * ratio + b))
        for h in range(H)
        for a, b in itertools.pairwise(parts)
    )


def shares_keys(groups: Sequence[Heads]) -> bool:
    """Return whether two groups have a key head in common."""
    return any(a.keys == b.keys for a, b in itertools.pairwise(groups))
