"""Run the forward in two launches, or four where sequences are cut into segments.

    solve     per chunk and key head            gates, T = (I + A)⁻¹
    states    per segment, head and V block     the serial walk: o, final state

and between them, where whole sequences would leave a GPU idle,

    states    per segment, head and block       M and R of the segment (docs/math.md §6)
    compose   per sequence, head and V block    the state at the start of every segment

For bfloat16 and float16 the operands of products are rounded to that dtype; gates, sums, the solve
and the state are float32. For float32 every product is float32 (`kernels.blocks`).
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from gdn_ops.backends.tilelang.host import config as configs
from gdn_ops.backends.tilelang.host.launcher import launch
from gdn_ops.backends.tilelang.host.plan import (
    Packed,
    Plan,
    Saved,
    absent,
    dense,
    empty_saved,
    gate_kind,
    gate_of,
    packed_call,
)
from gdn_ops.backends.tilelang.host.shapes import Tiles
from gdn_ops.backends.tilelang.kernels.compose import compose
from gdn_ops.backends.tilelang.kernels.solve import solve
from gdn_ops.backends.tilelang.kernels.states import states
from gdn_ops.call.bind import Call
from gdn_ops.call.structure import dtype_name
from gdn_ops.dispatch.registry import Forward

COMPOSED: Final = 32
"""Columns of V per program of `compose`."""


def common(plan: Plan, tiles: Tiles) -> dict[str, Any]:
    """Return the constants that all kernels over chunks share."""
    return {
        "K": plan.sizes.K, "BK": plan.BK, "C": plan.C, "dtype": dtype_name(plan.low),
        "erase": plan.rule.has_erase, "threads": tiles.threads,
    }  # fmt: skip


def walked(call: Call, plan: Plan, tiles: Tiles, mode: str) -> dict[str, Any]:
    """Return the constants that the walks over segments share.

    GPUs of Hopper and later have an engine that copies whole tiles.
    """
    return common(plan, tiles) | {
        "V": plan.sizes.V, "BV": configs.columns(call.device, plan.sizes, tiles.BV),
        "mode": mode, "stages": tiles.stages, "bulk": configs.tables.target(call.device) != "sm_80",
    }  # fmt: skip


def inverses_of(plan: Plan, saved: Saved) -> Tensor:
    """Return T of all chunks, or a placeholder for rules without an error term."""
    if plan.rule.has_erase:
        return saved.inverses
    return absent(plan.low, saved.gates.device, 1, 1, plan.C, plan.C)


def run_solve(call: Call, plan: Plan, x: Packed) -> Saved:
    """Launch the kernel that forms the gates and T of all chunks."""
    s, saved = plan.sizes, empty_saved(plan, call.device)
    gate, beta = gate_of(call), dense(call.tokens.beta)
    nothing = absent(torch.float32, call.device, 1, 1)
    launch(
        solve, common(plan, plan.config.solve), x.k, x.q,
        nothing if gate is None else gate.reshape(-1, s.HV),
        nothing if beta is None else beta.reshape(-1, s.HV),
        x.cu, saved.gates, saved.inv_norms, inverses_of(plan, saved),
        gate_kind(call), int(beta is not None), int(plan.norm),
    )  # fmt: skip
    return saved


def run_states(
    call: Call,
    plan: Plan,
    mode: str,
    x: Packed,
    saved: Saved,
    starts: Tensor | None,
    **outputs: Tensor,
) -> None:
    """Launch the walk over all segments.

    Args:
        call: the call.
        plan: its plan.
        mode: what is written; see `kernels.states`.
        x: the tensors of the call.
        saved: the tensors that `run_solve` returned.
        starts: (segment_slots, HV, K, V) float32, the states that the segments start from; None:
            zero.
        outputs: the tensors that the mode writes, by their names in the kernel.
    """
    s, low, f32 = plan.sizes, plan.low, torch.float32
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "o": (low, (1, 1, s.V)),
        "final": (f32, (1, 1, s.K, s.V)),
        "chunk_states": (low, (1, 1, s.K, s.V)),
        "u": (low, (1, 1, plan.C, s.V)),
        "maps": (f32, (1, 1, s.K, s.K)),
        "shifts": (f32, (1, 1, s.K, s.V)),
    }
    launch(
        states, walked(call, plan, plan.config.states, mode),
        x.q, x.k, x.v, saved.gates, saved.inv_norms, inverses_of(plan, saved),
        absent(f32, call.device, 1, 1, s.K, s.V) if starts is None else starts, x.cu,
        *(outputs.get(name, absent(d, call.device, *shape)) for name, (d, shape) in shapes.items()),
        float(call.scale), int(starts is not None), plan.L, plan.segment_slots,
    )  # fmt: skip


def run_maps(call: Call, plan: Plan, x: Packed, saved: Saved) -> None:
    """Compute the map M of every segment and the state that it starts from, into `saved`."""
    shifts = torch.empty_like(saved.starts)
    run_states(call, plan, "map", x, saved, None, maps=saved.maps, shifts=shifts)
    run_compose(call, plan, x, saved.maps, shifts, dense(call.state), saved.starts)


def run_compose(
    call: Call,
    plan: Plan,
    x: Packed,
    maps: Tensor,
    shifts: Tensor,
    first: Tensor | None,
    cuts: Tensor,
    *,
    reverse: bool = False,
) -> None:
    """Launch the kernel that applies segments' maps in turn, and keep the state before each."""
    s = plan.sizes
    launch(
        compose,
        {
            "K": s.K, "BK": plan.BK, "V": s.V, "BV": COMPOSED, "C": plan.C, "reverse": reverse,
            "threads": 128,
        },
        maps, shifts,
        absent(torch.float32, call.device, 1, 1, s.K, s.V) if first is None else first,
        x.cu, cuts, int(first is not None), plan.L, s.N,
    )  # fmt: skip


