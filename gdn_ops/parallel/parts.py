"""Take the parts of a rank's call that are computed one by one, and put their results together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from gdn_ops.call.bind import Arguments, Call, Targets, Tokens, bind
from gdn_ops.dispatch.backend import Backend
from gdn_ops.dispatch.registry import select
from gdn_ops.dispatch.results import (
    Forward,
    Grads,
    Summarised,
    checked_forward,
    checked_grads,
    checked_start,
    checked_summary,
    checked_walk,
)
from gdn_ops.kernel_support.host_memory import empty
from gdn_ops.parallel.schedule import Heads, Step
from gdn_ops.parallel.split import Piece, SequenceSplit
from gdn_ops.spec.ops import GATED_DELTA

ALL = Heads(slice(None), slice(None))
"""All heads of a call."""


@dataclass(frozen=True, eq=False)
class LocalCall:
    """Hold the call of one rank: its own tokens, and the state that sequences start from.

    Attributes:
        call: bound, without boundaries; its state is left aside.
        state: (N, HV, K, V) of all sequences, or None for zeros.
        split: which tokens the ranks hold.
        backend: its name, or "auto".
    """

    call: Call
    state: Tensor | None
    split: SequenceSplit
    backend: str

    def rows(self, piece: Piece) -> slice:
        """Return the rows of a tensor of all states that belong to the sequence of a piece."""
        return self.rows_of(piece.sequence)

    def rows_of(self, sequence: int) -> slice:
        """Return the rows of a tensor of all states that belong to a sequence."""
        packed = self.split.is_packed
        return slice(sequence, sequence + 1) if packed else slice(0, self.call.sizes.B)

    def states(self, heads: Heads = ALL, rows: int | None = None) -> Tensor:
        """Return an empty tensor for states of heads, of one piece unless rows are given."""
        s = self.call.sizes
        if rows is None:
            rows = 1 if self.split.is_packed else s.B
        values = len(range(s.HV)[heads.values])
        shape = (rows, values, s.K, s.V)
        return torch.empty(shape, dtype=self.call.compute_dtype, device=self.call.device)

    def started(self, piece: Piece, heads: Heads = ALL) -> Tensor | None:
        """Return the state that the first piece of a sequence starts from; None for zeros."""
        if self.state is None:
            return None
        return self.state[self.rows(piece), heads.values].to(self.call.compute_dtype)


class Arena:
    """Hold memory for what parts save, allocated for all groups of heads at once.

    Many small allocations cost a CPU more page faults than a large one.

    Args:
        count: how many groups of heads there are.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._free: dict[tuple[Any, ...], list[tuple[Tensor, ...]]] = {}

    def of(self, step: Step, part: Part) -> Part:
        """Return a part that may save to memory of the arena."""
        call = part.call
        if not call.needs_grad or call.device.type != "cpu":
            return part
        like = part.backend.saved_like(call.without_memory())
        if not like:
            return part
        key = (step.forward, step.pieces[0], *((x.shape, x.dtype) for x in like))
        if not self._free.get(key):
            whole = [empty((self._count, *x.shape), x.dtype, call.device) for x in like]
            self._free[key] = [*zip(*(x.unbind() for x in whole), strict=True)]
        targets = (call.targets or Targets())._replace(saved=self._free[key].pop())
        return Part(part.backend, replace(call, targets=targets))


class Saved(NamedTuple):
    """Hold what a backward needs of one part.

    Attributes:
        state: what it started from, or None for zeros.
        tensors: what its backend saved.
    """

    state: Tensor | None
    tensors: tuple[Tensor, ...]


