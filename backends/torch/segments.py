"""Cut sequences into segments and load these, so that the working set stays in cache.

On a CPU one batched product over all chunks runs at a fifth of the speed of one that stays
in cache, so nothing as long as the sequence is formed except inputs, outputs and, for a
backward, the state at every few segments.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gdn_ops.backends.torch.chunk_backward import SegmentGrads, backward_segment
from gdn_ops.backends.torch.chunk_forward import Segment, advance_segment, forward_segment
from gdn_ops.call.bind import Call
from gdn_ops.call.numerics import LogGate, l2norm, log_gate

MOST_STATES = 64
"""States kept for a backward; a longer sequence keeps every n-th and recomputes the rest."""


class TokenSpan(NamedTuple):
    """Describe one segment: its tokens start..stop, and how many chunks hold them."""

    start: int
    stop: int
    chunks: int


@dataclass(frozen=True)
class SegmentPlan:
    """Say how sequences are cut into segments, and which functions run these.

    Attributes:
        chunk_size: C, tokens per chunk.
        chunks: n, chunks per segment.
        pad_segments: whether a short last segment is padded to n chunks (static shapes).
        forward, advance, backward: like `forward_segment`, `advance_segment` and
            `backward_segment`.
    """

    chunk_size: int
    chunks: int
    pad_segments: bool = False
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
        """Return the shape of the kept states; with cu_seqlens, an upper bound."""
        s = call.sizes
        stride = self.chunk_size * self.chunks * self.segments_per_state(s.T)
        if call.cu_seqlens is not None:
            return s.T // stride + s.N, s.H, s.K, s.HV // s.H * s.V
        return -(-s.T // stride), s.B * s.H, s.K, s.HV // s.H * s.V

    def spans(self, start: int, stop: int) -> list[TokenSpan]:
        """Cut the tokens start..stop into segments."""
        spans = []
        for a in range(start, stop, self.chunk_size * self.chunks):
            b = min(a + self.chunk_size * self.chunks, stop)
            needed = -(-(b - a) // self.chunk_size)
            spans.append(TokenSpan(a, b, self.chunks if self.pad_segments else needed))
        return spans


def sequences(call: Call) -> Iterator[tuple[slice, int, int]]:
    """Yield (which states, first token, end) of every sequence; a batch counts as one."""
    if call.cu_seqlens is None:
        if call.sizes.B:
            yield slice(0, call.sizes.N), 0, call.sizes.T
        return
    bounds = call.cu_seqlens.tolist()
    for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
        yield slice(n, n + 1), start, stop


def pack_state(state: Tensor, key_heads: int) -> Tensor:
    """Reshape (N, HV, K, V) to (N H, K, R V)."""
    x: Tensor = state.unflatten(1, (key_heads, -1)).transpose(2, 3)
    return x.flatten(3).flatten(0, 1)


def unpack_state(state: Tensor, key_heads: int, heads: int) -> Tensor:
    """Reshape (N H, K, R V) to a view (N, HV, K, V) split as (N, H, R, K, V)."""
    x: Tensor = state.unflatten(0, (-1, key_heads)).unflatten(-1, (heads, -1))
    return x.transpose(2, 3)


class SegmentLoader:
    """Hand out the tensors of a call segment by segment, and store results of segments."""

    def __init__(self, call: Call, chunk_size: int) -> None:
        self.call = call
        self.chunk_size = chunk_size
        self.dtype = call.compute_dtype
        self.gate: LogGate | None = None
        if call.rule.has_decay:
            self.gate = log_gate(call.tokens.alpha, call.tokens.log_alpha, self.dtype)
        s = call.sizes
        self.beta = (
            torch.ones(s.B, s.T, s.HV, dtype=self.dtype, device=call.device)
            if call.tokens.beta is None
            else call.tokens.beta.to(self.dtype)
        )

    def segment(self, span: TokenSpan) -> Segment:
        """Return the operands of one segment; padded tokens are the identity (α=1, β=0)."""
        call = self.call
        G = z = None
        if self.gate is not None:
            # §4 G and z, inclusive sums within the chunk           [C]
            G = self._load(self.gate.log, span).flatten(1, 2).cumsum(-1)
            if self.gate.zero is not None:
                z = self._load(self.gate.zero, span).flatten(1, 2).cumsum(-1)
        qk = torch.cat([self._load(x, span) for x in (call.tokens.q, call.tokens.k)], 4)
        qk = qk.flatten(1, 3).to(self.dtype)
        beta = self._load(self.beta, span).flatten(1, 2).contiguous()
        return Segment(
            l2norm(qk) if call.qk_l2norm else qk, self.values(call.tokens.v, span), beta, G, z
        )

    def keys(self, x: Tensor, span: TokenSpan) -> Tensor:
        """Return tokens of (B, T, H, K) as (n, G, C, K) in the compute dtype."""
        return self._load(x, span).flatten(1, 3).to(self.dtype)

    def values(self, x: Tensor, span: TokenSpan) -> Tensor:
        """Return tokens of (B, T, HV, V) as (n, G, R, C, V) in the compute dtype."""
        return self._load(x, span).flatten(1, 2).to(self.dtype)

    def _load(self, x: Tensor, span: TokenSpan) -> Tensor:
        """Return tokens of (B, T, H R, ...) as (n, B, H, R, C, ...), padded with zeros."""
        x = x[:, span.start : span.stop]
        missing = span.chunks * self.chunk_size - x.shape[1]
        if missing:
            x = functional.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
        x = x.unflatten(1, (span.chunks, self.chunk_size)).unflatten(3, (self.call.sizes.H, -1))
        return x.movedim((1, 0, 3, 4, 2), (0, 1, 2, 3, 4))

    def store(self, into: Tensor, span: TokenSpan, x: Tensor) -> None:
        """Write (n, G, R, C, ...) into tokens of (B, T, H R, ...), without the padding."""
        H, tokens = self.call.sizes.H, span.stop - span.start
        # to (B, n, C, H, R, ...)
        x = x.unflatten(1, (-1, H)).movedim((1, 0, 4), (0, 1, 2))
        target = into[:, span.start : span.stop].unflatten(2, (H, -1))
        if tokens == span.chunks * self.chunk_size:
            target.unflatten(1, x.shape[1:3]).copy_(x)
        else:
            target.copy_(x.flatten(1, 2)[:, :tokens])

    def output_views(self, o: Tensor, span: TokenSpan) -> list[Tensor]:
        """Return the chunks of a segment in o (B, T, HV, V) as views (B, H, R, c, V)."""
        tokens = o[:, span.start : span.stop].unflatten(2, (self.call.sizes.H, -1))
        return [chunk.permute(0, 2, 3, 1, 4) for chunk in tokens.split(self.chunk_size, 1)]

    def initial_state(self, states: slice) -> Tensor:
        """Return the packed state that the sequences `states` start from, in memory of its own."""
        s, state = self.call.sizes, self.call.state
        if state is not None:
            return pack_state(state[states].to(self.dtype, copy=True), s.H)
        shape = ((states.stop - states.start) * s.H, s.K, s.HV // s.H * s.V)
        return torch.zeros(shape, dtype=self.dtype, device=self.call.device)
