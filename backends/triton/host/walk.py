"""Launch the walks over chunks: for the output, for a backward, for the cuts between segments."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from gdn_ops.backends.triton.host import config as configs
from gdn_ops.backends.triton.host.config import power_of_two
from gdn_ops.backends.triton.host.launcher import launch
from gdn_ops.backends.triton.host.plan import (
    Plan,
    Saved,
    by_descriptors,
    common,
    dense,
    is_weighted,
    operands,
    options,
    readable,
    strides,
    width,
)
from gdn_ops.backends.triton.kernels import compose, walk, walk_back
from gdn_ops.call.bind import Call

COMPOSED: Final = 16
"""Columns of V of a program that composes: few, since sequences of few heads are cut."""
ROWS: Final = 32
"""Entries of K that it sums over at a time."""


class Cuts(NamedTuple):
    """Hold the tensors of states at cuts, or of their gradients, in the order of `compose`.

    Attributes:
        shifts: what segments add to a gradient (segment_slots, HV, K, V) float32; None for states.
        first: what they start from (N, HV, K, V), or None.
        cuts: where they are written (segment_slots, HV, K, V) float32.
        last: where those of sequences without tokens are (N, HV, K, V) float32.
    """

    shifts: Tensor | None
    first: Tensor | None
    cuts: Tensor
    last: Tensor


class Walked(NamedTuple):
    """Hold what the last launch of a backward reads, in the dtype of what is kept.

    Attributes:
        u: U (HV, chunk_slots, C, V), empty without an error term.
        states: the transposed states at the start of every chunk (HV, chunk_slots, V, K).
        d_rhs: dRHS (HV, chunk_slots, C, V).
        d_states: the transposed dS at the end of every chunk (HV, chunk_slots, V, K).
        d_initial: dS of the initial state (N, HV, K, V) float32.
    """

    u: Tensor
    states: Tensor
    d_rhs: Tensor
    d_states: Tensor
    d_initial: Tensor


def walk_for_output(call: Call, plan: Plan, saved: Saved, final: Tensor) -> Tensor:
    """Walk for the output; return o (B, T, HV, V), and write the final state and what is kept."""
    s = call.sizes
    o = None if call.targets is None else call.targets.o
    if o is None or not o.is_contiguous():
        o = torch.empty((s.B, s.T, s.HV, s.V), dtype=call.tokens.q.dtype, device=call.device)
    u, states = (saved.u, saved.states) if plan.keep else (None, None)
    _walk(call, plan, saved, o=o, u=u, states=states, final=final)
    return o


def walk_for_starts(call: Call, plan: Plan, saved: Saved, final: Tensor) -> None:
    """Write what segments start from, and the final state of sequences without tokens."""
    if segments_of(call, plan) != 1:
        _walk(call, plan, saved, maps=saved.maps)
    # Without an initial state the first one is zero.
    _compose(call, plan, saved.maps, Cuts(None, dense(call.state), saved.starts, final))


def walk_for_maps(call: Call, plan: Plan, saved: Saved) -> tuple[Tensor, Tensor]:
    """Walk without an initial state for what whole sequences make of any.

    Returns:
        M (N, HV, K, K) and R (N, HV, K, V), float32.
    """
    s = call.sizes
    if not plan.segment_slots:
        # A sequence is a segment.
        shape = (s.N, s.HV, s.V + s.K, s.K)
        maps = torch.empty(shape, dtype=torch.float32, device=call.device)
        _walk(call, plan, saved, maps=maps, is_staged=True)
        whole = maps.mT
    else:
        _walk(call, plan, saved, maps=saved.maps, is_staged=True)
        whole = _compose_whole(call, plan, saved.maps)
    return whole[..., s.V :], whole[..., : s.V]


def starts_from(call: Call, plan: Plan, saved: Saved, final: Tensor) -> None:
    """Write what segments start from after `walk_for_maps`, and the final state without tokens."""
    cuts = Cuts(None, dense(call.state), saved.starts, final)
    _compose(call, plan, saved.maps, cuts, is_staged=True)


def segments_of(call: Call, plan: Plan) -> int:
    """Return the segments of every sequence, 0 where sequences are packed."""
    return 0 if call.cu_seqlens is not None else plan.segment_slots // max(call.sizes.N, 1)


def grid_of_maps(call: Call, plan: Plan, BV: int) -> tuple[int, int]:
    """Return the grid of the walk for what segments make of states; see `walk.part_of`."""
    s, cuts = call.sizes, segments_of(call, plan)
    of_v, of_k = -(-s.V // BV), -(-s.K // BV)
    if cuts:
        return s.N * s.HV, (cuts - 1) * of_v + max(cuts - 2, 0) * of_k
    return plan.segment_slots * s.HV, of_v + of_k


def _walk(
    call: Call, plan: Plan, saved: Saved, *, o: Tensor | None = None, u: Tensor | None = None,
    states: Tensor | None = None, final: Tensor | None = None, maps: Tensor | None = None,
    cuts: Cuts | None = None, is_staged: bool = False,
) -> None:  # fmt: skip
    """Launch the walk that writes what it is given; maps and cuts may be staged."""
    s, config, v = call.sizes, plan.config, readable(call.tokens.v)
    q, k, writes = operands(call, saved)
    H, BV, slots = q.shape[2], width(config.walk, s.V), plan.segment_slots
    composed = 0 if cuts is None else -(-s.V // COMPOSED)
    grid = ((slots or s.N) * s.HV, composed - (-s.V // BV))
    initial = saved.starts if slots and maps is None else dense(call.state)
    if maps is not None and is_staged:
        grid, initial = (grid[0], -(-s.V // BV) - (-s.K // BV)), None
    elif maps is not None:
        grid = grid_of_maps(call, plan, BV)
    launch(
        walk.walk, grid,
        q, k, v, writes, saved.gates, saved.factors, saved.ends, saved.inverses, saved.scores,
        initial, o, u, states, final, maps if cuts is None else saved.maps,
        *(cuts or (None,) * 4), dense(call.cu_seqlens),
        s.N, s.T, plan.L, plan.chunk_slots, s.HV, s.HV // H,
        *strides(q), *strides(k), *strides(v), **common(call, plan), V=s.V, BV=BV,
        DECAY=call.rule.has_decay, ERASE=call.rule.has_erase,
        HAS_INITIAL=initial is not None, OUTPUT=o is not None,
        KEEP=states is not None, MAPS=maps is not None, COMPOSED=composed, SEGMENTED=slots > 0,
        WEIGHTED=is_weighted(call), TMA=by_descriptors(config, (q, k, v, writes, o, u, states)),
        BC=COMPOSED, BR=ROWS, CUT_PRECISION=_precision_of_cuts(call), STAGED=is_staged,
        CHANNELS=writes is not None, **options(config.walk),
    )  # fmt: skip


def walk_for_gradients(
    call: Call, plan: Plan, saved: Saved, d_o: Tensor, d_final: Tensor,
    shifts: Tensor | None = None,
) -> Walked:  # fmt: skip
    """Walk back with the gradient of the state, given those of o and of the final state.

    What segments add to it may be known from `walk_for_shifts`.

    Where the forward has kept nothing, it is walked once more. It need not wait for what a segment
    adds to dS, nor for dS at the cuts, so both are computed in one launch.
    """
    s, device = call.sizes, call.device
    d_rhs = torch.empty((s.HV, plan.chunk_slots, plan.C, s.V), dtype=plan.kept, device=device)
    shape = (s.HV, plan.chunk_slots, s.V, s.K)
    d_states = torch.empty(shape, dtype=plan.kept, device=device)
    d_initial = torch.empty((s.N, s.HV, s.K, s.V), dtype=torch.float32, device=device)
    d_end, cuts, is_staged = d_final, None, shifts is not None
    if plan.segment_slots:
        d_end = torch.empty_like(saved.starts)
        if shifts is None:
            shifts = torch.empty_like(saved.starts)
            if segments_of(call, plan) != 1:
                _walk_back(call, plan, saved, d_o, d_end=d_final, d_start=shifts)
        cuts = Cuts(shifts, d_final, d_end, d_initial)
        if plan.keep:
            _compose(call, plan, saved.maps, cuts, is_staged)
    u, states = saved.u, saved.states
    if not plan.keep:
        u, states = walk_again(call, plan, saved, cuts, is_staged)
    _walk_back(
        call, plan, saved, d_o, d_end=d_end, d_rhs=d_rhs, d_states=d_states, d_start=d_initial
    )
    return Walked(u, states, d_rhs, d_states, d_initial)


def walk_again(
    call: Call, plan: Plan, saved: Saved, cuts: Cuts | None = None, is_staged: bool = False
) -> tuple[Tensor, Tensor]:
    """Walk once more for U and the states, and compute dS at the cuts, if any, beside it."""
    s, device = call.sizes, call.device
    rows = (s.HV, plan.chunk_slots, plan.C, s.V) if call.rule.has_erase else (0,)
    u = torch.empty(rows, dtype=plan.kept, device=device)
    states = torch.empty((s.HV, plan.chunk_slots, s.V, s.K), dtype=plan.kept, device=device)
    final = torch.empty((s.N, s.HV, s.K, s.V), dtype=torch.float32, device=device)
    _walk(call, plan, saved, u=u, states=states, final=final, cuts=cuts, is_staged=is_staged)
    return u, states


def walk_for_shifts(
    call: Call, plan: Plan, saved: Saved, d_o: Tensor, d_final: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Walk back for the gradient of the initial state alone.

    Returns:
        It, (N, HV, K, V) float32, and where sequences are cut what segments add to it,
        (segment_slots, HV, K, V) float32.
    """
    if not plan.segment_slots:
        d_initial = torch.empty_like(d_final)
        _walk_back(call, plan, saved, d_o, d_end=d_final, d_start=d_initial)
        return d_initial, None
    shifts = torch.empty_like(saved.starts)
    _walk_back(call, plan, saved, d_o, d_end=None, d_start=shifts)
    return _compose_whole(call, plan, saved.maps, shifts, d_final), shifts


