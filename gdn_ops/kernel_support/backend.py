"""Run calls by kernels: the base class of backends that configure, plan and launch them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, Final

from torch import Tensor

from gdn_ops.call.bind import Call
from gdn_ops.dispatch.backend import (
    Backend,
    Forward,
    Grads,
    gradients_without_tokens,
    without_tokens,
)
from gdn_ops.kernel_support.tuning import Row, Tables

MOST_STEPS: Final = 8
"""Tokens per row up to which a call without gradients takes the decode kernel."""


class KernelBackend(Backend):
    """Decode few tokens in one launch, plan the rest, and choose configurations from tables.

    Attributes:
        tables: the configurations of its kernels.
    """

    kernels = True
    tables: ClassVar[Tables]

    def run_forward(self, call: Call) -> Forward:
        """Run a call of `gated_delta` that has tokens."""
        raise NotImplementedError

    def run_backward(
        self, call: Call, saved: tuple[Tensor, ...], d_o: Tensor, d_state: Tensor
    ) -> Grads:
        """Return the gradients of a call of `gated_delta` that has tokens."""
        raise NotImplementedError

    def forward(self, call: Call) -> Forward:
        if not call.has_tokens:
            return without_tokens(call, self.saved_like(call) if call.needs_grad else ())
        is_planned = call.needs_grad or call.cu_seqlens is not None or call.chunk_size
        if call.sizes.T <= MOST_STEPS and not is_planned:
            return Forward(*self.decode_many(call)[:2])
        return self.run_forward(call)

    def backward(
        self, call: Call, saved: tuple[Tensor, ...] | None, d_o: Tensor, d_state: Tensor
    ) -> Grads:
        if not call.has_tokens:
            return gradients_without_tokens(call, d_state)
        if saved is None:
            raise RuntimeError("gradients of gradients were asked for, which limits exclude")
        return self.run_backward(call, saved, d_o, d_state)

    def decode_one(self, call: Call) -> tuple[Tensor, Tensor]:
        return self.decode_many(call)[:2]

    def tunables(self, call: Call) -> Sequence[Row]:
        return self.tables.neighbours(self.tables.row(call))

    def using(self, config: object) -> AbstractContextManager[object]:
        if not isinstance(config, Row):
            raise TypeError(f"config is {type(config).__name__}, should be one of `tunables`")
        return self.tables.using(config)
