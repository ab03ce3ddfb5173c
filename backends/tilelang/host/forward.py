"""Run the forward in two launches, or four where sequences are cut into segments.

    solve     per chunk and key head            gates, T = (I + A)⁻¹
    states    per segment, head and V block     the serial walk: o, final state

and between them, where whole sequences would leave a GPU idle,

    states    per segment, head and block       M and R of the segment (docs/math.md §6)
    compose   per sequence, head and V block    the state at the start of every segment

For bfloat16 the operands of products are rounded to it, for float16 to the 16 bits of two bfloat16,
which have the range of float32; gates, sums, the solve and the state are float32. For float32 every
product is float32 (`kernels.blocks`).
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from gdn_ops.backends.tilelang.host import config as configs
from gdn_ops.backends.tilelang.host.launcher import launch
from gdn_ops.backends.tilelang.host.plan import (
    Given,
    Plan,
    dense,
    empty_saved,
    gate_kind,
    gate_of,
    given,
)
from gdn_ops.backends.tilelang.kernels.compose import compose
from gdn_ops.backends.tilelang.kernels.solve import solve
from gdn_ops.backends.tilelang.kernels.states import states
from gdn_ops.call.bind import Call
from gdn_ops.call.structure import dtype_name
from gdn_ops.dispatch.registry import Forward
from gdn_ops.kernel_support.tuning import Tiles

COMPOSED: Final = 32
"""Columns of V per program of `compose`."""


def common(call: Call, plan: Plan, tiles: Tiles) -> dict[str, Any]:
    """Return the constants that all kernels over chunks share."""
    return {
        "K": call.sizes.K, "BK": plan.BK, "C": plan.C, "dtype": dtype_name(call.tokens.q.dtype),
        "erase": call.rule.has_erase, "threads": 32 * tiles.warps,
    }  # fmt: skip


def walked(given: Given, tiles: Tiles, mode: str) -> dict[str, Any]:
    """Return the constants that the walks over segments share.

    GPUs of Hopper and later have an engine that copies whole tiles.
    """
    s, device = given.call.sizes, given.call.device
    return common(given.call, given.plan, tiles) | {
        "V": s.V, "BV": configs.columns(device, s, tiles.BV), "mode": mode,
        "stages": tiles.stages, "bulk": configs.tables.target(device) != "sm_80",
    }  # fmt: skip


def run_solve(x: Given) -> None:
    """Launch the kernel that forms the gates and T of all chunks, into `saved`."""
    gate, beta, HV = gate_of(x.call), dense(x.call.tokens.beta), x.call.sizes.HV
    launch(
        solve, common(x.call, x.plan, x.plan.config.solve), x.k, x.q,
        *(x.known(None if t is None else t.reshape(-1, HV), 1, 1) for t in (gate, beta)),
        x.cu, x.saved.gates, x.saved.inv_norms, x.inverses,
        gate_kind(x.call), int(beta is not None), int(x.call.qk_l2norm),
    )  # fmt: skip


def run_states(x: Given, mode: str, starts: Tensor | None, **outputs: Tensor) -> None:
    """Launch the walk over all segments.

    Args:
        x: what every launch reads.
        mode: what is written; see `kernels.states`.
        starts: (segment_slots, HV, K, V) float32, the states that the segments start from; None:
            zero.
        outputs: the tensors that the mode writes, by their names in the kernel.
    """
    plan, s, kept, f32 = x.plan, x.call.sizes, x.plan.kept, torch.float32
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "o": (x.v.dtype, (1, 1, s.V)),
        "final": (f32, (1, 1, s.K, s.V)),
        "chunk_states": (kept, (1, 1, s.K, s.V)),
        "u": (kept, (1, 1, plan.C, s.V)),
        "maps": (f32, (1, 1, s.K, s.K)),
        "shifts": (f32, (1, 1, s.K, s.V)),
    }
    launch(
        states, walked(x, plan.config.states, mode),
        x.q, x.k, x.v, x.saved.gates, x.saved.inv_norms, x.inverses,
        x.known(starts, 1, 1, s.K, s.V), x.cu,
        *(x.known(outputs.get(name), *shape, dtype=d) for name, (d, shape) in shapes.items()),
        float(x.call.scale), int(x.call.qk_l2norm), int(starts is not None), plan.L,
        plan.segment_slots,
    )  # fmt: skip


def run_compose(
    x: Given, shifts: Tensor, first: Tensor | None, cuts: Tensor, *, reverse: bool = False
) -> None:
    """Launch the kernel that applies segments' maps in turn, and keep the state before each."""
    plan, s = x.plan, x.call.sizes
    launch(
        compose,
        {
            "K": s.K, "BK": plan.BK, "V": s.V, "BV": COMPOSED, "C": plan.C, "reverse": reverse,
            "threads": 128,
        },
        x.saved.maps, shifts, x.known(first, 1, 1, s.K, s.V),
        x.cu, cuts, int(first is not None), plan.L, s.N,
    )  # fmt: skip


def forward(call: Call, plan: Plan) -> Forward:
    """Run the sequence op.

    Returns:
        o (B, T, HV, V), the final state (N, HV, K, V) float32, and what the backward reads.
    """
    s, device, saved = call.sizes, call.device, empty_saved(call, plan)
    x = given(call, plan, saved)
    run_solve(x)
    if plan.is_segmented:
        shifts = torch.empty_like(saved.starts)
        run_states(x, "map", None, maps=saved.maps, shifts=shifts)
        run_compose(x, shifts, dense(call.state), saved.starts)
    o = torch.empty((s.B, s.T, s.HV, s.V), dtype=x.v.dtype, device=device)
    final = torch.empty((s.N, s.HV, s.K, s.V), dtype=torch.float32, device=device)
    run_states(x, "output", x.starts, o=o.view(x.v.shape), final=final)
    return Forward(o, final, tuple(saved) if call.needs_grad else ())
