"""Run a split sequence by summaries of its pieces, which all ranks gather: docs/math.md §6.

All ranks work at once, and exchange once a direction. In return a piece between two others is
walked twice: for its summary, and for its results. A backend that has stages does everything else
once: the first stage of a piece is run before the exchange, the second one behind it. So is the
first piece of a sequence, whose state is known: all ranks would wait for its results otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from gdn_ops.call.bind import Tokens
from gdn_ops.dispatch.results import map_size
from gdn_ops.parallel import exchange
from gdn_ops.parallel.parts import (
    ALL,
    LocalCall,
    Part,
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


class Calls(NamedTuple):
    """Hold the calls of one rank.

    Attributes:
        before: those that a forward computes before the exchange: of pieces that start sequences,
            in stages only of sequences that lie on this rank alone.
        behind: those that it computes behind the exchange, and may summarise before.
        are_staged: whether it does so in stages.
    """

    before: list[Step]
    behind: list[Step]
    are_staged: bool

    @property
    def all(self) -> list[Step]:
        """Return them in the order of the forward."""
        return [*self.before, *self.behind]


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
        check_parts(self.local, self._calls(self.local.call.tokens).all, ALL)

    def forward(self, tokens: Tokens, o: Tensor, finals: Tensor | None) -> list[Saved]:
        """Compute o and the final states of sequences that end here.

        Args, returns:
            As `Pipeline.forward`; behind the parts are the maps M of the middle pieces.
        """
        calls = self._calls(tokens)
        saved: dict[Step, Saved] = {}
        staged: dict[Step, tuple[Part, tuple[Tensor, ...]]] = {}
        known: dict[Key, tuple[Tensor, Tensor | None]] = {}

        def run(step: Step, starts: dict[Key, Tensor]) -> Tensor:
            state = self._joined_starts(step, starts)
            if step in staged:
                part, kept = staged.pop(step)
                out = part.started(state).resume(kept)
            else:
                out = part_of(self.local, tokens, step, ALL, state).forward()
            put(o, out.o, step, ALL.values)
            for piece, own in apart(step, out.final_state):
                if finals is not None and self.split.is_last(piece):
                    finals[self.local.rows(piece)] = own
            if self.local.call.needs_grad:
                saved[step] = Saved(state, out.saved)
            return out.final_state

        for step in calls.before:
            for piece, own in apart(step, run(step, {})):
                known[_key(piece)] = own, None
        for step in calls.behind:
            part = part_of(self.local, tokens, step, ALL, None)
            if part.backend.has_stages:
                M, R, kept = part.summarise()
                staged[step] = part, kept
            else:
                step = replace(step, pieces=tuple(p for p in step.pieces if self._sends(p, False)))
                if not step.pieces:
                    continue
                part = part_of(self.local, tokens, step, ALL, None)
                # Nothing is asked of gradients: the backward has a formula of its own.
                M, R = summary_of(part.call, self.local.backend)
            for (piece, own), (_, m) in zip(apart(step, R), apart(step, M), strict=True):
                if self._sends(piece, False):
                    known[_key(piece)] = self._made(piece, m, own)
        starts = self._composed("summaries of gated_delta", known, is_backward=False)
        for step in calls.behind:
            run(step, starts)
        if not self.local.call.needs_grad:
            return []
        parts = [saved[step] for step in calls.all]
        maps = (known[key][1] for key in sorted(known))
        return [*parts, Saved(None, tuple(M for M in maps if M is not None))]

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
        calls = self._calls(tokens)
        between = sorted(
            _key(piece)
            for piece in self.split.local_pieces
            if self._sends(piece, False) and self._sends(piece, True)
        )
        maps = dict(zip(between, kept_maps, strict=True))
        known: dict[Key, tuple[Tensor, Tensor | None]] = {}
        kept = dict(zip(calls.all, parts, strict=True))
        run = _Backward(self, tokens, kept, d_o, grads, d_state)
        # In stages those that start sequences too, though nobody needs theirs: other ranks walk
        # back as long before the exchange, and behind it would wait for a rank that does so late.
        for step in calls.behind:
            d_start = run.start(step, self._d_ends(step, d_finals, None))
            if d_start is not None:
                for piece, d_own in apart(step, d_start):
                    if self._sends(piece, True):
                        known[_key(piece)] = d_own, maps.get(_key(piece))
        for step in calls.before:
            # In stages they wait: a whole backward is about as long as a second stage.
            if not calls.are_staged and all(map(self.split.is_last, step.pieces)):
                run.finish(step, self._d_ends(step, d_finals, None))
        ends = self._composed("gradients of summaries", known, is_backward=True)
        for step in run.unfinished:
            run.finish(step, self._d_ends(step, d_finals, ends))

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
                own.append(ends[_key(piece)])
        return joined(own)

    def _joined_starts(self, step: Step, starts: dict[Key, Tensor]) -> Tensor | None:
        """Return what pieces start from, joined: what the call gives, or what has been composed."""
        own = [self.local.started(p) if _starts(p) else starts[_key(p)] for p in step.pieces]
        if any(state is not None for state in own):
            own = [self.local.states().zero_() if state is None else state for state in own]
        return joined(own)

    def _made(self, piece: Piece, M: Tensor, R: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what others need of a piece: R and M, or its final state where it is known."""
        if not _starts(piece):
            return R, M
        state = self.local.started(piece)
        if state is None:
            return R, None
        return _applied(M, state.double(), R.double(), False).to(R.dtype), None

    def _calls(self, tokens: Tokens) -> Calls:
        """Return the calls of this rank, as its backend can run them.

        That of one piece decides. Where "auto" gives others to a backend without stages, it
        computes the same calls by summaries.
        """
        cut = next(filter(self._is_cut, self.split.local_pieces), None)
        if cut is not None:
            one = Step(self.split.rank, (cut,), 0, 0)
            if part_of(self.local, tokens, one, ALL, None).backend.has_stages:
                whole = self._steps(lambda piece: not self._is_cut(piece))
                return Calls([*whole], [*self._steps(self._is_cut)], True)
        return Calls([*self._steps(_starts)], [*self._steps(_continues)], False)

    def _steps(self, holds: Callable[[Piece], bool]) -> Iterator[Step]:
        """Yield calls of the pieces of this rank for which something holds."""
        own = [piece for piece in self.split.local_pieces if holds(piece)]
        if own and self.merges:
            yield Step(self.split.rank, tuple(own), 0, 0)
        elif own:
            yield from (Step(self.split.rank, (piece,), 0, 0) for piece in own)

    def _is_cut(self, piece: Piece) -> bool:
        """Return whether other pieces are of the same sequence."""
        return not (_starts(piece) and self.split.is_last(piece))

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
            R, M = known[_key(piece)]
            flat[slot, : like.numel()] = R.flatten()
            if M is not None:
                flat[slot, like.numel() :] = M.flatten()
        table = exchange.gather(self.group, kind, flat)
        place = {
            _key(piece): table[rank, slot]
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
        """Return an empty tensor for M of a piece: a matrix, or a number."""
        like, size = self.local.states(), map_size(self.local.call)
        return like.new_empty((*like.shape[:2], size, size))


class _Backward:
    """Run the backwards of the calls of one rank, in stages where a backend has them.

    Args:
        gather: of the rank.
        tokens: of the rank.
        saved: by the forwards of its calls.
        d_o: gradient of the output.
        grads: where those of the tokens are written.
        d_state: where those of the initial states are added, or None.
    """

    def __init__(
        self,
        gather: Gather,
        tokens: Tokens,
        saved: dict[Step, Saved],
        d_o: Tensor,
        grads: Tokens,
        d_state: Tensor | None,
    ) -> None:
        self.local, self.split, self.tokens, self.saved = gather.local, gather.split, tokens, saved
        self.d_o, self.grads, self.d_state = d_o, grads, d_state
        self._staged: dict[Step, tuple[Part, tuple[Tensor, ...]]] = {}

    @property
    def unfinished(self) -> list[Step]:
        """Return the calls whose gradients are not written."""
        return [*self.saved]

    def start(self, step: Step, d_end: Tensor) -> Tensor | None:
        """Return the gradient of what a call started from, given those of its ends, or zeros."""
        _, tensors = self.saved[step]
        part = self._part(step, with_state=False)
        if part.backend.has_stages:
            part = part.started(self.saved[step].state)
            d_start, kept = part.summarise_gradients(tensors, self._d_o(step), d_end)
            self._staged[step] = part, kept
            return d_start
        if all(map(self.split.is_last, step.pieces)):
            return self.finish(step, d_end)
        part = self._part(step)
        if part.backend.has_walks:
            return part.walk_back(self._d_o(step), d_end)
        return part.backward(tensors, self._d_o(step), d_end)[1]

    def finish(self, step: Step, d_end: Tensor) -> Tensor | None:
        """Write all gradients of a call; return that of what it started from, or None."""
        if step in self._staged:
            part, kept = self._staged.pop(step)
            _, tensors = self.saved.pop(step)
            own, d_start = part.resume_gradients(tensors, kept, self._d_o(step), d_end)
        else:
            part = self._part(step)
            _, tensors = self.saved.pop(step)
            own, d_start = part.backward(tensors, self._d_o(step), d_end)
        for whole, grad in zip(self.grads, own, strict=True):
            if whole is not None and grad is not None:
                put(whole, grad, step, slice(None))
        if self.d_state is not None and d_start is not None:
            for piece, d_own in apart(step, d_start):
                if _starts(piece):
                    self.d_state[self.local.rows(piece)] += d_own
        return d_start

    def _part(self, step: Step, *, with_state: bool = True) -> Part:
        state = self.saved[step].state if with_state else None
        return part_of(self.local, self.tokens, step, ALL, state)

    def _d_o(self, step: Step) -> Tensor:
        return take(self.d_o, step, ALL.values)


def _key(piece: Piece) -> Key:
    return piece.sequence, piece.position


def _starts(piece: Piece) -> bool:
    return piece.position == 0


def _continues(piece: Piece) -> bool:
    return piece.position > 0


def _applied(M: Tensor, state: Tensor | None, R: Tensor, is_backward: bool) -> Tensor:
    """Return M state + R, or with Mᵀ backward; R alone at the start of a chain."""
    if state is None:
        return R
    wide = M.double()
    if wide.shape[-1] == 1 and state.shape[-2] != 1:
        return wide * state + R
    with torch.autocast(M.device.type, enabled=False):
        return torch.matmul(wide.mT if is_backward else wide, state) + R
