"""Run the chunkwise form in plain torch ops: fast on a CPU, right on any device torch has.

Map: `chunk_forward` holds the equations of one segment (docs/math.md §3, §4), `chunk_backward`
those of its gradients (§5); `segments` cuts sequences into segments and loads them, `passes` runs
them and keeps what a backward needs; `decode` runs single tokens (§2). Gates, solve and state are
float32 (float64 for float64 inputs); cumulative log sums are float64.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gdn_ops.backends.torch.chunk_backward import backward_segment
from gdn_ops.backends.torch.chunk_forward import advance_segment, forward_segment
from gdn_ops.backends.torch.decode import decode_many, decode_one
from gdn_ops.backends.torch.passes import run_backward, run_forward
from gdn_ops.backends.torch.segments import SegmentPlan
from gdn_ops.call.bind import Call
from gdn_ops.dispatch.registry import Backend, Forward, Grads
from gdn_ops.spec.ops import GATED_DELTA
from gdn_ops.spec.rules import Limits

CHUNKING = {"cpu": (32, 4), "*": (64, 16)}
"""(tokens per chunk, chunks per segment) per device type. cpu: measured on two AVX-512 cores
at K=V=128, H/HV=16/32, T=2048; others: not measured."""


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
        chunk_sizes_to_try, chunks_to_try: what tuning pairs up.
        tried: the row that runs instead of the table's while tuning.
    """

    name = "torch"
    limits = Limits(devices=("*",), second_grad=True, chunk_sizes=range(1, 257))
    traceable_step = True
    chunking: ClassVar[Mapping[str, tuple[int, int]]] = CHUNKING
    chunk_sizes_to_try: ClassVar[Sequence[int]] = (16, 32, 64)
    chunks_to_try: ClassVar[Sequence[int]] = (1, 2, 4, 8)
    tried: ChunkingRow | None = None

    def plan(self, call: Call) -> SegmentPlan:
        """Return how a call is cut into segments, and what runs them."""
        if self.tried is not None:
            chunk_size, chunks = self.tried.chunk_size, self.tried.chunks
        else:
            chunk_size, chunks = self.chunking.get(call.device.type, self.chunking["*"])
            chunk_size = call.chunk_size or chunk_size
        return SegmentPlan(
            chunk_size, chunks, False, forward_segment, advance_segment, backward_segment
        )

    def saved_like(self, call: Call) -> tuple[Tensor, ...]:
        shape = self.plan(call).shape_of_states(call)
        return (torch.empty(shape, dtype=call.compute_dtype, device=call.device),)

    def forward(self, call: Call) -> Forward:
        return run_forward(call, self.plan(call))

    def backward(
        self, call: Call, saved: tuple[Tensor, ...] | None, d_o: Tensor, d_state: Tensor
    ) -> Grads:
        states = saved[0] if saved else None
        return run_backward(call, self.plan(call), states, d_o, d_state)

    def decode_one(self, call: Call) -> tuple[Tensor, Tensor]:
        return decode_one(call)

    def decode_many(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        return decode_many(call)

    def tunables(self, call: Call) -> Sequence[object]:
        if call.op is not GATED_DELTA:
            return ()
        pairs = itertools.product(self.chunk_sizes_to_try, self.chunks_to_try)
        return tuple(ChunkingRow(call.device.type, *pair) for pair in pairs)

    @contextlib.contextmanager
    def using(self, config: object) -> Iterator[None]:
        if not isinstance(config, ChunkingRow):
            raise TypeError(f"config is {type(config).__name__}, should be one of `tunables`")
        previous, self.tried = self.tried, config
        try:
            yield
        finally:
            self.tried = previous


BACKEND = Torch
