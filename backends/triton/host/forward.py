"""Run the forward in two launches, or in four.

    prepare   per chunk and key head                gates, T = (I + A)⁻¹, P
    walk      per sequence, head, V block           the serial walk: U, o, final state

Where a sequence is cut into segments (docs/math.md §6), two more lie between them:

    walk      per segment, head, block of V and K   the map of a segment
    compose   per sequence, head, V block           the states at the cuts

and the last one walks segments.

For bfloat16 the operands of products are rounded to it, for float16 to TF32, which has its 11 bits
and the range of float32; gates, sums, the solve and the state are float32. For float32 every
product is float32 (`config.float32_products`).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from gdn_ops.backends.triton.host import config as configs
from gdn_ops.backends.triton.host.launcher import launch
from gdn_ops.backends.triton.host.plan import (
    Plan,
    Saved,
    common,
    dense,
    empty_saved,
    gate_kind,
    gate_strides,
    has_channels,
    is_weighted,
    options,
    readable,
    solve_precision,
    strides,
)
from gdn_ops.backends.triton.host.strengths import lowered
from gdn_ops.backends.triton.host.walk import walk_for_output, walk_for_starts
from gdn_ops.backends.triton.kernels import prepare, prepare_channels
from gdn_ops.backends.triton.kernels.channel_decays import WIDTH
from gdn_ops.backends.triton.kernels.squares import PAIRS
from gdn_ops.call.bind import Call
from gdn_ops.dispatch.registry import Forward

RESIDENT: Final = 2
"""Programs of `prepare` for each processor: what its programs share between warps stays in the L2
cache where no more of them run than a processor holds at a time."""


def chunks_together(call: Call, plan: Plan) -> int:
    """Return how many chunks a program prepares.

    It forms T and P of four at a time, one in a warp: of one chunk with four value heads for each
    key head, else of more, as long as there is a program for every processor.
    """
    s, chunks = call.sizes, 1
    programs = plan.chunk_slots * s.H / configs.tables.processors(call.device)
    while chunks * (s.HV // s.H) < PAIRS.value and programs >= 2 * chunks:
        chunks *= 2
    return chunks


def run_prepare(call: Call, plan: Plan) -> Saved:
    """Launch the kernel that forms what the walks need."""
    if has_channels(call):
        return prepare_of_channels(call, plan)
    s, saved = call.sizes, empty_saved(call, plan)
    q, k, beta = readable(call.tokens.q), readable(call.tokens.k), call.tokens.beta
    gate = call.tokens.log_alpha if call.tokens.alpha is None else call.tokens.alpha
    pair_decays = torch.empty_like(saved.gates)
    chunks = chunks_together(call, plan)
    tasks = -(-plan.chunk_slots // chunks) * s.H
    programs = min(tasks, RESIDENT * configs.tables.processors(call.device))
    # K Kᵀ and Q Kᵀ, their lower triangles by blocks of 16 x 16.
    blocks = plan.C // 16 * (plan.C // 16 + 1) // 2
    shape = (programs, chunks, 2, blocks, 16, 16)
    grams = torch.empty(shape, dtype=torch.float32, device=call.device)
    launch(
        prepare.prepare, (programs,),
        q, k, gate, beta, saved.gates, saved.factors, saved.ends, pair_decays,
        saved.inv_norms, grams, saved.inverses, saved.scores, saved.scaled_q, saved.scaled_k,
        dense(call.cu_seqlens), float(call.scale), s.N, s.T, plan.chunk_slots, s.H, s.HV,
        s.HV // s.H, chunks, *strides(q), *strides(k), *gate_strides(gate), *gate_strides(beta),
        **common(call, plan),
        GATE=gate_kind(call), HAS_BETA=beta is not None, ERASE=call.rule.has_erase,
        WEIGHTED=is_weighted(call), NORM=call.qk_l2norm, SOLVE_PRECISION=solve_precision(call),
        **options(plan.config.prepare),
    )  # fmt: skip
    return saved


def totals_of(plan: Plan, programs: int, device: torch.device) -> Tensor:
    """Allocate what programs write of the decays of channels, and read again."""
    shape = (programs, 2 * plan.C, WIDTH.value)
    return torch.empty(shape, dtype=torch.float32, device=device)


def prepare_of_channels(call: Call, plan: Plan) -> Saved:
    """Do as `run_prepare` does where every key channel has a decay of its own."""
    s, saved = call.sizes, empty_saved(call, plan)
    q, k, beta = readable(call.tokens.q), readable(call.tokens.k), call.tokens.beta
    gate = call.tokens.log_alpha if call.tokens.alpha is None else call.tokens.alpha
    assert gate is not None
    gate = readable(gate)
    tasks = -(-plan.chunk_slots * s.HV // PAIRS.value)
    programs = min(tasks, RESIDENT * configs.tables.processors(call.device))
    # P and A, their lower triangles by blocks of 16 x 16.
    blocks = plan.C // 16 * (plan.C // 16 + 1) // 2
    shape = (programs, PAIRS.value, 2, blocks, 16, 16)
    squares = torch.empty(shape, dtype=torch.float32, device=call.device)
    totals = totals_of(plan, programs, call.device)
    launch(
        prepare_channels.prepare_channels, (programs,),
        q, k, gate, beta, call.tokens.erase, saved.gates, saved.factors, saved.scaled_q,
        saved.scaled_k, saved.written_k, saved.ends, totals, squares, saved.inverses, saved.scores,
        dense(call.cu_seqlens), float(call.scale), s.N, s.T, plan.chunk_slots, s.HV, s.HV // s.H,
        *strides(q), *strides(k), *strides(gate), *gate_strides(beta), **common(call, plan),
        GATE=gate_kind(call), HAS_BETA=beta is not None, ERASE=call.rule.has_erase,
        APART=call.widths.apart, NORM=call.qk_l2norm, SOLVE_PRECISION=solve_precision(call),
        **options(plan.config.prepare),
    )  # fmt: skip
    return saved


def forward(call: Call, plan: Plan) -> Forward:
    """Run the sequence op.

    Returns:
        o (B, T, HV, V), the final state (N, HV, K, V) float32, and what the backward reads.
    """
    s, call = call.sizes, lowered(call) if call.widths.apart else call
    saved = run_prepare(call, plan)
    final = torch.empty((s.N, s.HV, s.K, s.V), dtype=torch.float32, device=call.device)
    if plan.segment_slots:
        walk_for_starts(call, plan, saved, final)
    o = walk_for_output(call, plan, saved, final)
    return Forward(o, final, tuple(saved) if call.needs_grad else ())
