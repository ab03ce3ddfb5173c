"""Describe how the tokens of sequences are split over the ranks of a process group.

A rank holds fragments, runs of tokens, in an order of its own. Cut where sequences end, and joined
where two of a rank follow one another, they are pieces: a sequence is a chain of pieces, and the
state goes from each to the next.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gdn_ops.parallel import exchange
from gdn_ops.parallel.failures import register
from gdn_ops.spec.errors import SpecError, SpecTypeError


class Piece(NamedTuple):
    """Hold a run of tokens of one sequence that lies on one rank.

    Attributes:
        sequence: its number.
        position: its place in the chain of its sequence, from 0.
        rank: of the group.
        start: its first token, counted over all sequences.
        local: where that stands among the tokens of the rank.
        length: tokens, at least one.
    """

    sequence: int
    position: int
    rank: int
    start: int
    local: int
    length: int

    @property
    def stop(self) -> int:
        """Return the token behind the last one."""
        return self.start + self.length

    @property
    def own(self) -> slice:
        """Return its tokens among those of its rank."""
        return slice(self.local, self.local + self.length)


class SequenceSplit:
    """Say which tokens every rank of a process group holds, and in which order.

    The tokens are those of T: of one sequence, the same for every row of a batch, or of several
    that are packed. Every rank makes the same split; that they agree is checked where it is used.

    Args:
        group: a process group of torch.distributed, a DeviceMesh of one dimension, or None for all
            ranks.
        fragments: for every rank its runs of tokens (start, stop), in the order in which it holds
            them; together each token once. A rank may hold none.
        cu_seqlens: (N+1,) boundaries of packed sequences: integers or a tensor on the CPU; None
            for one sequence. They are of all T tokens, whoever holds them.

    Attributes:
        group: the process group.
        rank, ranks: the place of this process in it, and its size.
        tokens: T.
        boundaries: (N+1) integers, those of `cu_seqlens`, or 0 and T.
        is_packed: whether `cu_seqlens` was given.
        pieces: the pieces of all ranks, by sequence and position.

    Raises:
        SpecError: tokens are on no rank or on two, or the boundaries do not fit.
        SpecTypeError: an argument is of another type.

    Example:
        >>> import torch.distributed as dist
        >>> from gdn_ops.parallel import SequenceSplit
        >>> if not dist.is_initialized():
        ...     dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> split = SequenceSplit(None, [[(4, 8), (0, 4)]])
        >>> [piece.local for piece in split.pieces]
        [4, 0]
    """

    def __init__(
        self,
        group: Any,
        fragments: Sequence[Sequence[tuple[int, int]]],
        cu_seqlens: Sequence[int] | Tensor | None = None,
    ) -> None:
        self.group = process_group(group)
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        register(self.group)
        if len(fragments) != self.ranks:
            _fail(f"fragments are of {len(fragments)} ranks, should be of {self.ranks}")
        self.fragments = tuple(
            tuple((_count(start, "a start"), _count(stop, "a stop")) for start, stop in of_rank)
            for of_rank in fragments
        )
        self.tokens = _tiled(self.fragments)
        self.is_packed = cu_seqlens is not None
        self.boundaries = _boundaries(cu_seqlens, self.tokens)
        self.pieces = tuple(_pieces(self.fragments, self.boundaries))
        self._own = tuple(sorted(self.pieces_of(self.rank), key=lambda piece: piece.local))

    @classmethod
    def contiguous(
        cls,
        tokens: int | Sequence[int],
        group: Any = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
    ) -> SequenceSplit:
        """Split T tokens into one run a rank, in the order of the ranks.

        Args:
            tokens: T, split as evenly as it can be; or the tokens of every rank.
            group, cu_seqlens: as the class takes them.
        """
        ranks = dist.get_world_size(process_group(group))
        if isinstance(tokens, Sequence):
            cuts = [0, *itertools.accumulate(_count(length, "a length") for length in tokens)]
        else:
            cuts = [_count(tokens, "tokens") * r // ranks for r in range(ranks + 1)]
        return cls(group, [[pair] for pair in itertools.pairwise(cuts)], cu_seqlens)

    @classmethod
    def zigzag(
        cls, tokens: int, group: Any = None, cu_seqlens: Sequence[int] | Tensor | None = None
    ) -> SequenceSplit:
        """Split T tokens into two runs a rank, of which the first and last are on rank 0.

        Causal attention then costs every rank the same; torch's context_parallel splits so.

        Args:
            tokens: T, any number.
            group, cu_seqlens: as the class takes them.
        """
        parts = 2 * dist.get_world_size(process_group(group))
        cuts = [_count(tokens, "tokens") * i // parts for i in range(parts + 1)]
        runs = [*itertools.pairwise(cuts)]
        return cls(group, [[runs[r], runs[-1 - r]] for r in range(parts // 2)], cu_seqlens)

    @property
    def local_tokens(self) -> int:
        """Return the tokens of this rank."""
        return sum(stop - start for start, stop in self.fragments[self.rank])

    @property
    def sequences(self) -> int:
        """Return N, the number of packed sequences, or 1."""
        return len(self.boundaries) - 1

    @property
    def local_pieces(self) -> tuple[Piece, ...]:
        """Return the pieces of this rank, in the order in which it holds them."""
        return self._own

    def pieces_of(self, rank: int) -> Iterator[Piece]:
        """Yield the pieces of a rank, by sequence and position."""
        return (piece for piece in self.pieces if piece.rank == rank)

    def chain(self, sequence: int) -> tuple[Piece, ...]:
        """Return the pieces of a sequence in order; none of one without tokens."""
        return self._chains[sequence]

    def is_last(self, piece: Piece) -> bool:
        """Return whether a piece is the last one of its sequence."""
        return piece.stop == self.boundaries[piece.sequence + 1]

    @functools.cached_property
    def _chains(self) -> tuple[tuple[Piece, ...], ...]:
        chains: list[list[Piece]] = [[] for _ in range(self.sequences)]
        for piece in self.pieces:
            chains[piece.sequence].append(piece)
        return tuple(map(tuple, chains))

    def local(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return the tokens of this rank, given those of all.

        Args:
            x: (..., T, ...), T along `dim`.
            dim: the axis of tokens.

        Returns:
            (..., T_local, ...), in the order of its fragments.

        Raises:
            SpecError: the axis has another size.
        """
        if x.shape[dim] != self.tokens:
            _fail(f"x has {x.shape[dim]} tokens along axis {dim}, should have T={self.tokens}")
        runs = [x.narrow(dim, start, stop - start) for start, stop in self.fragments[self.rank]]
        return runs[0] if len(runs) == 1 else torch.cat([x.narrow(dim, 0, 0), *runs], dim)

    @exchange.eagerly
    def whole(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return the tokens of all ranks, in the order of the sequences, on every rank.

        Args:
            x: (..., T_local, ...), the tokens of this rank along `dim`.
            dim: the axis of tokens.

        Returns:
            (..., T, ...). The gradient of a rank's tokens is the sum of what all ranks ask.

        Raises:
            SpecError: the axis has another size.
            ParallelError: the exchange failed.
        """
        if x.shape[dim] != self.local_tokens:
            _fail(
                f"x has {x.shape[dim]} tokens along axis {dim}, should have those of rank "
                f"{self.rank}: {self.local_tokens}"
            )
        whole: Tensor = _Whole.apply(self, dim, x)  # type: ignore[no-untyped-call]
        return whole

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Return the place of every token of this rank in its sequence, (T_local,) int64."""
        own = [torch.arange(0, device=device)]
        for piece in self.local_pieces:
            first = piece.start - self.boundaries[piece.sequence]
            own.append(torch.arange(first, first + piece.length, device=device))
        return torch.cat(own)

    def __repr__(self) -> str:
        held = ", ".join(
            f"rank {r}: {' '.join(f'{a}-{b}' for a, b in of_rank if b > a) or 'none'}"
            for r, of_rank in enumerate(self.fragments)
        )
        packed = f" in {self.sequences} sequences" if self.is_packed else ""
        return f"SequenceSplit({self.tokens} tokens{packed}; {held})"


class _Whole(torch.autograd.Function):
    """Gather the tokens of all ranks."""

    @staticmethod
    def forward(ctx: Any, split: SequenceSplit, dim: int, x: Tensor) -> Tensor:
        ctx.split, ctx.dim = split, dim
        x = x.movedim(dim, 0)
        held = [sum(stop - start for start, stop in runs) for runs in split.fragments]
        padded = x.new_zeros((max(held), *x.shape[1:]))
        padded[: len(x)] = x
        table = exchange.gather(split.group, "tokens", padded)
        whole = x.new_empty((split.tokens, *x.shape[1:]))
        for rank, runs in enumerate(split.fragments):
            done = 0
            for start, stop in runs:
                whole[start:stop] = table[rank, done : done + stop - start]
                done += stop - start
        return whole.movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, d_whole: Tensor) -> tuple[None, None, Tensor]:
        share = exchange.copied(d_whole)
        total = exchange.total(ctx.split.group, "gradients of tokens", share)
        return None, None, ctx.split.local(total, ctx.dim)


