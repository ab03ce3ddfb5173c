"""Run the chunkwise form in plain torch ops: fast on a CPU, right on any device torch has.

Map: `chunkwise` holds the equations of one segment (docs/math.md §3, §4), `gradients` those of
its backward (§5); `walk` cuts sequences into segments and loads them, `passes` runs them and
keeps what a backward needs. Gates, solve and state are float32 (float64 for float64 inputs);
cumulative log sums are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_ops.backends.torch import chunkwise, gradients
from gdn_ops.backends.torch.many_tokens import decode_many
from gdn_ops.backends.torch.one_token import decode_one
from gdn_ops.backends.torch.passes import run_backward, run_forward
from gdn_ops.backends.torch.walk import Engine
from gdn_ops.call.bind import Call
from gdn_ops.dispatch.registry import Backend, Forward, Grads
from gdn_ops.spec.rules import Limits

CHUNKING = {"cpu": (32, 4), "*": (64, 16)}
"""(tokens per chunk, chunks per segment) per device type. cpu: measured on two AVX-512 cores
at K=V=128, H/HV=16/32, T=2048; others: not measured."""


class Torch(Backend):
    """Run the chunkwise form of docs/math.md §3 in plain torch ops."""

    name = "torch"
    limits = Limits(devices=("*",), second_grad=True, chunk_sizes=range(1, 257))
    traceable_step = True

    def engine(self, call: Call) -> Engine:
        """Return the engine of a call: how it is cut into segments, and what runs them."""
        chunk_size, chunks = CHUNKING.get(call.device.type, CHUNKING["*"])
        return Engine(
            chunk_size=call.chunk_size or chunk_size,
            chunks=chunks,
            pad_segments=False,
            forward=chunkwise.forward_segment,
            advance=chunkwise.advance_segment,
            backward=gradients.backward_segment,
        )

    def saved_like(self, call: Call) -> tuple[Tensor, ...]:
        shape = self.engine(call).checkpoint_shape(call)
        return (torch.empty(shape, dtype=call.compute_dtype, device=call.device),)

    def forward(self, call: Call) -> Forward:
        return run_forward(call, self.engine(call))

    def backward(
        self, call: Call, saved: tuple[Tensor, ...] | None, d_o: Tensor, d_state: Tensor
    ) -> Grads:
        kept = saved[0] if saved else None
        return run_backward(call, self.engine(call), kept, d_o, d_state)

    def decode_one(self, call: Call) -> tuple[Tensor, Tensor]:
        return decode_one(call)

    def decode_many(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        return decode_many(call)


BACKEND = Torch