def _walk_back(
    call: Call, plan: Plan, saved: Saved, d_o: Tensor, *, d_end: Tensor | None, d_start: Tensor,
    d_rhs: Tensor | None = None, d_states: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch the walk back; for the shifts of segments where it has no gradients to write.

    Without a gradient at the ends they are staged.
    """
    s, config = call.sizes, plan.config
    q, k, writes = operands(call, saved)
    H, BV, cuts = q.shape[2], width(config.walk_back, s.V), plan.segment_slots
    of_v = -(-s.V // BV)
    grid = ((cuts or s.N) * s.HV, of_v)
    if d_rhs is None and d_end is not None and segments_of(call, plan):
        grid = (s.N * s.HV, (segments_of(call, plan) - 1) * of_v)
    launch(
        walk_back.walk_back, grid,
        q, k, d_o, writes, saved.factors, saved.ends, saved.inverses, saved.scores, d_end, d_rhs,
        d_states, d_start, dense(call.cu_seqlens),
        s.N, s.T, plan.L, plan.chunk_slots, s.HV, s.HV // H,
        *strides(q), *strides(k), *strides(d_o), **common(call, plan), V=s.V, BV=BV,
        DECAY=call.rule.has_decay, ERASE=call.rule.has_erase, SHIFTS=d_rhs is None,
        SEGMENTED=cuts > 0, STAGED=d_end is None,
        TMA=by_descriptors(config, (q, k, d_o, writes, d_rhs, d_states)),
        CHANNELS=writes is not None, **options(config.walk_back),
    )  # fmt: skip


def _compose(call: Call, plan: Plan, maps: Tensor, cuts: Cuts, is_staged: bool = False) -> None:
    """Launch the kernel that writes the states at cuts, or with shifts their gradients."""
    s = call.sizes
    launch(
        compose.compose, (s.N * s.HV, -(-s.V // COMPOSED)),
        maps, *cuts, dense(call.cu_seqlens), s.T, plan.C * plan.L, s.HV,
        K=s.K, V=s.V, BK=power_of_two(s.K), BV=COMPOSED, BR=ROWS,
        REVERSE=cuts.shifts is not None, HAS_FIRST=cuts.first is not None, STAGED=is_staged,
        VARLEN=call.cu_seqlens is not None, PRECISION=_precision_of_cuts(call),
        num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip


def _compose_whole(
    call: Call, plan: Plan, maps: Tensor, shifts: Tensor | None = None,
    d_final: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Launch the kernel that writes what whole sequences make of a state, or of its gradient.

    Returns:
        R and M side by side, (N, HV, K, V + K) float32; with shifts the gradient (N, HV, K, V) of
        the initial state.
    """
    s = call.sizes
    columns = s.V + s.K if shifts is None else s.V
    shape = (s.N, s.HV, s.K, columns)
    whole = torch.empty(shape, dtype=torch.float32, device=call.device)
    launch(
        compose.compose_whole, (s.N * s.HV, -(-columns // COMPOSED)),
        maps, shifts, d_final, whole, dense(call.cu_seqlens), s.T, plan.C * plan.L, s.HV,
        K=s.K, V=s.V, W=columns, BK=power_of_two(s.K), BV=COMPOSED, BR=ROWS,
        REVERSE=shifts is not None, VARLEN=call.cu_seqlens is not None,
        PRECISION=_precision_of_cuts(call), num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    return whole


def _precision_of_cuts(call: Call) -> str:
    """Return the precision of the products at cuts, which are of float32."""
    is_amd = configs.tables.target(call.device).startswith("gfx")
    return "ieee" if is_amd else configs.float32_products