def process_group(group: Any) -> dist.ProcessGroup:
    """Return the process group of a group, of a mesh of one dimension, or of all ranks.

    Raises:
        SpecError: torch.distributed is not initialised, this process is not in the group, or the
            mesh has several dimensions.
        SpecTypeError: it is something else.
    """
    if not (dist.is_available() and dist.is_initialized()):
        _fail("torch.distributed has no process group: call init_process_group first")
    if hasattr(group, "get_group"):
        if group.ndim != 1:
            _fail(
                f"group is a DeviceMesh of {group.ndim} dimensions, should be of one: take a "
                f"dimension, as mesh['sequence']"
            )
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        _fail("this process is not in the group")
    if not isinstance(group, dist.ProcessGroup):
        raise SpecTypeError(
            f"SequenceSplit: group is a {type(group).__name__}, should be a ProcessGroup, a "
            f"DeviceMesh or None"
        )
    return group


def _tiled(fragments: Sequence[Sequence[tuple[int, int]]]) -> int:
    """Return T, having checked that each token is on one rank."""
    held = [
        (start, stop, rank)
        for rank, of_rank in enumerate(fragments)
        for start, stop in of_rank
        if start != stop
    ]
    behind, holder = 0, 0
    for start, stop, rank in sorted(held):
        if stop < start:
            _fail(f"rank {rank} has the fragment ({start}, {stop}), should have start <= stop")
        if start > behind:
            _fail(f"tokens {behind} to {start} are on no rank, should be on one")
        if start < behind:
            twice = f"rank {rank} twice" if rank == holder else f"ranks {holder} and {rank}"
            _fail(f"tokens {start} to {min(stop, behind)} are on {twice}, should be on one")
        behind, holder = stop, rank
    return behind


