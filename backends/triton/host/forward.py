"""Run the forward in three launches.

    solve     per chunk and key head       gates, T = (I + A)⁻¹
    states    per sequence, head, V block  the serial walk: U, the states it keeps, final state
    output    per chunk, fully parallel    o

For bfloat16 the operands of products are rounded to it, for float16 to TF32, which has its 11 bits
and the range of float32; gates, sums, the solve and the state are float32. For float32 every
product is float32 (`config.float32_products`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn_ops.backends.triton.host import config as configs
from gdn_ops.backends.triton.host.config import power_of_two
from gdn_ops.backends.triton.host.launcher import launch
from gdn_ops.backends.triton.host.plan import Plan, Saved, dense, empty_saved, readable, strides
from gdn_ops.backends.triton.kernels import output, solve, states
from gdn_ops.backends.triton.kernels.blocks import ALPHA, LOG_ALPHA, NO_DECAY
from gdn_ops.call.bind import Call
from gdn_ops.dispatch.registry import Forward
from gdn_ops.kernel_support.tuning import Tiles


def gate_kind(call: Call) -> int:
    """Return the kernels' constant for the form in which a call gives its decay."""
    if not call.rule.has_decay:
        return int(NO_DECAY.value)
    return int(LOG_ALPHA.value if call.tokens.alpha is None else ALPHA.value)


def common(call: Call, plan: Plan) -> dict[str, Any]:
    """Return the compile-time constants that all kernels share."""
    s = call.sizes
    return {
        "H": s.H,
        "R": s.HV // s.H,
        "K": s.K,
        "C": plan.C,
        "BK": power_of_two(s.K),
        "GATE": gate_kind(call),
        "NORM": call.qk_l2norm,
        "VARLEN": call.cu_seqlens is not None,
        "PRECISION": precision(call),
    }


def precision(call: Call) -> str:
    """Return how products of float32 operands are formed in a call; beside float16, by TF32."""
    if configs.tables.target(call.device).startswith("gfx"):
        return "ieee"
    return "tf32" if call.tokens.q.dtype == torch.float16 else configs.float32_products


def options(tiles: Tiles) -> dict[str, Any]:
    """Return the options of a launch; multiply and add are fused, the default of Triton 3.9."""
    return {
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": True,
    }


def width(tiles: Tiles, V: int) -> int:
    """Return how many columns of V a program takes."""
    return min(tiles.BV, power_of_two(V))


def gate_of(call: Call) -> Tensor | None:
    """Return the gate as given, contiguous, or None."""
    return dense(call.tokens.log_alpha if call.tokens.alpha is None else call.tokens.alpha)


def run_solve(call: Call, plan: Plan, k: Tensor) -> Saved:
    """Launch the kernel that forms the gates and T of all chunks."""
    s, saved = call.sizes, empty_saved(call, plan)
    beta = dense(call.tokens.beta)
    is_amd = configs.tables.target(call.device).startswith("gfx")
    launch(
        solve.solve, (plan.chunk_slots, s.H),
        k, gate_of(call), beta, *saved, dense(call.cu_seqlens),
        s.N, s.T, plan.chunk_slots, *strides(k), **common(call, plan),
        HAS_BETA=beta is not None, ERASE=call.rule.has_erase,
        SOLVE_PRECISION="ieee" if is_amd else configs.float32_products,
        **options(plan.config.solve),
    )  # fmt: skip
    return saved


def run_states(
    call: Call, plan: Plan, k: Tensor, v: Tensor, saved: Saved, chunks_per_state: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the walk over the chunks; return U, the kept states and the final state."""
    s, device = call.sizes, call.device
    state_slots = plan.chunk_slots if chunks_per_state == 1 else plan.state_slots
    rows = (s.HV, plan.chunk_slots, plan.C, s.V) if call.rule.has_erase else (0,)
    u = torch.empty(rows, dtype=plan.kept, device=device)
    chunk_states = torch.empty((s.HV, state_slots, s.K, s.V), dtype=plan.kept, device=device)
    final = torch.empty((s.N, s.HV, s.K, s.V), dtype=torch.float32, device=device)
    initial = dense(call.state)
    tiles = plan.config.states
    BV = width(tiles, s.V)
    launch(
        states.states, (s.N * s.HV, -(-s.V // BV)),
        k, v, *saved, initial, u, chunk_states, final, dense(call.cu_seqlens),
        s.T, plan.chunk_slots, state_slots, *strides(k), *strides(v), **common(call, plan),
        V=s.V, BV=BV, CHUNKS_PER_STATE=chunks_per_state, ERASE=call.rule.has_erase,
        HAS_INITIAL=initial is not None, **options(tiles),
    )  # fmt: skip
    return u, chunk_states, final


def forward(call: Call, plan: Plan) -> Forward:
    """Run the sequence op in three launches.

    Returns:
        o (B, T, HV, V), the final state (N, HV, K, V) float32, and what the backward reads.
    """
    s = call.sizes
    q, k, v = readable(call.tokens.q), readable(call.tokens.k), readable(call.tokens.v)
    saved = run_solve(call, plan, k)
    u, chunk_states, final = run_states(call, plan, k, v, saved, plan.config.chunks_per_state)
    o = torch.empty((s.B, s.T, s.HV, s.V), dtype=call.tokens.v.dtype, device=call.device)
    tiles, chunks_per_state = plan.config.output, plan.config.chunks_per_state
    BV = width(tiles, s.V)
    launch(
        output.output, (plan.state_slots, -(-s.V // BV), s.H if chunks_per_state == 1 else s.HV),
        q, k, v, saved.gates, saved.inv_norms, u, chunk_states, o, dense(call.cu_seqlens),
        float(call.scale),
        s.N, s.T, plan.chunk_slots, plan.state_slots, *strides(q), *strides(k), *strides(v),
        **common(call, plan), V=s.V, BV=BV, CHUNKS_PER_STATE=chunks_per_state,
        ERASE=call.rule.has_erase, **options(tiles),
    )  # fmt: skip
    return Forward(o, final, tuple(saved) if call.needs_grad else ())
