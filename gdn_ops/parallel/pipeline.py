"""Run a split sequence as a pipeline over groups of heads, which ranks walk one after the other.

No rank computes anything twice while others wait for it. What is lost is the time until the last
rank has work, one group of heads for each rank before it. Where a backend has walks, that is the
time of a walk: a rank with nothing to do at the end computes its first groups only then, and at
first no more of them than the states that the next rank waits for. What is exchanged are the states
at the cuts, K V numbers a head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from gdn_ops.call.bind import Targets, Tokens
from gdn_ops.kernel_support.host_memory import populate
from gdn_ops.parallel import exchange
from gdn_ops.parallel.exchange import Message, Pending
from gdn_ops.parallel.parts import (
    Arena,
    LocalCall,
    Part,
    Saved,
    apart,
    check_parts,
    is_at,
    joined,
    part_of,
    put,
    take,
    target,
)
from gdn_ops.parallel.schedule import Heads, Hop, Schedule, Step, shares_keys
from gdn_ops.parallel.split import Piece

Key = tuple[int, int, int]
"""A piece by sequence and position, and a group of heads."""

Aims = Callable[[Step, Heads], Targets | None]
"""Return where the results of a part may be written."""


class Turn(NamedTuple):
    """Hold a part of a rank whose turn it is.

    Attributes:
        step: its pieces.
        g: the number of its group of heads.
        is_walk: whether only the state is formed that others wait for.
        is_again: whether that has been done, and the rest is left.
    """

    step: Step
    g: int
    is_walk: bool = False
    is_again: bool = False


class Pipeline:
    """Run the steps of one rank, forward or backward.

    Args:
        local: the call.
        schedule: the steps.
        groups: of heads, in the order in which they are walked.
    """

    def __init__(self, local: LocalCall, schedule: Schedule, groups: Sequence[Heads]) -> None:
        self.local, self.schedule, self.groups = local, schedule, groups
        self.group = local.split.group
        # Kept until it has gone.
        self._sent: list[Tensor] = []
        self._checked: dict[tuple[int, ...], Part] = {}

    def check(self) -> None:
        """Check that the backend can compute the parts of this rank.

        Raises:
            BackendUnsupportedError: it cannot.
        """
        heads = self.groups[0]
        parts = check_parts(self.local, self.schedule.steps, heads)
        for step, part in zip(self.schedule.steps, parts, strict=True):
            self._checked[_shape(step, heads)] = part

    def forward(self, tokens: Tokens, o: Tensor, finals: Tensor | None) -> list[Saved]:
        """Compute o and the final states of sequences that end here.

        Args:
            tokens: those of this rank.
            o: (B, T_local, HV, V), written.
            finals: (N, HV, K, V), the final states are written to; None if they are not wanted.

        Returns:
            What the backward needs of every part, in the order of `_parts`.
        """
        saved: dict[tuple[Step, int], Saved] = {}
        after: dict[Key, Tensor] = {}
        arena = Arena(len(self.groups))

        def targets(step: Step, heads: Heads) -> Targets:
            return Targets(o=target(o, step, heads.values))

        views, kind = self._views(tokens, targets), "states of gated_delta"
        walks = self._walks(tokens, targets, is_backward=False)
        for before, turn in self._ticks(kind, after, [o], walks, is_backward=False):
            step, heads = turn.step, self.groups[turn.g]
            state = self._started(turn, before)
            known = views.get((step, turn.g)) or self._part(tokens, step, heads, targets)
            part = known.started(state)
            if turn.is_walk:
                _keep(after, turn, part.walk())
                continue
            out = arena.of(step, part).forward()
            if not is_at(out.o, _aims(part).o):
                put(o, out.o, step, heads.values)
            if not turn.is_again:
                _keep(after, turn, out.final_state)
            for piece, own in apart(step, out.final_state):
                if finals is not None and self.local.split.is_last(piece):
                    finals[self.local.rows(piece), heads.values] = own
            if self.local.call.needs_grad:
                saved[step, turn.g] = Saved(state, out.saved)
        return [saved[part_] for part_ in self._parts()] if saved else []

    def backward(
        self,
        tokens: Tokens,
        saved: Sequence[Saved],
        d_o: Tensor,
        d_finals: Tensor | None,
        grads: Tokens,
        d_state: Tensor | None,
    ) -> None:
        """Compute the gradients.

        Args:
            tokens: those of this rank.
            saved: what `forward` returned.
            d_o: (B, T_local, HV, V).
            d_finals: (N, HV, K, V), or None for zeros.
            grads: like tokens, written, or added to where groups share key heads.
            d_state: (N, HV, K, V) of the state that sequences start from, added to; or None.
        """
        kept = dict(zip(self._parts(), saved, strict=True))
        adds = shares_keys(self.groups)
        before: dict[Key, Tensor] = {}
        fresh = [] if adds else [x for x in grads if x is not None]

        def targets(step: Step, heads: Heads) -> Targets | None:
            return None if adds else _gradient_targets(grads, step, heads)

        views, kind = self._views(tokens, targets), "gradients of states"
        walks = self._walks(tokens, targets, is_backward=True)
        for after, turn in self._ticks(kind, before, fresh, walks, is_backward=True):
            step, heads, of_part = turn.step, self.groups[turn.g], kept[turn.step, turn.g]
            d_ends = self._d_final(turn, after, d_finals)
            own_d_o = take(d_o, step, heads.values)
            known = views.get((step, turn.g)) or self._part(tokens, step, heads, targets)
            part = known.started(of_part.state)
            if turn.is_walk:
                _keep(before, turn, part.walk_back(own_d_o, d_ends))
                continue
            own, d_start = part.backward(of_part.tensors, own_d_o, d_ends)
            aims = _aims(part).of_tokens
            for i, (whole, grad, aim) in enumerate(zip(grads, own, aims, strict=True)):
                if whole is not None and grad is not None and not is_at(grad, aim):
                    which = heads.keys if i < 2 else heads.values
                    put(whole, grad, step, which, adds=adds and i < 2)
            if d_start is None:
                continue
            if not turn.is_again:
                _keep(before, turn, d_start)
            for piece, d_own in apart(step, d_start):
                if piece.position == 0 and d_state is not None:
                    d_state[self.local.rows(piece), heads.values] += d_own

    def _views(self, tokens: Tokens, targets: Aims) -> dict[tuple[Step, int], Part]:
        """Return the parts whose tensors are views, without their states.

        Taken one after another each costs less than between two that are computed, where caches are
        full of other things.
        """
        steps = [step for step in self.schedule.steps if len(step.runs) == 1]
        return {
            (step, g): self._part(tokens, step, heads, targets)
            for step in steps
            for g, heads in enumerate(self.groups)
        }

    def _part(self, tokens: Tokens, step: Step, heads: Heads, targets: Aims) -> Part:
        """Return a part without its state; of those with as many heads the first is checked."""
        key = _shape(step, heads)
        like = self._checked.get(key)
        part = part_of(self.local, tokens, step, heads, None, targets(step, heads), like)
        return self._checked.setdefault(key, part) if like is None else part

    def _parts(self) -> Iterator[tuple[Step, int]]:
        """Yield the steps of this rank with their groups, in the order of a forward."""
        for tick in range(self.schedule.ticks + len(self.groups) - 1):
            for step in self.schedule.steps:
                if 0 <= tick - step.forward < len(self.groups):
                    yield step, tick - step.forward

    def _ticks(
        self,
        kind: str,
        made: dict[Key, Tensor],
        fresh: Sequence[Tensor],
        walks: int,
        *,
        is_backward: bool,
    ) -> Iterator[tuple[dict[Key, Tensor], Turn]]:
        """Yield the parts of this rank when all that they start from has come.

        Those that are walked come again behind all others.

        Args:
            kind: what is exchanged.
            made: what parts have made, by piece and group: states behind pieces, or gradients of
                those before them.
            fresh: uninitialised tensors, which parts write their results to.
            walks: how many of the first groups are walked first.
            is_backward: whether the chains are walked from their ends.

        Yields:
            What came for pieces by piece and group, and the part.
        """
        rank, groups = self.local.split.rank, len(self.groups)
        hops: dict[int, list[tuple[Hop, int]]] = defaultdict(list)
        for hop in self._turned(is_backward):
            if rank in (hop.source.rank, hop.target.rank):
                for g in range(groups):
                    hops[self._tick(hop.target, is_backward) + g].append((hop, g))
        came: dict[Key, Tensor] = {}
        receiving: dict[int, list[Pending]] = {}
        if self.local.call.device.type == "cpu":
            # Ahead of time: what comes then waits for no thread of ours. On an accelerator a
            # receive holds its stream, and two ranks that both wait would do so for ever.
            receiving = {t: self._exchange(kind, hops[t], None, came)[0] for t in sorted(hops)}
        kept: list[Pending] = []
        for tick in range(self.schedule.ticks + groups - 1):
            own = hops.pop(tick, [])
            works, sending = self._exchange(kind, own, made, None if receiving else came)
            coming = receiving.get(tick, works)
            if coming:
                # Whoever waits before it computes has time for the page faults of its results.
                fresh = _populated(fresh)
            exchange.wait(self.group, kind, coming)
            for hop, g in own:
                if hop.source.rank == hop.target.rank:
                    came[_key(hop.target, g)] = made.pop(_key(hop.source, g))
            kept += sending
            for step in self.schedule.steps:
                g = tick - (step.backward if is_backward else step.forward)
                if 0 <= g < groups:
                    fresh = fresh if g < walks else _populated(fresh)
                    yield came, Turn(step, g, is_walk=g < walks)
        for g in range(walks):
            fresh = _populated(fresh)
            yield came, Turn(self.schedule.steps[0], g, is_again=True)
        exchange.wait(self.group, kind, kept)

    def _exchange(
        self,
        kind: str,
        hops: Sequence[tuple[Hop, int]],
        made: dict[Key, Tensor] | None,
        came: dict[Key, Tensor] | None,
    ) -> tuple[list[Pending], list[Pending]]:
        """Start to send what was made, and to receive what comes; return what waits for either."""
        rank = self.local.split.rank
        sent, received = [], []
        for (source, behind), g in hops:
            if source.rank == behind.rank:
                continue
            if source.rank == rank and made is not None:
                state = made.pop(_key(source, g)).contiguous()
                self._sent.append(state)
                sent.append(Message(behind.rank, state))
            elif behind.rank == rank and came is not None:
                came[_key(behind, g)] = self.local.states(self.groups[g])
                received.append(Message(source.rank, came[_key(behind, g)]))
        return exchange.transfer(self.group, kind, sent, received)

    def _turned(self, is_backward: bool) -> Iterator[Hop]:
        """Yield the hops in an order that is the same on all ranks."""
        for hop in self.schedule.hops:
            yield Hop(hop.target, hop.source) if is_backward else hop

    def _tick(self, piece: Piece, is_backward: bool) -> int:
        step = self.schedule.of(piece)
        return step.backward if is_backward else step.forward

    def _walks(self, tokens: Tokens, targets: Aims, *, is_backward: bool) -> int:
        """Return how many groups are walked first, for others that wait, and computed at the end.

        As many as this rank has nothing to do for behind its last one: it loses no time. A rank
        with several steps has such times in between, which walks would fill only in part.
        """
        steps = self.schedule.steps
        if len(steps) != 1:
            return 0
        own = steps[0].backward if is_backward else steps[0].forward
        part = self._part(tokens, steps[0], self.groups[0], targets)
        idle = self.schedule.ticks - 1 - own
        return min(idle, len(self.groups)) if part.backend.has_walks else 0

    def _started(self, turn: Turn, came: dict[Key, Tensor]) -> Tensor | None:
        """Return the states that the pieces of a part start from, joined; None for zeros."""
        states = [
            _taken(came, piece, turn)
            if piece.position
            else self.local.started(piece, self.groups[turn.g])
            for piece in turn.step.pieces
        ]
        # Pieces of a step stand at one place: all start sequences, or none does.
        return joined(states)

    def _d_final(self, turn: Turn, came: dict[Key, Tensor], d_finals: Tensor | None) -> Tensor:
        """Return the gradients of the states behind the pieces of a part, joined."""
        heads = self.groups[turn.g]
        own: list[Tensor] = []
        for piece in turn.step.pieces:
            if not self.local.split.is_last(piece):
                own.append(_taken(came, piece, turn))
            elif d_finals is None:
                own.append(self.local.states(heads).zero_())
            else:
                own.append(d_finals[self.local.rows(piece), heads.values])
        return joined(own)


def _populated(fresh: Sequence[Tensor]) -> Sequence[Tensor]:
    """Take the page faults of uninitialised tensors; return those that are left, none."""
    for x in fresh:
        populate(x)
    return ()


def _taken(came: dict[Key, Tensor], piece: Piece, turn: Turn) -> Tensor:
    """Return what came for a piece; it is kept for another turn behind a walk."""
    key = _key(piece, turn.g)
    return came[key] if turn.is_walk else came.pop(key)


def _keep(made: dict[Key, Tensor], turn: Turn, states: Tensor) -> None:
    """Keep what the pieces of a part have made of their states until it is sent."""
    for piece, own in apart(turn.step, states):
        made[_key(piece, turn.g)] = own


def _shape(step: Step, heads: Heads) -> tuple[int, ...]:
    """Return what tells parts apart but for which heads they have."""
    return step.pieces[0].local, *(which.stop - which.start for which in heads)


def _gradient_targets(grads: Tokens, step: Step, heads: Heads) -> Targets:
    """Return where the gradients of a part may be written."""
    q, k = (target(x, step, heads.keys) for x in grads[:2])
    others = (target(x, step, heads.values) for x in grads[2:])
    return Targets(None, q, k, *others)  # type: ignore[arg-type]


def _aims(part: Part) -> Targets:
    """Return where the results of a part may have been written."""
    return part.call.targets or Targets()


def _key(piece: Piece, g: int) -> Key:
    return piece.sequence, piece.position, g