def starts_of(call: Call, plan: Plan, saved: Saved) -> Tensor | None:
    """Return the states that the segments start from, or None where all are zero."""
    return saved.starts if plan.is_segmented else dense(call.state)


def forward(call: Call, plan: Plan) -> Forward:
    """Run the sequence op.

    Returns:
        o (B, T, HV, V), the final state (N, HV, K, V) float32, and what the backward reads.
    """
    s, device, x = plan.sizes, call.device, packed_call(call)
    saved = run_solve(call, plan, x)
    if plan.is_segmented:
        run_maps(call, plan, x, saved)
    o = torch.empty((s.B, s.T, s.HV, s.V), dtype=x.v.dtype, device=device)
    final = torch.empty((s.N, s.HV, s.K, s.V), dtype=torch.float32, device=device)
    starts = starts_of(call, plan, saved)
    run_states(call, plan, "output", x, saved, starts, o=o.view(x.v.shape), final=final)
    return Forward(o, final, tuple(saved) if call.needs_grad else ())


def recompute(call: Call, plan: Plan, x: Packed, saved: Saved) -> tuple[Tensor, Tensor]:
    """Launch the walk again for the backward, which reads S and U of every chunk.

    Returns:
        S at every chunk start (HV, chunk_slots, K, V), and U (HV, chunk_slots, C, V); where a
        rule without an error term does not keep U, a placeholder.
    """
    s, rows, low = plan.sizes, (plan.sizes.HV, plan.chunk_slots), plan.low
    chunk_states = torch.empty((*rows, s.K, s.V), dtype=low, device=call.device)
    u = absent(low, call.device, 1, 1, plan.C, s.V)
    if plan.rule.has_erase:
        u = torch.empty((*rows, plan.C, s.V), dtype=low, device=call.device)
    starts = starts_of(call, plan, saved)
    run_states(call, plan, "states", x, saved, starts, chunk_states=chunk_states, u=u)
    return chunk_states, u
