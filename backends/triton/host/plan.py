"""Plan a call: its sizes, scratch memory and strides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gdn_ops.backends.triton.host import config as configs
from gdn_ops.backends.triton.host.table import Config
from gdn_ops.call.bind import Call


@dataclass(frozen=True, slots=True)
class Plan:
    """Hold what is planned for one call of the sequence op.

    Attributes:
        config: its configuration.
        C: tokens per chunk.
        chunk_slots: how many chunks the tensors kept per chunk have room for.
        state_slots: how many states are kept, one per `chunks_per_state` chunks.
        kept: dtype of what is kept per chunk: that of q, but float32 for float16, whose range
            a state, an inverse or a gradient may leave where no result does.
    """

    config: Config
    C: int
    chunk_slots: int
    state_slots: int
    kept: torch.dtype


def make_plan(call: Call) -> Plan:
    """Return the plan of a call, from its shapes and attributes alone."""
    s = call.sizes
    dtype = call.tokens.q.dtype
    config: Config = configs.tables.choose(call.device, s.K, s.V, dtype)
    C = call.chunk_size or config.C

    def slots(tokens: int) -> int:
        return s.T // tokens + s.N if call.cu_seqlens is not None else s.N * -(-s.T // tokens)

    return Plan(
        config=config,
        C=C,
        chunk_slots=slots(C),
        state_slots=slots(C * config.chunks_per_state),
        kept=torch.float32 if dtype == torch.float16 else dtype,
    )


class Saved(NamedTuple):
    """Hold the tensors that the first launch saves for the backward.

    Attributes:
        gates: (4, HV, chunk_slots, C) float32: G as hi and lo, z, β.
        inv_norms: (H, chunk_slots, C) float32, empty without qk_l2norm.
        inverses: (HV, chunk_slots, C, C), empty without an error term.
    """

    gates: Tensor
    inv_norms: Tensor
    inverses: Tensor


def empty_saved(call: Call, plan: Plan) -> Saved:
    """Allocate `Saved` for a call."""
    s, slots, C, device = call.sizes, plan.chunk_slots, plan.C, call.device
    norms = (s.H, slots, C) if call.qk_l2norm else (0,)
    inverses = (s.HV, slots, C, C) if call.rule.has_erase else (0,)
    return Saved(
        torch.empty((4, s.HV, slots, C), dtype=torch.float32, device=device),
        torch.empty(norms, dtype=torch.float32, device=device),
        torch.empty(inverses, dtype=plan.kept, device=device),
    )


def readable(x: Tensor) -> Tensor:
    """Return x (B, T, heads, D), or a copy where its last axis has gaps: tiles are read by rows."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def dense(x: Tensor | None) -> Tensor | None:
    """Return x contiguous, or None."""
    return None if x is None else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of batch row, token and head."""
    return x.stride(0), x.stride(1), x.stride(2)
