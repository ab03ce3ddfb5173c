"""Compute layers on tokens that are split over ranks (`gdn_ops.parallel.sequence_parallel`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn_ops.call.bind import Arguments, Tokens
from gdn_ops.dispatch import registry
from gdn_ops.parallel import halo, sequence
from gdn_ops.parallel.context import Active
from gdn_ops.spec.errors import SpecError


def check_local(owner: str, active: Active, x: Tensor, **given: Any) -> None:
    """Check that a layer is given the tokens of its rank, and nothing that the split says.

    Args:
        owner: what the message starts with.
        active: the context.
        x: (B, T, width).
        given: further arguments, by name.

    Raises:
        SpecError: the tokens are others, or an argument is given.
    """
    for name, value in given.items():
        if value is not None:
            raise SpecError(f"{owner}: {name} is given, should be None under sequence_parallel")
    split = active.split
    if x.shape[1] != split.local_tokens:
        raise SpecError(
            f"{owner}: x has T={x.shape[1]} tokens, should have {split.local_tokens}: those of "
            f"rank {split.rank} in {split}"
        )
    if split.is_packed and x.shape[0] != 1:
        raise SpecError(f"{owner}: x has B={x.shape[0]} rows, should be 1: sequences are packed")


class Convolved(NamedTuple):
    """Hold what a short convolution takes in place of the tokens of a rank.

    Attributes:
        parts: each (N, T, width), or (1, N T, width) where they are packed.
        past: (sequences, widths, count), the inputs before each, or None without any.
        cu_seqlens: boundaries of the pieces, or None.
    """

    parts: list[Tensor]
    past: Tensor | None
    cu_seqlens: Tensor | None


def convolved(active: Active, parts: Sequence[Tensor], count: int) -> Convolved:
    """Return the inputs of a convolution, with those of the `count` tokens before each piece.

    Args:
        active: the context.
        parts: (B, T_local, width) each.
        count: tokens that are read before each.
    """
    split, x = active.split, parts[0]
    past = torch.cat(halo.before(split, parts, count), -1)
    pieces = split.local_pieces
    if not pieces:
        return Convolved([*parts], None, None)
    state = past.flatten(0, 1).mT
    if len(pieces) == 1:
        return Convolved([*parts], state, None)
    cuts = [0, *(b * x.shape[1] + piece.own.stop for b in range(x.shape[0]) for piece in pieces)]
    boundaries = torch.tensor(cuts, dtype=torch.int64, device=x.device)
    return Convolved([part.reshape(1, -1, part.shape[2]) for part in parts], state, boundaries)


def last_inputs(active: Active, parts: Sequence[Tensor], count: int) -> Tensor:
    """Return the state of a convolution behind all sequences, or of none: (N, widths, count)."""
    if not active.return_state:
        x = parts[0]
        return x.new_empty((0, sum(part.shape[2] for part in parts), count))
    return torch.cat(halo.last(active.split, parts, count), -1).mT.contiguous()


def last_tokens(owner: str, active: Active, parts: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return the last tokens of all rows, (B, count, width) each.

    Raises:
        SpecError: sequences are packed: `owner` counts the tokens of all rows at once.
    """
    if active.split.is_packed:
        raise SpecError(
            f"{owner}: return_state is True with packed sequences, should be False: its state "
            f"counts the tokens of all rows at once"
        )
    return halo.last(active.split, parts, count)


def run_rule(
    active: Active, tokens: Mapping[str, Tensor | None], rule: str, backend: str, **options: Any
) -> tuple[Tensor, Tensor]:
    """Run the rule on the tokens of this rank; return o and the states, or those of none.

    Args:
        active: the context.
        tokens: q, k, v and the gates by their names in `gated_delta`, each (B, T_local, ...) or
            None.
        rule, backend, options: of `gated_delta`.
    """
    names = ("q", "k", "v", "alpha", "log_alpha", "beta", "erase", "write")
    q, k, v, *gates = (tokens.get(name) for name in names)
    assert q is not None and k is not None and v is not None
    arguments = Arguments(
        Tokens(q, k, v, *gates),
        rule=rule,
        return_state=active.return_state,
        backend=registry.resolve(backend),
        **options,
    )
    o, memory = sequence.run(arguments, active.split, active.strategy)
    if not active.return_state:
        dtype = torch.promote_types(q.dtype, torch.float32)
        memory = q.new_empty((0, v.shape[2], k.shape[3], v.shape[3]), dtype=dtype)
    return o, memory


class Window(NamedTuple):
    """Hold a piece of a rank's tokens, and what attention reads before it.

    Attributes:
        own: the tokens of the piece.
        keys, values: (B, count, width) of the tokens before it.
        tokens: how many tokens its sequence has before it.
    """

    own: slice
    keys: Tensor
    values: Tensor
    tokens: int


def windows(active: Active, k: Tensor, v: Tensor, count: int) -> Iterator[Window]:
    """Yield the pieces of this rank with the keys and values before each.

    Args:
        active: the context.
        k, v: (B, T_local, width).
        count: tokens at most; fewer where no piece has as many before it.
    """
    split = active.split
    past = [piece.start - split.boundaries[piece.sequence] for piece in split.pieces]
    count = min(count, max(past, default=0))
    keys, values = halo.before(split, [k, v], count)
    for i, piece in enumerate(split.local_pieces):
        first = piece.start - split.boundaries[piece.sequence]
        yield Window(piece.own, keys[:, i], values[:, i], first)
