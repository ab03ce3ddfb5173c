"""Run a split sequence by summaries of its pieces, which all ranks gather: docs/math.md §6.

All ranks work at once, and exchange once a direction. In return a piece between two others is
walked twice: for its summary, and for its results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gdn_ops.call.bind import Tokens
from gdn_ops.parallel import exchange
from gdn_ops.parallel.parts import (
    ALL,
    LocalCall,
    Saved,
    apart,
    check_parts,
    joined,
    part_of,
    put,
    take,
)
from gdn_ops.parallel.schedule import Step
from gdn_ops.parallel.split import Piece
from gdn_ops.parallel.summary import summary_of

Key = tuple[int, int]
"""A piece by sequence and position."""


class Gather:
    """Run the pieces of one rank, forward or backward.

    Args:
        local: the call.
        merges: whether pieces share a call, as packed sequences.
    """

    def __init__(self, local: LocalCall, *, merges: bool) -> None:
        self.local, self.merges = local, merges
        self.split = local.split
        self.group = local.split.group

    def check(self) -> None:
        """Check that the backend can compute the parts of this rank.

        Raises:
            BackendUnsupportedError: it cannot.
        """
        check_parts(self.local, self._all_steps(), ALL)

    def forward(self, tokens: Tokens, o: Tensor, finals: Tensor | None) -> list[Saved]:
        """Compute o and the final states of sequences that end here.

        Args, returns:
            As `Pipeline.forward`; behind the parts are the maps M of the middle pieces.
        """
        saved: dict[Step, Saved] = {}
        maps: dict[Key, Tensor] = {}
        known: dict[Key, tuple[Tensor, Tensor | None]] = {}

        def run(step: Step, states: Sequence[Tensor | None]) -> None:
            state = joined(states)
            part = part_of(self.local, tokens, step, ALL, state)
            out = part.forward()
            put(o, out.o, step, ALL.values)
            for piece, own in apart(step, out.final_state):
                known[piece.sequence, piece.position] = own, None
                if finals is not None and self.split.is_last(piece):
                    finals[self.local.rows(piece)] = own
            if self.local.call.needs_grad:
                saved[step] = Saved(state, out.saved)

        for step in self._steps(lambda piece: piece.position == 0):
            run(step, [self.local.started(piece) for piece in step.pieces])
        for step in self._steps(self._is_between):
            # Nothing is asked of gradients: the backward has a formula of its own.
            M, R = summary_of(part_of(self.local, tokens, step, ALL, None).call, self.local.backend)
            for (piece, own), (_, m) in zip(apart(step, R), apart(step, M), strict=True):
                known[piece.sequence, piece.position] = own, m
                maps[piece.sequence, piece.position] = m
        starts = self._composed("summaries of gated_delta", known, is_backward=False)
        for step in self._steps(lambda piece: piece.position > 0):
            run(step, [starts[piece.sequence, piece.position] for piece in step.pieces])
        if not self.local.call.needs_grad:
            return []
        parts = [saved[step] for step in self._all_steps()]
        return [*parts, Saved(None, tuple(maps[key] for key in sorted(maps)))]

    def backward(
        self,
        tokens: Tokens,
        saved: Sequence[Saved],
        d_o: Tensor,
        d_finals: Tensor | None,
        grads: Tokens,
        d_state: Tensor | None,
    ) -> None:
        """Compute the gradients, as `Pipeline.backward` does."""
        *parts, (_, kept_maps) = saved
        kept = dict(zip(self._all_steps(), parts, strict=True))
        between = sorted(
            (piece.sequence, piece.position)
            for piece in self.split.local_pieces
            if self._is_between(piece)
        )
        maps = dict(zip(between, kept_maps, strict=True))
        known: dict[Key, tuple[Tensor, Tensor | None]] = {}

        def run(step: Step, d_final: Tensor, *, is_first_pass: bool) -> None:
            of_part = kept[step]
            part = part_of(self.local, tokens, step, ALL, of_part.state)
            own, d_start = part.backward(of_part.tensors, take(d_o, step, ALL.values), d_final)
            if d_start is not None:
                for piece, d_own in apart(step, d_start):
                    key = piece.sequence, piece.position
                    if piece.position and (is_first_pass or self.split.is_last(piece)):
                        known[key] = d_own, maps.get(key)
                    elif not piece.position and d_state is not None:
                        d_state[self.local.rows(piece)] += d_own
            if is_first_pass:
                return
            for whole, grad in zip(grads, own, strict=True):
                if whole is not None and grad is not None:
                    put(whole, grad, step, slice(None))

        for step in self._all_steps():
            if all(map(self.split.is_last, step.pieces)):
                run(step, self._d_ends(step, d_finals, {}), is_first_pass=False)
            elif step.pieces[0].position:
                run(step, self._d_ends(step, d_finals, None), is_first_pass=True)
        ends = self._composed("gradients of summaries", known, is_backward=True)
        for step in self._all_steps():
            if not all(map(self.split.is_last, step.pieces)):
                run(step, self._d_ends(step, d_finals, ends), is_first_pass=False)

    def _d_ends(
        self, step: Step, d_finals: Tensor | None, ends: dict[Key, Tensor] | None
    ) -> Tensor:
        """Return the gradients behind pieces, joined: zeros inside of chains where not known."""
        own: list[Tensor] = []
        for piece in step.pieces:
            if self.split.is_last(piece) and d_finals is not None:
                own.append(d_finals[self.local.rows(piece)])
            elif self.split.is_last(piece) or ends is None:
                own.append(self.local.states().zero_())
            else:
                own.append(ends[piece.sequence, piece.position])
        return joined(own)

    def _is_between(self, piece: Piece) -> bool:
        return piece.position > 0 and not self.split.is_last(piece)

    def _steps(self, holds: Callable[[Piece], bool]) -> Iterator[Step]:
        """Yield calls of the pieces of this rank for which something holds."""
        own = [piece for piece in self.split.local_pieces if holds(piece)]
        if own and self.merges:
            yield Step(self.split.rank, tuple(own), 0, 0)
        elif own:
            yield from (Step(self.split.rank, (piece,), 0, 0) for piece in own)

    def _all_steps(self) -> Iterator[Step]:
        """Yield the calls of this rank: of pieces that start sequences, then of the others."""
        yield from self._steps(lambda piece: piece.position == 0)
        yield from self._steps(lambda piece: piece.position > 0)

    def _composed(
        self, kind: str, known: dict[Key, tuple[Tensor, Tensor | None]], *, is_backward: bool
    ) -> dict[Key, Tensor]:
        """Gather what all pieces make of a state, and return what those of this rank start from.

        Args:
            kind: what is exchanged.
            known: of pieces of this rank, R or its gradient, and M where it is needed.
            is_backward: whether the chains are walked from their ends, with Mᵀ.
        """
        ranks = self.split.ranks
        sent = [[p for p in self.split.pieces_of(r) if self._sends(p, is_backward)]
                for r in range(ranks)]  # fmt: skip
        most = max(map(len, sent))
        if not most:
            return {}
        like, of_map = self.local.states(), self._map_like()
        flat = like.new_zeros(most, like.numel() + of_map.numel())
        for slot, piece in enumerate(sent[self.split.rank]):
            R, M = known[piece.sequence, piece.position]
            flat[slot, : like.numel()] = R.flatten()
            if M is not None:
                flat[slot, like.numel() :] = M.flatten()
        table = exchange.gather(self.group, kind, flat)
        place = {
            (piece.sequence, piece.position): table[rank, slot]
            for rank, of_rank in enumerate(sent)
            for slot, piece in enumerate(of_rank)
        }
        starts: dict[Key, Tensor] = {}
        for sequence in {piece.sequence for piece in self.split.local_pieces}:
            chain = self.split.chain(sequence)
            state: Tensor | None = None
            for piece in reversed(chain) if is_backward else chain:
                key = sequence, piece.position
                if state is not None and piece.rank == self.split.rank:
                    starts[key] = state.to(like.dtype)
                if self._sends(piece, is_backward):
                    row = place[key]
                    R, M = row[: like.numel()].view_as(like), row[like.numel() :].view_as(of_map)
                    # In float64, whatever precision a device has for products of float32.
                    state = _applied(M, state, R.double(), is_backward)
        return starts

    def _sends(self, piece: Piece, is_backward: bool) -> bool:
        """Return whether others start from what a piece makes."""
        return piece.position > 0 if is_backward else not self.split.is_last(piece)

    def _map_like(self) -> Tensor:
        """Return an empty tensor for M of a piece: a matrix, or a number without an error term."""
        like = self.local.states()
        size = like.shape[-2] if self.local.call.rule.has_erase else 1
        return like.new_empty((*like.shape[:2], size, size))


def _applied(M: Tensor, state: Tensor | None, R: Tensor, is_backward: bool) -> Tensor:
    """Return M state + R, or with Mᵀ backward; R alone at the start of a chain."""
    if state is None:
        return R
    wide = M.double()
    if wide.shape[-1] == 1 and state.shape[-2] != 1:
        return wide * state + R
    with torch.autocast(M.device.type, enabled=False):
        return torch.matmul(wide.mT if is_backward else wide, state) + R
