"""Load segments of a call in the shapes of `chunk_forward`, and store results of segments."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_ops.backends.torch.chunk_forward import Segment
from gdn_ops.backends.torch.segments import Cohort
from gdn_ops.backends.torch.spans import Span
from gdn_ops.call.bind import Call
from gdn_ops.call.numerics import LogGate, l2norm, log_gate


def pack_state(state: Tensor, key_heads: int) -> Tensor:
    """Reshape (N, HV, K, V) to (N H, K, R V)."""
    x: Tensor = state.unflatten(1, (key_heads, -1)).transpose(2, 3)
    return x.flatten(3).flatten(0, 1)


def unpack_state(state: Tensor, key_heads: int, heads: int) -> Tensor:
    """Reshape (N H, K, R V) to a view (N, HV, K, V) split as (N, H, R, K, V)."""
    x: Tensor = state.unflatten(0, (-1, key_heads)).unflatten(-1, (heads, -1))
    return x.transpose(2, 3)


def joined(rows: list[Tensor]) -> Tensor:
    """Return rows of packed states below each other."""
    rows = [x for x in rows if x.shape[0]]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def wide_gates(call: Call) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return alpha, erase and write with a channel axis, which is 1 for one number per head.

    Args:
        call: one whose gates are wide (docs/math.md §9), of any op.

    Returns:
        alpha (..., HV, K) or (..., HV, 1), or None for 1; erase likewise, and write (..., HV, V) or
        (..., HV, 1), both None where beta stands for them. All are in the compute dtype.
    """
    tokens, widths, dtype = call.tokens, call.widths, call.compute_dtype

    def gate(x: Tensor | None, width: str) -> Tensor:
        if x is None:
            return torch.ones_like(tokens.v[..., :1], dtype=dtype)
        return x.to(dtype) if width == "channel" else x.to(dtype).unsqueeze(-1)

    alpha = None
    if tokens.log_alpha is not None:
        alpha = gate(tokens.log_alpha, widths.decay).exp()
    elif tokens.alpha is not None:
        alpha = gate(tokens.alpha, widths.decay)
    if not widths.apart:
        return alpha, None, None
    return alpha, gate(tokens.erase, widths.erase), gate(tokens.write, widths.write)


class SegmentLoader:
    """Hand out the tensors of a call segment by segment, and store results of segments."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.dtype = call.compute_dtype
        self.gate: LogGate | None = None
        self.alpha: Tensor | None = None
        self.erase: Tensor | None = None
        self.write: Tensor | None = None
        if call.widths.wide:
            self.alpha, self.erase, self.write = wide_gates(call)
        elif call.widths.decay == "scalar":
            self.gate = log_gate(call.tokens.alpha, call.tokens.log_alpha)
        s = call.sizes
        self.beta = (
            torch.ones(s.B, s.T, s.HV, dtype=self.dtype, device=call.device)
            if call.tokens.beta is None
            else call.tokens.beta.to(self.dtype)
        )

    def segment(self, span: Span) -> Segment:
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
            l2norm(qk) if call.qk_l2norm else qk,
            self.values(call.tokens.v, span),
            beta,
            G,
            z,
            None if self.alpha is None else self._decays(self.alpha, span),
            None if self.erase is None else self.values(self.erase, span),
            None if self.write is None else self.values(self.write, span),
        )

    def _decays(self, alpha: Tensor, span: Span) -> Tensor:
        """Return decays with a channel axis as (n, G, R, C, K), 1 where there is padding."""
        loaded = self.values(alpha, span)
        is_token = self.values(torch.ones_like(alpha[..., :1]), span)
        return loaded + (1 - is_token)

    def keys(self, x: Tensor, span: Span) -> Tensor:
        """Return tokens of (B, T, H, K) as (n, G, C, K) in the compute dtype."""
        return self._load(x, span).flatten(1, 3).to(self.dtype)

    def values(self, x: Tensor, span: Span) -> Tensor:
        """Return tokens of (B, T, HV, V) as (n, G, R, C, V) in the compute dtype."""
        return self._load(x, span).flatten(1, 2).to(self.dtype)

    def _load(self, x: Tensor, span: Span) -> Tensor:
        """Return tokens of (B, T, H R, ...) as (n, rows, H, R, C, ...), padded with zeros."""
        x = span.read(x)
        x = x.unflatten(1, (span.chunks, span.chunk_size)).unflatten(3, (self.call.sizes.H, -1))
        return x.movedim((1, 0, 3, 4, 2), (0, 1, 2, 3, 4))

    def store(self, into: Tensor, span: Span, x: Tensor) -> None:
        """Write (n, G, R, C, ...) into tokens of (B, T, H R, ...), without the padding."""
        # to (rows, n, C, H, R, ...)
        x = x.unflatten(1, (-1, self.call.sizes.H)).movedim((1, 0, 4), (0, 1, 2))
        span.write(into, x.flatten(3, 4))

    def state_rows(self, state: Tensor, span: Span) -> Tensor:
        """Return the rows of a span in a packed state (rows H, K, R V)."""
        H, rows = self.call.sizes.H, span.rows
        is_whole = rows.start == 0 and rows.stop * H == state.shape[0]
        return state if is_whole else state[rows.start * H : rows.stop * H]

    def output_buffer(self, span: Span) -> Tensor:
        """Return an empty (rows, n C, HV, V) for the output of a span."""
        rows, v = span.rows.stop - span.rows.start, self.call.tokens.v
        return v.new_empty((rows, span.chunks * span.chunk_size, *v.shape[2:]))

    def output_views(self, o: Tensor, span: Span) -> list[Tensor]:
        """Return the chunks of a row in o (rows, tokens, HV, V) as views (rows, H, R, c, V)."""
        tokens = o.unflatten(2, (self.call.sizes.H, -1))
        return [chunk.permute(0, 2, 3, 1, 4) for chunk in tokens.split(span.chunk_size, 1)]

    def initial_state(self, cohort: Cohort) -> Tensor:
        """Return the packed state that a cohort starts from, in memory of its own."""
        s, state = self.call.sizes, self.call.state
        if state is not None:
            return pack_state(state[cohort.sequences].to(self.dtype, copy=True), s.H)
        shape = (cohort.rows * s.H, s.K, s.HV // s.H * s.V)
        return torch.zeros(shape, dtype=self.dtype, device=self.call.device)
