"""Plan a call: its chunks, segments and scratch memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from gdn_ops.backends.tilelang.host import config as configs
from gdn_ops.backends.tilelang.host.table import Config
from gdn_ops.backends.tilelang.kernels.blocks import ALPHA, LOG_ALPHA, NO_DECAY, kept_of
from gdn_ops.backends.tilelang.kernels.gates import Norm
from gdn_ops.call.bind import Call
from gdn_ops.call.structure import dtype_name


@dataclass(frozen=True)
class Plan:
    """Hold everything about a launch that follows from shapes and attributes, not from values.

    Attributes:
        config: tiles and threads.
        C: tokens per chunk.
        BK: rows of a tile that holds K: a multiple of 64, which a warp group multiplies.
        L: chunks per segment.
        chunk_slots: how many chunks the tensors kept per chunk have room for.
        segment_slots: how many segments the tensors kept per segment have room for.
        kept: dtype of T and of all that is kept per chunk but gates and inv_norms.
        is_segmented: whether a sequence may be more than one segment.
    """

    config: Config
    C: int
    BK: int
    L: int
    chunk_slots: int
    segment_slots: int
    kept: torch.dtype
    is_segmented: bool


def make_plan(call: Call) -> Plan:
    """Return the plan of a call, from its shapes and attributes alone."""
    s = call.sizes
    config: Config = configs.tables.choose(call.device, s.K, s.V, call.tokens.q.dtype)
    C, tokens = call.chunk_size or config.C, s.B * s.T
    L = configs.segment_chunks(call.device, s, C, config)
    return Plan(
        config=config,
        C=C,
        BK=configs.width_class(s.K),
        L=L,
        chunk_slots=tokens // C + s.N,
        segment_slots=tokens // (C * L) + s.N,
        kept=getattr(torch, kept_of(dtype_name(call.tokens.q.dtype))),
        is_segmented=C * L < configs.ONE_SEGMENT,
    )


class Saved(NamedTuple):
    """Hold the tensors that the forward saves for the backward.

    Attributes:
        gates: (HV, chunk_slots, 4, C) float32: G as hi and lo, z, β.
        inv_norms: (H, chunk_slots, 4, C) float32: 1/‖q‖ and 1/‖k‖, or 1; see `gates.Norm`.
        inverses: (HV, chunk_slots, C, C), empty without an error term.
        starts: (segment_slots, HV, K, V) float32, the state at the start of every segment; empty
            where a sequence is one.
        maps: (segment_slots, HV, K, K) float32, M of every segment (docs/math.md §6); as empty.
    """

    gates: Tensor
    inv_norms: Tensor
    inverses: Tensor
    starts: Tensor
    maps: Tensor


def empty_saved(call: Call, plan: Plan) -> Saved:
    """Allocate `Saved` for a call."""
    s, slots, C = call.sizes, plan.chunk_slots, plan.C

    def empty(*shape: int, dtype: torch.dtype = torch.float32, needed: bool = True) -> Tensor:
        return torch.empty(shape if needed else (0,), dtype=dtype, device=call.device)

    cuts, segments = plan.is_segmented, plan.segment_slots
    return Saved(
        empty(s.HV, slots, 4, C),
        empty(s.H, slots, Norm.COUNT, C),
        empty(s.HV, slots, C, C, dtype=plan.kept, needed=call.rule.has_erase),
        empty(segments, s.HV, s.K, s.V, needed=cuts),
        empty(segments, s.HV, s.K, s.K, needed=cuts),
    )


def gate_kind(call: Call) -> int:
    """Return the kernels' constant for the form in which a call gives its decay."""
    if not call.rule.has_decay:
        return NO_DECAY
    return LOG_ALPHA if call.tokens.alpha is None else ALPHA


def gate_of(call: Call) -> Tensor | None:
    """Return the gate (B, T, HV), of channels (B, T, HV, K), dense and float32, or None."""
    given = call.tokens.log_alpha if call.tokens.alpha is None else call.tokens.alpha
    return dense(given)


ALIGNED: Final = 16
"""Bytes of the widest read; memory that is read so begins at a multiple of it."""


def aligned(x: Tensor) -> Tensor:
    """Return x contiguous and aligned for wide reads: x itself if it is so, else a copy."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNED else x


def dense(x: Tensor | None) -> Tensor | None:
    """Return x as float32, contiguous and aligned, or None."""
    return None if x is None else aligned(x.to(torch.float32))


def packed(x: Tensor) -> Tensor:
    """Return x (B, T, heads, D) as (B T, heads, D), contiguous and aligned."""
    return aligned(x).view(-1, *x.shape[2:])


class Given(NamedTuple):
    """Hold what every launch reads: a call, its plan, and its tensors as the kernels take them.

    Attributes:
        call, plan: the call and its plan.
        saved: what the forward saves for the backward.
        q, k: (B T, H, K), contiguous and aligned.
        v: (B T, HV, V), so too.
        cu: (N+1,) int32, the first token of every sequence and the end of the last one.
    """

    call: Call
    plan: Plan
    saved: Saved
    q: Tensor
    k: Tensor
    v: Tensor
    cu: Tensor

    def known(self, x: Tensor | None, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return x, or a placeholder for an absent tensor on the device of the call."""
        return absent(dtype, self.call.device, *shape) if x is None else x

    @property
    def inverses(self) -> Tensor:
        """Return T of all chunks, or a placeholder for rules without an error term."""
        plan = self.plan
        saved_inverses = self.saved.inverses if self.call.rule.has_erase else None
        return self.known(saved_inverses, 1, 1, plan.C, plan.C, dtype=plan.kept)

    @property
    def starts(self) -> Tensor | None:
        """Return the states that the segments start from, or None where all are zero."""
        return self.saved.starts if self.plan.is_segmented else dense(self.call.state)


def given(call: Call, plan: Plan, saved: Saved) -> Given:
    """Return what the launches of a call read."""
    q, k, v = map(packed, call.tokens[:3])
    return Given(call, plan, saved, q, k, v, cu_of(call))


@functools.lru_cache(maxsize=256)
def absent(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    """Return a placeholder for an absent tensor of a launch, never read; (1,) by default."""
    return torch.empty(shape or (1,), dtype=dtype, device=device)


def cu_of(call: Call) -> Tensor:
    """Return the first token of every sequence, and the end of the last one, (N+1,) int32."""
    s, device = call.sizes, call.device
    if call.cu_seqlens is not None:
        return call.cu_seqlens.to(torch.int32).contiguous()
    if device.type != "cuda":
        return _boundaries(s.N, s.T, device, 0)
    # A kernel on another stream might read a tensor before the stream that makes it has written it,
    # so each stream has its own. During a capture it is made anew: one of the capture is written
    # only when that graph is replayed.
    if torch.cuda.is_current_stream_capturing():
        return _boundaries.__wrapped__(s.N, s.T, device, 0)
    return _boundaries(s.N, s.T, device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=256)
def _boundaries(N: int, T: int, device: torch.device, stream: int) -> Tensor:
    return torch.arange(0, (N + 1) * T, T, dtype=torch.int32, device=device)
