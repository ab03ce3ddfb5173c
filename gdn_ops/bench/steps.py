"""Time one token in place, as a server decodes: ours, the peers', and eager torch in several ways.

Each eager way takes q, k (B, HV, K), v (B, HV, V), alpha (B, HV, 1), or (B, HV, K) where every key
channel decays, beta (B, HV) and the state (B, HV, K, V), updates the state and returns o
(B, HV, V). Everybody has a state of its own and runs IN_A_ROW calls in a row, whole Python calls on
a state that stays in cache, and takes turns in that. Beside them stand a pass over the state, which
is read and written once, and what of a step of `cpp` is its kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gdn_ops.backends.cpp import library
from gdn_ops.bench.contender import Contender, Prepared, error_line
from gdn_ops.bench.device import Run, find_device
from gdn_ops.bench.floors import Rates
from gdn_ops.bench.inputs import Inputs, Setting, make_kernel_step_inputs
from gdn_ops.bench.rows import Result, timed_rows
from gdn_ops.bench.turns import Timing, interleave
from gdn_ops.bench.verify import ROUNDING_BAND, RefusedError, define_step, relative_error
from gdn_ops.spec.language import Case
from gdn_ops.spec.ops import GATED_DELTA_STEP

ROUNDS = 40
IN_A_ROW = 50
STEP_REST = 0.01
"""Seconds before calls in a row in which the threads of whoever ran before fall asleep."""

DOORS = ("gdn_decode", "gdn_decode_repeated")
"""The doors of the library that a step may go through."""

PASS = "a pass"
KERNEL = "cpp kernel"

EagerStep = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


def as_sums(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: Tensor, scale: float
) -> Tensor:
    """Run a step as elementwise products and sums, just as the recurrence is written."""
    state.mul_(alpha[..., None])
    u = beta[..., None] * (v - (state * k[..., None]).sum(-2))
    state.add_(k[..., None] * u[..., None, :])
    return scale * (state * q[..., None]).sum(-2)


def as_einsum(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: Tensor, scale: float
) -> Tensor:
    """Run a step with einsum."""
    state.mul_(alpha[..., None])
    u = beta[..., None] * (v - torch.einsum("bhkv,bhk->bhv", state, k))
    state.add_(torch.einsum("bhk,bhv->bhkv", k, u))
    return scale * torch.einsum("bhkv,bhk->bhv", state, q)


def as_products(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: Tensor, scale: float
) -> Tensor:
    """Run a step as batched matrix products, the write by baddbmm_."""
    flat = state.flatten(0, 1)
    flat.mul_(alpha.flatten(0, 1)[..., None])
    rows_q, rows_k, rows_v = (x.flatten(0, 1).unsqueeze(1) for x in (q, k, v))
    u = beta.flatten()[:, None, None] * (rows_v - torch.bmm(rows_k, flat))
    flat.baddbmm_(rows_k.transpose(1, 2), u)
    return (scale * torch.bmm(rows_q, flat)).view_as(v)


def as_one_read(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: Tensor, scale: float
) -> Tensor:
    """Read the old state once for q and k together, then decay it in one pass and write it."""
    qS, kS = torch.matmul(torch.stack((alpha * q, alpha * k), 2), state).unbind(2)
    u = beta[..., None] * (v - kS)
    state.mul_(alpha[..., None]).addcmul_(k[..., None], u[..., None, :])
    return scale * (qS + (q * k).sum(-1, keepdim=True) * u)


EAGER_STEPS: dict[str, EagerStep] = {
    "eager sums": as_sums,
    "eager einsum": as_einsum,
    "eager bmm": as_products,
    "eager one read": as_one_read,
}


def _eager(way: EagerStep, x: Inputs) -> Prepared:
    """Return an eager way of a step, q and k repeated to the value heads within."""
    alpha, heads, state = x.log_alpha.exp(), x.v.shape[1] // x.q.shape[1], x.state
    alpha = alpha if x.has_channels else alpha[..., None]
    assert state is not None

    def run() -> tuple[Tensor, Tensor]:
        q, k = x.q, x.k
        if heads > 1:
            q, k = (y.repeat_interleave(heads, 1) for y in (q, k))
        return way(q, k, x.v, alpha, x.beta, state, q.shape[-1] ** -0.5), state

    return Prepared(run)


def _prepare(
    contenders: Sequence[Contender], x: Inputs, case: Case, s: Setting, result: Result
) -> dict[str, Prepared]:
    """Return a checked step of everybody who has one, each with a state of its own.

    Raises:
        RefusedError: one of them computes something else.
    """
    exact = define_step(x)

    def own() -> Inputs:
        return replace(x, state=None if x.state is None else x.state.clone())

    steps: dict[str, Prepared] = {}
    for c in contenders:
        why = "; ".join(c.reasons(x, "step"))
        if not why:
            prepared = c.step(own())
            try:
                results = prepared.results()
            except Exception as error:
                if not c.is_peer:
                    raise
                why = error_line(error)
        if why:
            result.skipped.append((f"step, {case.name}", c.name, why))
            continue
        check_step(c.name, results, exact, s)
        steps[c.name] = prepared
    for name, way in EAGER_STEPS.items() if s.dtype == "float32" else ():
        steps[name] = _eager(way, own())
        check_step(name, steps[name].results(), exact, s)
    return steps


def kernel_of(step: Run) -> Run | None:
    """Return the call of the kernel that a step of `cpp` makes, None where it makes none."""
    # Prepare now what is prepared once.
    step()
    seen: list[Run] = []
    loaded: Any = library.library()
    doors = {name: getattr(loaded, name) for name in DOORS if hasattr(loaded, name)}

    def recorded(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any) -> Any:
            seen.append(functools.partial(kernel, *arguments))
            return kernel(*arguments)

        return record

    try:
        for name, kernel in doors.items():
            setattr(loaded, name, recorded(kernel))
        # Keep what it writes to alive as long as it is called.
        written = step()
    finally:
        for name, kernel in doors.items():
            setattr(loaded, name, kernel)
    if not seen:
        return None
    *_, call = seen
    return lambda: (call(), written)


def step_rows(
    case: Case, contenders: Sequence[Contender], s: Setting, rates: Rates, result: Result
) -> None:
    """Check the steps of contenders and of the eager ways, then time them in turns.

    Raises:
        RefusedError: one of them computes something else.
    """
    x = make_kernel_step_inputs(
        case.sizes, s.torch_dtype, torch.float32, s.device, channels=case.channels
    )
    with torch.no_grad(), ExitStack() as contexts:
        for c in contenders:
            contexts.enter_context(c.context())
        steps = _prepare(contenders, x, case, s, result)
        runs = {name: prepared.run for name, prepared in steps.items()}
        if "cpp" in runs and (kernel := kernel_of(runs["cpp"])) is not None:
            runs[KERNEL] = kernel
        assert x.state is not None
        state = x.state.clone()
        runs[PASS] = lambda: state.mul_(1.0)
        timing = _in_turns(runs, s)
    eager = [name for name in timing if name in EAGER_STEPS]
    best = min(eager, key=lambda name: timing[name].median, default=None)
    peers = [c.name for c in contenders if c.is_peer and c.name in timing]
    against = [*([] if best is None else [best]), *peers]
    ours = [c.name for c in contenders if not c.is_peer]
    element = s.torch_dtype.itemsize
    floor = rates.floor(GATED_DELTA_STEP, case.sizes, element, channels=case.channels)
    alone = (KERNEL, PASS)
    for names, others in (
        ([name for name in timing if name not in alone], against),
        ([name for name in timing if name in alone], [PASS]),
    ):
        some = {name: timing[name] for name in (*names, *others)}
        rows = timed_rows(
            "step", case.name, "us", some, others, ours=ours, per=IN_A_ROW, floor=floor
        )
        result.rows += [row for row in rows if row.comparator in names]


def _in_turns(runs: dict[str, Run], s: Setting) -> dict[str, Timing]:
    """Time IN_A_ROW calls of each in turns."""

    def block(run: Run) -> Run:
        def calls() -> None:
            for _ in range(IN_A_ROW):
                run()

        return calls

    return interleave(
        {name: block(run) for name, run in runs.items()},
        ROUNDS,
        warmups=2,
        device=find_device(s.device),
        collect=False,
        rest=STEP_REST if s.device == "cpu" else 0.0,
    )


def check_step(name: str, results: Sequence[Tensor], exact: Sequence[Tensor], s: Setting) -> None:
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
