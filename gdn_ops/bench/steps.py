"""Time the in-place step against the same update in eager torch, written in several ways.

Each way takes q, k (B, HV, K), v (B, HV, V), alpha, beta (B, HV) and the state (B, HV, K, V),
updates the state and returns o (B, HV, V). `gated_delta_step` is compared with the fastest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gdn_ops import ops
from gdn_ops.bench.device import find_device
from gdn_ops.bench.floors import Rates
from gdn_ops.bench.inputs import Inputs, Setting, make_step_inputs
from gdn_ops.bench.rows import Row, timed_rows
from gdn_ops.bench.turns import Timing, interleave
from gdn_ops.bench.verify import ROUNDING_BAND, RefusedError, define_step, relative_error
from gdn_ops.spec.language import Case
from gdn_ops.spec.ops import GATED_DELTA_STEP

REPEATS = 300

EagerStep = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


def as_sums(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: Tensor, scale: float
) -> Tensor:
    """Run a step as elementwise products and sums, just as the recurrence is written."""
    state.mul_(alpha[..., None, None])
    u = beta[..., None] * (v - (state * k[..., None]).sum(-2))
    state.add_(k[..., None] * u[..., None, :])
    return scale * (state * q[..., None]).sum(-2)


def as_einsum(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: Tensor, scale: float
) -> Tensor:
    """Run a step with einsum."""
    state.mul_(alpha[..., None, None])
    u = beta[..., None] * (v - torch.einsum("bhkv,bhk->bhv", state, k))
    state.add_(torch.einsum("bhk,bhv->bhkv", k, u))
    return scale * torch.einsum("bhkv,bhk->bhv", state, q)


def as_products(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: Tensor, scale: float
) -> Tensor:
    """Run a step as batched matrix products, the write by baddbmm_."""
    flat = state.flatten(0, 1)
    flat.mul_(alpha.flatten()[:, None, None])
    rows_q, rows_k, rows_v = (x.flatten(0, 1).unsqueeze(1) for x in (q, k, v))
    u = beta.flatten()[:, None, None] * (rows_v - torch.bmm(rows_k, flat))
    flat.baddbmm_(rows_k.transpose(1, 2), u)
    return (scale * torch.bmm(rows_q, flat)).view_as(v)


def as_one_read(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: Tensor, scale: float
) -> Tensor:
    """Read the old state once for q and k together, then decay it in one pass and write it."""
    qS, kS = torch.matmul(torch.stack((q, k), 2), state).unbind(2)
    a = alpha[..., None]
    u = beta[..., None] * (v - a * kS)
    state.mul_(a[..., None]).addcmul_(k[..., None], u[..., None, :])
    return scale * (a * qS + (q * k).sum(-1, keepdim=True) * u)


EAGER_STEPS: dict[str, EagerStep] = {
    "eager sums": as_sums,
    "eager einsum": as_einsum,
    "eager bmm": as_products,
    "eager one read": as_one_read,
}

Step = Callable[[Tensor], Tensor]
"""One update of a state in place; returns o."""


def _steps(x: Inputs, case: Case, names: Sequence[str], s: Setting) -> dict[str, Step]:
    """Return the in-place step of every backend and, in float32, of every eager way."""
    alpha, sizes = x.log_alpha.exp(), case.sizes

    def ours(name: str) -> Step:
        return lambda state: ops.gated_delta_step(
            x.q, x.k, x.v, alpha, x.beta, state, inplace=True, backend=name
        )[0]

    def eager(way: EagerStep) -> Step:
        def run(state: Tensor) -> Tensor:
            q, k = x.q, x.k
            if sizes.R > 1:
                q, k = (y.repeat_interleave(sizes.R, 1) for y in (q, k))
            return way(q, k, x.v, alpha, x.beta, state, sizes.K**-0.5)

        return run

    contenders = {name: ours(name) for name in names}
    if s.dtype == "float32":
        contenders |= {name: eager(way) for name, way in EAGER_STEPS.items()}
    return contenders


def step_rows(case: Case, names: Sequence[str], s: Setting, rates: Rates) -> list[Row]:
    """Check the in-place steps of backends and of the eager ways, then time them in turns.

    Raises:
        RefusedError: one of them computes something else.
    """
    x = make_step_inputs(case.sizes, s.torch_dtype, s.device)
    with torch.no_grad():
        timing = _timed_steps(x, case, _steps(x, case, names, s), s)
    eager = [name for name in timing if name in EAGER_STEPS]
    best = min(eager, key=lambda name: timing[name].median, default=None)
    floor = rates.floor(GATED_DELTA_STEP, case.sizes, s.torch_dtype.itemsize)
    return timed_rows("step", case.name, "us", timing, best, floor=floor)


def _timed_steps(x: Inputs, case: Case, steps: dict[str, Step], s: Setting) -> dict[str, Timing]:
    sizes = case.sizes
    generator = torch.Generator(s.device).manual_seed(2)
    shape = (sizes.B, sizes.HV, sizes.K, sizes.V)
    start = torch.randn(shape, generator=generator, dtype=torch.float32, device=s.device)
    exact = define_step(replace(x, state=start))
    states = {name: start.clone() for name in steps}
    for name, step in steps.items():
        check_step(name, (step(states[name]), states[name]), exact, s)
    actions = {name: functools.partial(step, states[name]) for name, step in steps.items()}
    return interleave(actions, REPEATS, warmups=10, device=find_device(s.device), collect=False)


def check_step(
    name: str, results: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], s: Setting
) -> None:
    """Refuse results of a step, (o, state), that are off by more than roundings of a sum over K.

    Raises:
        RefusedError: they are.
    """
    band = 4 * ROUNDING_BAND * torch.finfo(s.torch_dtype).eps
    for what, x, e in zip(("o", "state"), results, exact, strict=True):
        axes = tuple(axis for axis in range(e.dim()) if axis != 1)
        error = relative_error(x, e, axes)
        if not error <= band:
            raise RefusedError(f"step {name}: {what} off by {error:.2g}, above {band:.2g}")
