"""Run the forward in two launches, or four where sequences are cut into segments.

    solve     per chunk and key head            gates, T = (I + A)⁻¹
    walk      per segment, head and V block     the serial walk: o, final state

and between them, where whole sequences would leave a GPU idle,

    walk      per segment, head and block       M and R of the segment (docs/math.md §6)
    compose   per sequence, head and V block    the state at the start of every segment

For bfloat16 and float16 the operands of products are rounded to that dtype; gates, sums, the solve
and the state are float32. For float32 every product is float32 (`kernels.blocks`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_ops.backends.tilelang.host import config as configs
from gdn_ops.backends.tilelang.host.launcher import launch
from gdn_ops.backends.tilelang.host.plan import (
    Plan,
    Saved,
    absent,
    cu_of,
    dense,
    empty_saved,
    gate_kind,
    gate_of,
    packed,
)
from gdn_ops.backends.tilelang.kernels.compose import compose
from gdn_ops.backends.tilelang.kernels.solve import solve
from gdn_ops.backends.tilelang.kernels.walk import walk
from gdn_ops.call.bind import Call
from gdn_ops.dispatch.registry import Forward


def dtype_of(plan: Plan) -> str:
    """Return the name of the dtype of q, k and v."""
    return str(plan.low).removeprefix("torch.")


def is_bulk(call: Call) -> bool:
    """Return whether the GPU has an engine that copies whole tiles: Hopper and later."""
    return configs.target(call.device) != "sm_80"


def run_solve(call: Call, plan: Plan, q: Tensor, k: Tensor, cu: Tensor) -> Saved:
    """Launch the kernel that forms the gates and T of all chunks."""
    s, device, saved = plan.sizes, call.device, empty_saved(plan, call.device)
    gate, beta = gate_of(call), dense(call.tokens.beta)
    nothing = absent(torch.float32, device, 1, 1)
    erase = plan.rule.has_erase
    inverses = saved.inverses if erase else absent(plan.low, device, 1, 1, plan.C, plan.C)
    launch(
        solve,
        {
            "K": s.K, "BK": plan.BK, "C": plan.C, "dtype": dtype_of(plan), "erase": erase,
            "threads": plan.config.solve.threads,
        },
        k, q,
        nothing if gate is None else gate.reshape(-1, s.HV),
        nothing if beta is None else beta.reshape(-1, s.HV),
        cu, saved.gates, saved.norms, inverses,
        gate_kind(call), int(beta is not None), int(plan.norm),
    )  # fmt: skip
    return saved


def run_walk(
    call: Call,
    plan: Plan,
    mode: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: Saved,
    starts: Tensor | None,
    cu: Tensor,
    **outputs: Tensor,
) -> None:
    """Launch the walk over all segments.

    Args:
        call: the call.
        plan: its plan.
        mode: what is written; see `kernels.walk`.
        q, k, v: packed.
        saved: the tensors that `run_solve` returned.
        starts: (places, HV, K, V) float32, the states that the segments start from; None: zero.
        cu: where sequences begin.
        outputs: the tensors that the mode writes, by their names in the kernel.
    """
    s, device, tiles = plan.sizes, call.device, plan.config.walk
    erase, f32 = plan.rule.has_erase, torch.float32
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "o": (plan.low, (1, 1, s.V)),
        "final": (f32, (1, 1, s.K, s.V)),
        "kept": (plan.low, (1, 1, s.K, s.V)),
        "u": (plan.low, (1, 1, plan.C, s.V)),
        "maps": (f32, (1, 1, s.K, s.K)),
        "shifts": (f32, (1, 1, s.K, s.V)),
    }
    written = [
        outputs.get(name, absent(dtype, device, *shape)) for name, (dtype, shape) in shapes.items()
    ]
    launch(
        walk,
        {
            "K": s.K, "BK": plan.BK, "V": s.V, "BV": configs.columns(device, s, tiles.BV),
            "C": plan.C, "dtype": dtype_of(plan), "erase": erase, "mode": mode,
            "threads": tiles.threads, "stages": tiles.stages, "bulk": is_bulk(call),
        },
        q, k, v, saved.gates, saved.norms,
        saved.inverses if erase else absent(plan.low, device, 1, 1, plan.C, plan.C),
        absent(f32, device, 1, 1, s.K, s.V) if starts is None else starts,
        cu, *written, float(call.scale), int(starts is not None), plan.L, plan.places,
    )  # fmt: skip


def run_maps(
    call: Call, plan: Plan, q: Tensor, k: Tensor, v: Tensor, saved: Saved, cu: Tensor
) -> None:
    """Compute the map M of every segment and the state that it starts from, into `saved`."""
    shifts = torch.empty_like(saved.starts)
    run_walk(call, plan, "map", q, k, v, saved, None, cu, maps=saved.maps, shifts=shifts)
    run_compose(call, plan, saved.maps, shifts, dense(call.state), cu, saved.starts)


def run_compose(
    call: Call,
    plan: Plan,
    maps: Tensor,
    shifts: Tensor,
    first: Tensor | None,
    cu: Tensor,
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
        cu, cuts, int(first is not None), plan.L, s.N,
    )  # fmt: skip


COMPOSED = 32
"""Columns of V per program of `compose`."""


def starts_of(call: Call, plan: Plan, saved: Saved) -> Tensor | None:
    """Return the states that the segments start from, or None where all are zero."""
    return saved.starts if plan.is_segmented else dense(call.state)


def forward(call: Call, plan: Plan) -> Forward:
    """Run the sequence op.

    Returns:
        o (B, T, HV, V), the final state (N, HV, K, V) float32, and what the backward reads.
    """
    s, device = plan.sizes, call.device
    q, k, v, cu = packed(call.tokens.q), packed(call.tokens.k), packed(call.tokens.v), cu_of(call)
    saved = run_solve(call, plan, q, k, cu)
    if plan.is_segmented:
        run_maps(call, plan, q, k, v, saved, cu)
    o = torch.empty((s.B, s.T, s.HV, s.V), dtype=call.tokens.v.dtype, device=device)
    final = torch.empty((s.N, s.HV, s.K, s.V), dtype=torch.float32, device=device)
    starts = starts_of(call, plan, saved)
    run_walk(call, plan, "output", q, k, v, saved, starts, cu, o=o.view(v.shape), final=final)
    return Forward(o, final, tuple(saved) if call.needs_grad else ())


def run_states(
    call: Call, plan: Plan, q: Tensor, k: Tensor, v: Tensor, saved: Saved, cu: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the walk again for the backward, which reads S and U of every chunk.

    Returns:
        S at every chunk start (HV, slots, K, V), and U (HV, slots, C, V), which a rule without
        an error term does not keep: (0,).
    """
    s, rows = plan.sizes, (plan.sizes.HV, plan.slots)
    kept = torch.empty((*rows, s.K, s.V), dtype=plan.low, device=call.device)
    outputs = {"kept": kept}
    u = torch.empty((0,), dtype=plan.low, device=call.device)
    if plan.rule.has_erase:
        outputs["u"] = u = torch.empty((*rows, plan.C, s.V), dtype=plan.low, device=call.device)
    starts = starts_of(call, plan, saved)
    run_walk(call, plan, "states", q, k, v, saved, starts, cu, **outputs)
    return kept, u
