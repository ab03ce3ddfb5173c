"""Run the forward and the backward over whole calls: allocate, walk the cohorts, collect."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gdn_ops.backends.torch import channels, channels_backward
from gdn_ops.backends.torch.chunk_backward import SegmentGrads
from gdn_ops.backends.torch.decode import decode_many, decode_one
from gdn_ops.backends.torch.loading import SegmentLoader, joined, pack_state, unpack_state
from gdn_ops.backends.torch.pure import pure
from gdn_ops.backends.torch.segments import SegmentPlan
from gdn_ops.backends.torch.spans import Span
from gdn_ops.call.bind import Call
from gdn_ops.call.numerics import l2norm_backward
from gdn_ops.dispatch.registry import Backend, Forward, Grads
from gdn_ops.kernel_support.host_memory import empty, settle_allocator
from gdn_ops.kernel_support.tuning import TRIED, trying
from gdn_ops.spec.ops import GATED_DELTA
from gdn_ops.spec.rules import Limits, Width

CHUNKING = {"cpu": (32, 4), "*": (64, 16)}
"""(tokens per chunk, chunks per segment) per device type. cpu: measured on two AVX-512 cores
at K=V=128, H/HV=16/32, T=2048; others: not measured."""

CHUNKING_WITHOUT_GRADIENTS = {"cpu": (32, 8)}
"""Rows that replace those of CHUNKING in calls without gradients. cpu: 0.95 of the time of (32, 4),
measured as above."""


@dataclass(frozen=True)
class ChunkingRow:
    """Hold a row of a table like CHUNKING. str() is the row as source text."""

    device_type: str
    chunk_size: int
    chunks: int

    def __str__(self) -> str:
        return f'"{self.device_type}": ({self.chunk_size}, {self.chunks}),'


class Torch(Backend):
    """Run the chunkwise form of docs/math.md §3 in plain torch ops.

    Attributes:
        chunking: the table of the backend, see CHUNKING.
        chunking_without_gradients: its rows for calls without gradients, where they are others.
        chunk_sizes_to_try, chunks_to_try: what tuning pairs up.
    """

    name = "torch"
    limits = Limits(
        devices=("*",),
        decays=("none", "scalar", "channel"),
        erases=("none", "scalar", "channel"),
        writes=("scalar", "channel"),
        apart=True,
        second_grad=True,
        forward_mode=True,
        chunk_sizes=range(1, 257),
    )
    traceable_step = True
    chunking: ClassVar[Mapping[str, tuple[int, int]]] = CHUNKING
    chunking_without_gradients: ClassVar[Mapping[str, tuple[int, int]]] = CHUNKING_WITHOUT_GRADIENTS
    chunk_sizes_to_try: ClassVar[Sequence[int]] = (16, 32, 64)
    chunks_to_try: ClassVar[Sequence[int]] = (1, 2, 4, 8)

    def plan(self, call: Call) -> SegmentPlan:
        """Return how a call is cut into segments, and what runs them."""
        row: ChunkingRow | None = TRIED.get().get(self.name)
        if row is not None:
            chunk_size, chunks = row.chunk_size, row.chunks
        else:
            own = {} if call.needs_grad else self.chunking_without_gradients
            table = {**self.chunking, **own}
            chunk_size, chunks = table.get(call.device.type, table["*"])
            chunk_size = call.chunk_size or chunk_size
        if call.widths.wide:
            return SegmentPlan(
                chunk_size,
                chunks,
                forward=channels.forward_segment,
                advance=channels.advance_segment,
                backward=channels_backward.backward_segment,
            )
        return SegmentPlan(chunk_size, chunks)

    def saved_like(self, call: Call) -> tuple[Tensor, ...]:
        shape = self.plan(call).shape_of_states(call)
        return (torch.empty(shape, dtype=call.compute_dtype, device=call.device),)

    def forward(self, call: Call) -> Forward:
        """Run `gated_delta`; save the states that the backward starts from."""
        s, plan = call.sizes, self.plan(call)
        settle_allocator()
        loader = SegmentLoader(call)
        o = empty(call.tokens.v.shape, call.tokens.v.dtype, call.device)
        final = torch.empty(s.N, s.HV, s.K, s.V, dtype=loader.dtype, device=call.device)
        saved, kept = None, 0
        if call.needs_grad:
            saved = empty(plan.shape_of_states(call), loader.dtype, call.device)
        for cohort in plan.cohorts(call):
            state = loader.initial_state(cohort)
            segments_per_state = cohort.plan.segments_per_state(s.T)
            for j, spans in enumerate(cohort.rounds()):
                if saved is not None and j and j % segments_per_state == 0:
                    rows = spans[-1].rows.stop
                    saved[kept : kept + rows] = state[: rows * s.H].unflatten(0, (rows, s.H))
                    kept += rows
                for span in spans:
                    state = _forward_span(loader, cohort.plan, span, state, o)
            final.unflatten(1, (s.H, s.R))[cohort.sequences] = unpack_state(state, s.H, s.R)
        if saved is None:
            return Forward(o, final)
        saved[kept:] = 0  # the shape is an upper bound for packed sequences
        return Forward(o, final, (saved,))

    def backward(
        self, call: Call, saved: tuple[Tensor, ...] | None, d_o: Tensor, d_state: Tensor
    ) -> Grads:
        """Return the gradients of `gated_delta`.

        With `saved` None every state is formed anew; then every result is a differentiable function
        of the inputs.
        """
        s, plan, kept = call.sizes, self.plan(call), saved[0] if saved else None
        loader, into = SegmentLoader(call), _Gradients.empty(call)
        earlier = 0
        for cohort in plan.cohorts(call):
            rounds = cohort.rounds()
            d_packed = pack_state(d_state[cohort.sequences].to(loader.dtype), s.H)
            block = cohort.plan.segments_per_state(s.T)
            if kept is None:
                block = max(1, len(rounds))
            starts = range(0, len(rounds), block)
            rows = [rounds[j][-1].rows.stop if j else 0 for j in starts]
            for j, count in zip(reversed(starts), reversed(rows), strict=True):
                if j == 0 or kept is None:
                    first = loader.initial_state(cohort)
                else:
                    end = earlier + sum(rows[: j // block + 1])
                    first = kept[end - count : end].flatten(0, 1)
                some = rounds[j : j + block]
                d_packed = _backward_block(loader, cohort.plan, some, first, d_o, d_packed, into)
            earlier += sum(rows)
            d_initial = unpack_state(d_packed, s.H, s.R)
            into.state.unflatten(1, (s.H, s.R))[cohort.sequences] = d_initial
        return into.finished(call)

    def pure(self, call: Call) -> tuple[Tensor, Tensor]:
        return pure(call)

    def decode_one(self, call: Call) -> tuple[Tensor, Tensor]:
        return decode_one(call)

    def decode_many(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        if call.widths.wide:
            return super().decode_many(call)
        return decode_many(call)

    def tunables(self, call: Call) -> Sequence[object]:
        if call.op is not GATED_DELTA:
            return ()
        pairs = itertools.product(self.chunk_sizes_to_try, self.chunks_to_try)
        return tuple(ChunkingRow(call.device.type, *pair) for pair in pairs)

    def using(self, config: object) -> AbstractContextManager[None]:
        if not isinstance(config, ChunkingRow):
            raise TypeError(f"config is {type(config).__name__}, should be one of `tunables`")
        return trying(self.name, config)


def _forward_span(
    loader: SegmentLoader, plan: SegmentPlan, span: Span, state: Tensor, o: Tensor
) -> Tensor:
    """Run a segment of some rows of a cohort; return the state of all, which may be overwritten."""
    call, x, before = loader.call, loader.segment(span), loader.state_rows(state, span)
    view = span.view(o)
    out = loader.output_buffer(span) if view is None else view
    chunks = loader.output_views(out, span)
    after = plan.forward(x, before, call.scale, call.rule.has_erase, chunks)
    if view is None:
        span.write(o, out.unflatten(1, (span.chunks, span.chunk_size)))
    if before.shape == state.shape:
        return after
    if after is not before:
        before.copy_(after)
    return state


def _backward_block(
    loader: SegmentLoader,
    plan: SegmentPlan,
    block: list[list[Span]],
    state: Tensor,
    d_o: Tensor,
    d_state: Tensor,
    into: _Gradients,
) -> Tensor:
    """Walk back over the segments after a kept state; return its gradient."""
    options = loader.call.scale, loader.call.rule.has_erase
    states = [state]
    for spans in block[:-1]:
        rows = [loader.state_rows(states[-1], span) for span in spans]
        segments = zip(spans, rows, strict=True)
        states.append(joined([plan.advance(loader.segment(x), y, *options) for x, y in segments]))
    for spans, start in zip(reversed(block), reversed(states), strict=True):
        d_rows = []
        for span in spans:
            d_span = loader.values(d_o, span).contiguous()
            before, d_after = (loader.state_rows(x, span) for x in (start, d_state))
            grads = plan.backward(loader.segment(span), before, d_span, d_after, *options)
            into.store(loader, span, grads)
            d_rows.append(grads.state)
        # Sequences that are over by then keep theirs.
        d_state = joined([*d_rows, d_state[sum(x.shape[0] for x in d_rows) :]])
    return d_state


class _Gradients(NamedTuple):
    """Hold the gradients of a call: q, k, v in its dtypes, the rest in the compute dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    alpha: Tensor
    erase: Tensor
    write: Tensor
    state: Tensor

    @staticmethod
    def empty(call: Call) -> _Gradients:
        s, dtype, device = call.sizes, call.compute_dtype, call.device
        apart = call.widths.apart

        def gate(width: Width, channels: int, is_there: bool = True) -> Tensor:
            tokens = s.T if is_there else 0
            axes = (channels,) if width == "channel" else ()
            return empty((s.B, tokens, s.HV, *axes), dtype, device)

        return _Gradients(
            empty((s.B, s.T, s.H, s.K), call.tokens.q.dtype, device),
            empty((s.B, s.T, s.H, s.K), call.tokens.k.dtype, device),
            empty((s.B, s.T, s.HV, s.V), call.tokens.v.dtype, device),
            gate("scalar", 1),
            gate(call.widths.decay, s.K),
            gate(call.widths.erase, s.K, apart),
            gate(call.widths.write, s.V, apart),
            empty((s.N, s.HV, s.K, s.V), dtype, device),
        )

    def store(self, loader: SegmentLoader, span: Span, grads: SegmentGrads) -> None:
        """Store the gradients of one segment."""
        call, d_q, d_k = loader.call, grads.q, grads.k
        if call.qk_l2norm:
            d_q = l2norm_backward(loader.keys(call.tokens.q, span), d_q)
            d_k = l2norm_backward(loader.keys(call.tokens.k, span), d_k)
        loader.store(self.q, span, d_q.unsqueeze(2))
        loader.store(self.k, span, d_k.unsqueeze(2))
        loader.store(self.v, span, grads.v)
        loader.store(self.beta, span, grads.beta)
        for into, grad in (
            (self.alpha, grads.alpha),
            (self.erase, grads.erase),
            (self.write, grads.write),
        ):
            if grad is not None:
                is_head = grad.dim() > into.dim() + 1
                loader.store(into, span, grad.squeeze(-1) if is_head else grad)

    def finished(self, call: Call) -> Grads:
        """Return the gradients in the dtypes of the arguments."""
        d_alpha = d_log_alpha = None
        alpha, log_alpha = call.tokens.alpha, call.tokens.log_alpha
        if alpha is not None:
            d_alpha = self.alpha.to(alpha.dtype)
        elif log_alpha is not None:
            # §5 d log α = α dα, 0 at −inf
            d_log_alpha = (self.alpha * log_alpha.to(self.alpha.dtype).exp()).to(log_alpha.dtype)
        return Grads(
            self.q,
            self.k,
            self.v,
            d_alpha,
            d_log_alpha,
            *(
                None if x is None else grad.to(x.dtype)
                for x, grad in (
                    (call.tokens.beta, self.beta),
                    (call.tokens.erase, self.erase),
                    (call.tokens.write, self.write),
                    (call.state, self.state),
                )
            ),
        )
