"""Exchange the tokens that stand before the pieces of a split, as windows read them.

A short convolution reads the inputs of a few tokens before its own, attention in a window keys and
values of many: both need what other ranks hold, and send gradients back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn_ops.call.structure import dtype_name
from gdn_ops.parallel import exchange
from gdn_ops.parallel.exchange import Message, Total, eagerly
from gdn_ops.parallel.failures import reported
from gdn_ops.parallel.split import Piece, SequenceSplit

NAME = "tokens before pieces"


class Loan(NamedTuple):
    """Describe tokens that one piece reads of another.

    Attributes:
        source: the piece that holds them.
        target: the piece that reads them.
        start, stop: the tokens, counted over all sequences.
    """

    source: Piece
    target: Piece
    start: int
    stop: int


def loans(split: SequenceSplit, count: int) -> Iterator[Loan]:
    """Yield what pieces read of others before them, up to `count` tokens, on all ranks."""
    for piece in split.pieces:
        first = max(piece.start - count, split.boundaries[piece.sequence])
        for source in split.chain(piece.sequence)[: piece.position]:
            if source.stop > first:
                yield Loan(source, piece, max(first, source.start), source.stop)


@eagerly
def before(split: SequenceSplit, parts: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return the tokens before every piece of this rank, whoever holds them.

    Args:
        split: which tokens the ranks hold.
        parts: tensors (B, T_local, width) of one dtype, exchanged together.
        count: how many tokens.

    Returns:
        (B, pieces, count, width) each, the latest token last, with zeros where the sequence starts
        later; the pieces in the order in which this rank holds them. The gradients go back.

    Raises:
        ParallelError: the ranks disagree, or an exchange failed.
    """
    with reported(split.group, NAME):
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in parts)
        facts = {
            "(B, widths)": str((parts[0].shape[0], *(x.shape[2] for x in parts))),
            "count": str(count),
            "the dtype": dtype_name(parts[0].dtype),
            "whether gradients are needed": str(needs_grad),
            "split": repr(split),
        }
        exchange.agree(split.group, NAME, facts)
        own: tuple[Tensor, ...] = _Before.apply(split, count, *parts)  # type: ignore[no-untyped-call]
        return list(own)


@eagerly
def last(split: SequenceSplit, parts: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return the last tokens of every sequence, on every rank.

    Args:
        split: which tokens the ranks hold.
        parts: tensors (B, T_local, width).
        count: how many tokens.

    Returns:
        (N, count, width) each, N being B where sequences are not packed; the latest token last,
        with zeros where a sequence is shorter.
    """
    results = []
    for x in parts:
        packed = split.is_packed
        rows = split.sequences if packed else x.shape[0]
        own = x.new_zeros((rows, count, x.shape[2]))
        for piece in split.local_pieces:
            end = split.boundaries[piece.sequence + 1]
            start = max(piece.start, end - count)
            if start < piece.stop:
                at = slice(start - end + count, piece.stop - end + count)
                n = slice(piece.sequence, piece.sequence + 1) if packed else slice(None)
                # In place on zeros: autograd sees where each token goes.
                own[n, at] = x[:, _local(piece, start, piece.stop)]
        with reported(split.group, NAME):
            results.append(Total.apply(split.group, "last tokens", own))  # type: ignore[no-untyped-call]
    return results


def _local(piece: Piece, start: int, stop: int) -> slice:
    """Return tokens of a piece among those of its rank."""
    return slice(start - piece.start + piece.local, stop - piece.start + piece.local)


def _slots(split: SequenceSplit, loan: Loan, count: int) -> tuple[int, slice]:
    """Return where borrowed tokens stand: the piece of this rank, and slots before it."""
    place = split.local_pieces.index(loan.target)
    first = loan.target.start - count
    return place, slice(loan.start - first, loan.stop - first)


class _Before(torch.autograd.Function):
    """Borrow tokens; give their gradients back."""

    @staticmethod
    def forward(ctx: Any, split: SequenceSplit, count: int, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.split, ctx.count = split, count
        ctx.shapes = [x.shape for x in parts]
        widths = [x.shape[2] for x in parts]
        B, pieces = parts[0].shape[0], len(split.local_pieces)
        joined = parts[0].new_zeros((B, pieces, count, sum(widths)))

        def held(loan: Loan) -> Tensor:
            own = _local(loan.source, loan.start, loan.stop)
            return torch.cat([x[:, own] for x in parts], -1)

        def take(loan: Loan, rows: Tensor) -> None:
            place, slots = _slots(split, loan, count)
            joined[:, place, slots] = rows

        shape = (B, sum(widths), joined)
        _exchange(split, count, "tokens before pieces", held, take, shape, is_backward=False)
        return tuple(x.contiguous() for x in joined.split(widths, -1))

    @staticmethod
    def backward(ctx: Any, *d_parts: Tensor) -> tuple[Any, ...]:
        split, count = ctx.split, ctx.count
        d_joined = torch.cat(d_parts, -1)
        widths = [shape[2] for shape in ctx.shapes]
        grads = [d_joined.new_zeros(shape) for shape in ctx.shapes]

        def held(loan: Loan) -> Tensor:
            place, slots = _slots(split, loan, count)
            return d_joined[:, place, slots]

        def take(loan: Loan, rows: Tensor) -> None:
            own = _local(loan.source, loan.start, loan.stop)
            for grad, part in zip(grads, rows.split(widths, -1), strict=True):
                grad[:, own] += part

        shape = (d_joined.shape[0], sum(widths), d_joined)
        with reported(split.group, NAME):
            _exchange(split, count, "gradients of tokens", held, take, shape, is_backward=True)
        return None, None, *grads


def _exchange(
    split: SequenceSplit,
    count: int,
    kind: str,
    held: Any,
    take: Any,
    shape: tuple[int, int, Tensor],
    *,
    is_backward: bool,
) -> None:
    """Send what this rank lends, and take what it borrows: one message from rank to rank."""
    rank, (B, width, like) = split.rank, shape
    lent: dict[int, list[Tensor]] = defaultdict(list)
    borrowed: dict[int, list[Loan]] = defaultdict(list)
    for loan in loans(split, count):
        source, target = loan.source.rank, loan.target.rank
        if is_backward:
            source, target = target, source
        if source == target == rank:
            take(loan, held(loan))
        elif source == rank:
            lent[target].append(held(loan))
        elif target == rank:
            borrowed[source].append(loan)
    sent = [Message(to, torch.cat(rows, 1).contiguous()) for to, rows in lent.items()]
    received = [
        Message(of, like.new_empty((B, sum(x.stop - x.start for x in own), width)))
        for of, own in borrowed.items()
    ]
    receiving, sending = exchange.transfer(split.group, kind, sent, received)
    exchange.wait(split.group, kind, receiving)
    for message, own in zip(received, borrowed.values(), strict=True):
        lengths = [loan.stop - loan.start for loan in own]
        for loan, rows in zip(own, message.tensor.split(lengths, 1), strict=True):
            take(loan, rows)
    exchange.wait(split.group, kind, sending)
