"""Run a split sequence as a pipeline over groups of heads, which ranks walk one after the other.

No rank computes anything twice. What is lost is the time until the last rank has work, one group
of heads for each rank before it; what is exchanged are the states at the cuts, K V numbers a head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from gdn_ops.call.bind import Targets, Tokens
from gdn_ops.kernel_support.host_memory import touch
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
"""Where the results of a part may be written."""


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
            What the backward needs of every part, in the order in which they were computed.
        """
        saved: list[Saved] = []
        after: dict[Key, Tensor] = {}
        arena = Arena(len(self.groups))

        def targets(step: Step, heads: Heads) -> Targets:
            return Targets(o=target(o, step, heads.values))

        views, kind = self._views(tokens, targets), "states of gated_delta"
        for before, step, g in self._ticks(kind, after, [o], is_backward=False):
            heads = self.groups[g]
            state = self._started(step, g, before)
            part = views.pop((step, g), None) or self._part(tokens, step, heads, targets)
            out = arena.of(step, part.started(state)).forward()
            if not is_at(out.o, _aims(part).o):
                put(o, out.o, step, heads.values)
            for piece, own in apart(step, out.final_state):
                after[_key(piece, g)] = own
                if finals is not None and self.local.split.is_last(piece):
                    finals[self.local.rows(piece), heads.values] = own
            if self.local.call.needs_grad:
                saved.append(Saved(state, out.saved))
        return saved

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
        for after, step, g in self._ticks(kind, before, fresh, is_backward=True):
            heads, of_part = self.groups[g], kept[step, g]
            part = views.pop((step, g), None) or self._part(tokens, step, heads, targets)
            part = part.started(of_part.state)
            d_final = self._d_final(step, g, after, d_finals)
            own, d_start = part.backward(of_part.tensors, take(d_o, step, heads.values), d_final)
            aims = _aims(part).of_tokens
            for i, (whole, grad, aim) in enumerate(zip(grads, own, aims, strict=True)):
                if whole is not None and grad is not None and not is_at(grad, aim):
                    which = heads.keys if i < 2 else heads.values
                    put(whole, grad, step, which, adds=adds and i < 2)
            if d_start is None:
                continue
            for piece, d_own in apart(step, d_start):
                if piece.position:
                    before[_key(piece, g)] = d_own
                elif d_state is not None:
                    d_state[self.local.rows(piece), heads.values] += d_own

    def _views(self, tokens: Tokens, targets: Aims) -> dict[tuple[Step, int], Part]:
        """Return the parts whose tensors are views, without their states.

        Taken one after another they cost a fifth of what each costs between two that are computed.
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
        """Yield the steps of this rank with their groups, as `forward` computes them."""
        for tick in range(self.schedule.ticks + len(self.groups) - 1):
            for step in self.schedule.steps:
                if 0 <= tick - step.forward < len(self.groups):
                    yield step, tick - step.forward

    def _ticks(
        self, kind: str, made: dict[Key, Tensor], fresh: Sequence[Tensor], *, is_backward: bool
    ) -> Iterator[tuple[dict[Key, Tensor], Step, int]]:
        """Yield the parts of this rank when all that they start from has come.

        Args:
            kind: what is exchanged.
            made: what parts have made, by piece and group: states behind pieces, or gradients of
                those before them.
            fresh: uninitialised tensors, which parts write their results to.
            is_backward: whether the chains are walked from their ends.

        Yields:
            What came for pieces by piece and group, the step, and the number of the group.
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
                for x in fresh:
                    touch(x)
            exchange.wait(self.group, kind, coming)
            for hop, g in own:
                if hop.source.rank == hop.target.rank:
                    came[_key(hop.target, g)] = made.pop(_key(hop.source, g))
            kept += sending
            for step in self.schedule.steps:
                g = tick - (step.backward if is_backward else step.forward)
                if 0 <= g < groups:
                    fresh = ()
                    yield came, step, g
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

    def _started(self, step: Step, g: int, came: dict[Key, Tensor]) -> Tensor | None:
        """Return the states that the pieces of a step start from, joined; None for zeros."""
        states = [
            came.pop(_key(piece, g))
            if piece.position
            else self.local.started(piece, self.groups[g])
            for piece in step.pieces
        ]
        # Pieces of a step stand at one place: all start sequences, or none does.
        return joined(states)

    def _d_final(
        self, step: Step, g: int, came: dict[Key, Tensor], d_finals: Tensor | None
    ) -> Tensor:
        """Return the gradients of the states behind the pieces of a step, joined."""
        heads = self.groups[g]
        own: list[Tensor] = []
        for piece in step.pieces:
            if not self.local.split.is_last(piece):
                own.append(came.pop(_key(piece, g)))
            elif d_finals is None:
                own.append(self.local.states(heads).zero_())
            else:
                own.append(d_finals[self.local.rows(piece), heads.values])
        return joined(own)


def _shape(step: Step, heads: Heads) -> tuple[int, ...]:
    """Return what tells parts apart but for which heads they have."""
    return step.pieces[0].local, *(which.stop - which.start for which in heads)


def _gradient_targets(grads: Tokens, step: Step, heads: Heads) -> Targets:
    """Return where the gradients of a part may be written."""
    q, k = (target(x, step, heads.keys) for x in grads[:2])
    v, alpha, log_alpha, beta = (target(x, step, heads.values) for x in grads[2:])
    return Targets(None, q, k, v, alpha, log_alpha, beta)


def _aims(part: Part) -> Targets:
    """Return where the results of a part may have been written."""
    return part.call.targets or Targets()


def _key(piece: Piece, g: int) -> Key:
    return piece.sequence, piece.position, g
