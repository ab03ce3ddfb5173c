"""Cut sequences into segments, so that the working set stays in cache.

On a CPU one batched product over all chunks runs at a fifth of the speed of one that stays
in cache, so nothing as long as the sequence is formed except inputs, outputs and, for a
backward, the state at every few segments. For the same reason packed sequences run side by side,
in cohorts of those about as long: what a segment costs besides arithmetic is paid once per cohort,
however many sequences are packed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from gdn_ops.backends.torch.chunk_backward import SegmentGrads, backward_segment
from gdn_ops.backends.torch.chunk_forward import Segment, advance_segment, forward_segment
from gdn_ops.backends.torch.spans import EvenSpan, GatheredSpan, Numbers, Span
from gdn_ops.call.bind import Call
from gdn_ops.call.transforms import integers

MOST_STATES = 64
"""States kept for a backward; a longer sequence keeps every n-th and recomputes the rest."""

COHORT_BYTES = 8 << 20
"""Bytes of the operands and states of several sequences that run side by side, at most. Measured on
a CPU with 1 MiB of L2 per core and 32 MiB of L3, where 8 and 16 MiB are about equal."""


@dataclass(frozen=True)
class SegmentPlan:
    """Say how sequences are cut into segments, and which functions run these.

    Attributes:
        chunk_size: C, tokens per chunk.
        chunks: n, chunks per segment.
        is_static: whether every segment has n chunks of C tokens, for compiled functions. Without,
            a sequence shorter than a chunk has a chunk of a power of two of tokens.
        side_by_side: how packed sequences that share their segments run, and rows of a batch that
            fill at most half a chunk; None: like any other.
        forward, advance, backward: like `forward_segment`, `advance_segment` and
            `backward_segment`.
    """

    chunk_size: int
    chunks: int
    is_static: bool = False
    side_by_side: SegmentPlan | None = None
    forward: Callable[[Segment, Tensor, float, bool, Sequence[Tensor]], Tensor] = forward_segment
    advance: Callable[[Segment, Tensor, float, bool], Tensor] = advance_segment
    backward: Callable[[Segment, Tensor, Tensor, Tensor, float, bool], SegmentGrads] = (
        backward_segment
    )

    def segments_per_state(self, tokens: int) -> int:
        """Return the number of segments from one kept state to the next."""
        segments = -(-tokens // (self.chunk_size * self.chunks))
        return torch.sym_max(1, -(-segments // MOST_STATES))  # type: ignore[no-any-return]

    def shape_of_states(self, call: Call) -> tuple[int, ...]:
        """Return the shape of the kept states; with cu_seqlens, an upper bound.

        That at the start of a sequence is not kept.
        """
        s = call.sizes
        stride = self.chunk_size * self.chunks * self.segments_per_state(s.T)
        shape = s.H, s.K, s.HV // s.H * s.V
        if call.cu_seqlens is None:
            return torch.sym_max(0, -(-s.T // stride) - 1) * s.B, *shape
        if self.side_by_side is not None:
            others = self.side_by_side.shape_of_states(call)[0]
            return torch.sym_max(s.T // stride, others), *shape
        return s.T // stride, *shape

    def chunk_of(self, lengths: Numbers) -> Numbers:
        """Return the tokens of a chunk of sequences, which depend on their own length alone."""
        full = numpy.full_like(lengths, self.chunk_size)
        if self.is_static:
            return full
        powers: Numbers = 1 << numpy.ceil(numpy.log2(numpy.maximum(lengths, 1))).astype(numpy.int64)
        smaller: Numbers = numpy.minimum(powers, full)
        return smaller

    def cohorts(self, call: Call) -> Iterator[Cohort]:
        """Yield what runs one after the other: rows of a batch, or packed sequences."""
        if call.cu_seqlens is not None:
            yield from self._packed_cohorts(call, call.cu_seqlens)
            return
        s, lengths = call.sizes, numpy.full(1, call.sizes.T)
        plan = self
        if self.side_by_side is not None and s.B > 1 and self.chunk_size // 2 >= s.T:
            # Chunks of a fixed size would be padding for the most part.
            plan = self.side_by_side
        size = int(plan.chunk_of(lengths)[0])
        most = s.B if plan.is_static else _most_rows(call, size, min(s.T, size * plan.chunks))
        for first in range(0, s.B, max(1, most)):
            which = slice(first, min(s.B, first + most))
            yield Cohort(plan, which, which.stop - first, lengths, size, call.device)

    def _packed_cohorts(self, call: Call, cu_seqlens: Tensor) -> Iterator[Cohort]:
        """Yield packed sequences from the longest to the shortest, as many as stay in cache."""
        bounds = numpy.asarray(integers(cu_seqlens), numpy.int64)
        lengths = numpy.diff(bounds)
        order = numpy.argsort(-lengths, kind="stable")
        starts, lengths = bounds[:-1][order], lengths[order]
        shared = self.side_by_side or self
        sizes = shared.chunk_of(lengths)
        first = 0
        while first < len(order):
            size, length = int(sizes[first]), int(lengths[first])
            tokens = min(size * shared.chunks, -(-length // size) * size)
            last = int(numpy.searchsorted(-sizes, -size, side="right"))
            last = min(last, first + _most_rows(call, size, tokens))
            plan = shared
            if last - first == 1 and shared is not self:
                plan, size = self, self.chunk_size
            some = slice(first, last)
            index = _indices(order[some], call.device)
            yield Cohort(plan, index, last - first, lengths[some], size, call.device, starts[some])
            first = last


def _most_rows(call: Call, chunk_size: int, tokens: int) -> int:
    """Return how many sequences may run a segment of so many tokens side by side."""
    s = call.sizes
    per_token = s.H * 2 * s.K + s.HV * (2 * s.V + 3 * chunk_size)
    numbers = tokens * per_token + s.HV * s.K * s.V
    return max(1, COHORT_BYTES // (numbers * call.compute_dtype.itemsize))


def _indices(which: Numbers, device: torch.device) -> slice | Tensor:
    """Return indices as a slice, if they are one after the other, or as a tensor."""
    first, last = int(which[0]), int(which[-1])
    if last - first == len(which) - 1 and (numpy.diff(which) == 1).all():
        return slice(first, last + 1)
    return torch.from_numpy(which).to(device)


@dataclass(frozen=True)
class Cohort:
    """Hold sequences that run side by side, the longest first.

    Attributes:
        plan: how they run.
        sequences: which of the call, by index.
        rows: how many.
        lengths: tokens of each; of a batch, those of all.
        chunk_size: tokens per chunk.
        device: that of the call.
        starts: the first token of each, of packed ones.
    """

    plan: SegmentPlan
    sequences: slice | Tensor
    rows: int
    lengths: Numbers
    chunk_size: int
    device: torch.device
    starts: Numbers | None = None

    def rounds(self) -> list[list[Span]]:
        """Return the segments in their order; in each, the spans of the rows that are not over."""
        size, chunks, longest = self.chunk_size, self.plan.chunks, int(self.lengths[0])
        steps = range(0, longest, size * chunks)
        place = self._place()
        if place is None:
            return [self._gathered(begin) for begin in steps]
        rounds: list[list[Span]] = []
        for begin in steps:
            end = min(begin + size * chunks, longest)
            needed = chunks if self.plan.is_static else -(-(end - begin) // size)
            rounds.append([EvenSpan(slice(0, self.rows), size, needed, begin, end, place)])
        return rounds

    def _place(self) -> tuple[int, int, int] | slice | None:
        """Return the `place` of spans, if rows are equally long and lie side by side."""
        if self.starts is None:
            assert isinstance(self.sequences, slice)
            return self.sequences
        length, first = int(self.lengths[0]), int(self.starts[0])
        places = first + length * numpy.arange(self.rows)
        if self.lengths[-1] == length and (self.starts == places).all():
            return first, self.rows, length
        return None

    def _gathered(self, begin: int) -> list[Span]:
        """Return the spans of one segment: one for each number of chunks, the most first."""
        assert self.starts is not None
        left = self.lengths[self.lengths > begin] - begin
        needed = numpy.minimum(-(-left // self.chunk_size), self.plan.chunks)
        edges = [0, *(numpy.flatnonzero(numpy.diff(needed)) + 1).tolist(), len(left)]
        spans: list[Span] = []
        for a, b in itertools.pairwise(edges):
            begins, n = self.starts[a:b] + begin, int(needed[a])
            spans.append(
                GatheredSpan.of(slice(a, b), begins, left[a:b], self.chunk_size, n, self.device)
            )
        return spans