class Part(NamedTuple):
    """Hold a part of a call, and the backend that computes it."""

    backend: Backend
    call: Call

    def forward(self) -> Forward:
        """Compute o and the final state."""
        return checked_forward(self.backend, self.call, self.backend.forward(self.call))

    def backward(
        self, saved: tuple[Tensor, ...], d_o: Tensor, d_final: Tensor
    ) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """Return the gradients of the tokens, and of the initial state."""
        return self._checked(self.backend.backward(self.call, saved, d_o, d_final))

    def walk(self) -> Tensor:
        """Compute the final state alone."""
        return checked_walk(self.backend, "walk", self.call, self.backend.walk(self.call))

    def walk_back(self, d_o: Tensor, d_final: Tensor) -> Tensor:
        """Return the gradient of the initial state alone."""
        out = self.backend.walk_back(self.call, d_o, d_final)
        return checked_walk(self.backend, "walk_back", self.call, out)

    def summarise(self) -> Summarised:
        """Compute what the tokens make of any state, the first stage of a forward."""
        return checked_summary(self.backend, self.call, self.backend.summarise(self.call))

    def started(self, state: Tensor | None) -> Part:
        """Return the part with its initial state."""
        return self._replace(call=self.call.with_tensors(self.call.tokens, state))

    def resume(self, kept: tuple[Tensor, ...]) -> Forward:
        """Compute o and the final state, the second stage of a forward."""
        return checked_forward(self.backend, self.call, self.backend.resume(self.call, kept))

    def summarise_gradients(
        self, saved: tuple[Tensor, ...], d_o: Tensor, d_final: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the gradient of the initial state, the first stage of a backward."""
        out = self.backend.summarise_gradients(self.call, saved, d_o, d_final)
        return checked_start(self.backend, self.call, out)

    def resume_gradients(
        self,
        saved: tuple[Tensor, ...],
        kept: tuple[Tensor, ...],
        d_o: Tensor,
        d_final: Tensor,
    ) -> tuple[Sequence[Tensor | None], Tensor | None]:
        """Return what `backward` does, by the second stage of a backward."""
        grads = self.backend.resume_gradients(self.call, saved, kept, d_o, d_final)
        return self._checked(grads)

    def _checked(self, grads: Grads) -> tuple[Sequence[Tensor | None], Tensor | None]:
        tensors = (*self.call.tokens, self.call.state)
        *tokens, state = checked_grads(self.backend, tensors, grads)
        return tokens, state


def part_of(
    local: LocalCall,
    tokens: Tokens,
    step: Step,
    heads: Heads,
    state: Tensor | None,
    targets: Targets | None = None,
    like: Part | None = None,
) -> Part:
    """Return the part of a call that computes a step for a group of heads.

    Args:
        local: the call.
        tokens: its tensors.
        step: which pieces.
        heads: which heads.
        state: what the pieces start from, joined; None for zeros.
        targets: where its results may be written.
        like: a part of the same step for as many heads, checked already.
    """
    call = local.call
    q, k, *others = tokens
    rest = (None if x is None else take(x, step, heads.values) for x in others)
    own = Tokens(take(q, step, heads.keys), take(k, step, heads.keys), *rest)  # type: ignore[arg-type]
    if like is not None:
        return Part(like.backend, replace(like.call, tokens=own, state=state, targets=targets))
    boundaries = None
    if len(step.pieces) > 1:
        boundaries = torch.tensor(step.boundaries, dtype=torch.int64, device=call.device)
    arguments = Arguments(
        own, state, boundaries,
        rule=str(call.rule), scale=call.scale, qk_l2norm=call.qk_l2norm,
        chunk_size=call.chunk_size, return_state=True,
    )  # fmt: skip
    part = replace(
        bind(GATED_DELTA, arguments, check_values=False),
        needs_grad=call.needs_grad, is_part=True, targets=targets,
    )  # fmt: skip
    return Part(select(part, local.backend), part)


def check_parts(local: LocalCall, steps: Iterable[Step], heads: Heads) -> list[Part]:
    """Check that the backend can compute steps, given a state; return their parts.

    Raises:
        BackendUnsupportedError: it cannot.
    """
    rows = 1 if local.split.is_packed else local.call.sizes.B
    return [
        part_of(local, local.call.tokens, step, heads, local.states(heads, rows * len(step.pieces)))
        for step in steps
    ]


def take(x: Tensor, step: Step, heads: slice) -> Tensor:
    """Return the tokens of a step and some heads of (B, T, heads, ...), a view if it can be."""
    runs = step.runs
    own = x[:, runs[0]] if len(runs) == 1 else torch.cat([x[:, run] for run in runs], 1)
    return own[:, :, heads]


def target(whole: Tensor | None, step: Step, heads: slice) -> Tensor | None:
    """Return the view that `put` would write, or None where it is no single one."""
    runs = step.runs
    return None if whole is None or len(runs) > 1 else whole[:, runs[0], heads]


def is_at(x: Tensor, target: Tensor | None) -> bool:
    """Return whether a result has been written to its target."""
    return target is not None and x.data_ptr() == target.data_ptr()


def put(whole: Tensor, part: Tensor, step: Step, heads: slice, *, adds: bool = False) -> None:
    """Write, or add, what `take` would take, unless it has been written there already."""
    done = 0
    for run in step.runs:
        own = whole[:, run, heads]
        source = part[:, done : done + own.shape[1]]
        if adds:
            own += source
        elif own.data_ptr() != source.data_ptr():
            own.copy_(source)
        done += own.shape[1]


def apart(step: Step, states: Tensor) -> Iterator[tuple[Piece, Tensor]]:
    """Yield the pieces of a step, each with its own of their states."""
    if len(step.pieces) == 1:
        yield step.pieces[0], states
        return
    for i, piece in enumerate(step.pieces):
        yield piece, states[i : i + 1]


@overload
def joined(states: Sequence[Tensor]) -> Tensor: ...
@overload
def joined(states: Sequence[Tensor | None]) -> Tensor | None: ...
def joined(states: Sequence[Tensor | None]) -> Tensor | None:
    """Return the states of the pieces of a step as one; None where all of them are None."""
    known = [state for state in states if state is not None]
    if len(known) == 1:
        return known[0].contiguous()
    return torch.cat(known) if known else None