def _boundaries(given: Any, tokens: int) -> tuple[int, ...]:
    """Return the boundaries of the sequences of T tokens."""
    if given is None:
        return (0, tokens)
    if isinstance(given, Tensor):
        given = given.tolist()
    cuts = tuple(_count(x, "a boundary") for x in given)
    rises = all(a <= b for a, b in itertools.pairwise(cuts))
    if not cuts or cuts[0] != 0 or cuts[-1] != tokens or not rises:
        _fail(f"cu_seqlens is {list(cuts)}, should rise from 0 to T={tokens}")
    return cuts


def _pieces(
    fragments: Sequence[Sequence[tuple[int, int]]], boundaries: Sequence[int]
) -> Iterator[Piece]:
    """Yield the pieces of all ranks, by sequence and position."""
    held: list[tuple[int, int, int, int]] = []
    for rank, of_rank in enumerate(fragments):
        local = 0
        for start, stop in of_rank:
            if start != stop and held and held[-1][2] == rank and held[-1][1] == start:
                first, _, _, where = held.pop()
                held.append((first, stop, rank, where))
            elif start != stop:
                held.append((start, stop, rank, local))
            local += stop - start
    held.sort()
    place = 0
    for sequence, (begin, end) in enumerate(itertools.pairwise(boundaries)):
        position = 0
        while place < len(held) and held[place][0] < end:
            start, stop, rank, local = held[place]
            low, high = max(start, begin), min(stop, end)
            if low < high:
                yield Piece(sequence, position, rank, low, local + low - start, high - low)
                position += 1
            if stop > end:
                break
            place += 1


def _count(x: Any, what: str) -> int:
    """Return a number of tokens as an int."""
    if isinstance(x, bool) or not hasattr(x, "__index__"):
        raise SpecTypeError(f"SequenceSplit: {what} is {x!r}, should be an integer")
    number = x.__index__()
    if number < 0:
        _fail(f"{what} is {number}, should be at least 0")
    return int(number)


def _fail(message: str) -> Any:
    raise SpecError(f"SequenceSplit: {message}")
