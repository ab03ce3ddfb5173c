"""Measure a backend's configurations and print rows to paste into its table.

A backend takes part through `tunables(call)` and `using(config)` (`Tunable`); str() of a
configuration is the row to paste. Every candidate is checked first; one that fails is a line with
its error. Steps are timed for cases of one token, forward and forward with backward for the
others. On a GPU the time is that of the device's work, replayed from a graph where it can be
captured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gdn_ops.bench.device import Run, find_device
from gdn_ops.bench.gpu.device import Cuda
from gdn_ops.bench.gpu.measuring import WARMUPS
from gdn_ops.bench.inputs import (
    Inputs,
    Setting,
    find_case,
    make_inputs,
    make_output_gradient,
    make_step_inputs,
)
from gdn_ops.bench.peers import Contender, Prepared
from gdn_ops.bench.steps import check_step
from gdn_ops.bench.turns import Timing, interleave, sample_in_turns
from gdn_ops.bench.verify import verify
from gdn_ops.call.bind import Call, arguments_of, bind
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import Backend
from gdn_ops.kernel_support.tuning import Tunable
from gdn_ops.spec.language import Case, OpSpec
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP
from gdn_ops.torch_ops import eager

AS_IT_IS = "as it is"
"""Name of the candidate that leaves the choice to the backend."""


@dataclass(frozen=True)
class Candidate:
    """Hold one configuration of a backend to try.

    Attributes:
        name: the row to paste into the backend's table, or AS_IT_IS.
        backend: that runs.
        context: in which it runs with this configuration.
    """

    name: str
    backend: Backend
    context: Callable[[], AbstractContextManager[object]] = nullcontext


def candidates(backend: Backend, call: Call) -> list[Candidate]:
    """Return the configurations to try on a call.

    Raises:
        ValueError: the backend exposes none.
    """
    if isinstance(backend, Tunable) and (configs := backend.tunables(call)):
        own = [Candidate(str(c), backend, functools.partial(backend.using, c)) for c in configs]
        return [Candidate(AS_IT_IS, backend), *own]
    raise ValueError(f"backend {backend.name!r} exposes no configurations to tune")


def _bound(spec: OpSpec, **given: object) -> Call:
    return bind(spec, arguments_of(spec, given))


def tune(name: str, cases: Sequence[str], setting: Setting) -> Iterator[str]:
    """Measure every candidate configuration of a backend, in turns.

    Args:
        name: of the backend.
        cases: names; qwen-16-32-2048 if there are none.
        setting: dtype, device, repeats.

    Yields:
        Lines to print: a row per candidate, then the row to paste.

    Raises:
        ValueError: the backend cannot be tuned, or only emulates on the device.
    """
    backend = registry.get_backend(name)
    if isinstance(backend, str):
        raise ValueError(f"backend {name!r} is not available: {backend}")
    kind = setting.device.partition(":")[0]
    if kind in backend.limits.emulated_devices:
        raise ValueError(f"backend {name!r} only emulates on {kind}: tune it with --device cuda")
    for case_name in cases or ["qwen-16-32-2048"]:
        case = find_case(case_name)
        yield f"{case}, {setting.dtype}"
        tuned = _step_actions if case.sizes.T == 1 else _sequence_actions
        for what, found, failed in tuned(backend, case, setting):
            yield from (f"{row}  failed: {text}" for row, text in failed.items())
            times = _time(found, setting)
            for row, t in times.items():
                yield f"{what}  {t.median * 1e3:10.4f} ms  {row}"
            own = [row for row in times if row != AS_IT_IS]
            if own:
                best = min(own, key=lambda row: times[row].median)
                yield f"fastest {what}: {best}"


Actions = dict[str, tuple[Candidate, Run]]
Found = Iterator[tuple[str, Actions, dict[str, str]]]


def _sequence_actions(backend: Backend, case: Case, setting: Setting) -> Found:
    """Check the candidates for a forward, then for forward and backward; yield those that pass."""
    x = make_inputs(case.sizes, setting.torch_dtype, setting.device)
    d_o = make_output_gradient(case.sizes, setting.torch_dtype, setting.device)
    leaves = x.with_grad()

    def contender(c: Candidate) -> Contender:
        def sequence(given: Inputs) -> Prepared:
            def run() -> tuple[Tensor, ...]:
                return eager.run_sequence(c.backend, _bound(GATED_DELTA, **given.named()))[:1]

            return Prepared(run)

        return Contender(c.name, sequence, context=c.context)

    def forward(c: Contender) -> Run:
        return c.sequence(x).run

    def both(c: Contender) -> Run:
        call, operands = c.sequence(leaves), leaves.operands()
        return lambda: torch.autograd.grad(call.results()[0], operands, d_o)

    for what, operands, make in (("forward", x, forward), ("forward+backward", leaves, both)):
        if what != "forward" and not backend.limits.grad:
            continue
        space = candidates(backend, _bound(GATED_DELTA, **operands.named()))
        named = {c.name: contender(c) for c in space}
        passed, failed = _passed(list(named.values()), case, x, what != "forward")
        yield what, {c.name: (c, make(named[c.name])) for c in space if c.name in passed}, failed


def _passed(
    contenders: list[Contender], case: Case, x: Inputs, gradients: bool
) -> tuple[set[str], dict[str, str]]:
    """Return the names of the contenders that run, after verifying them, and others' errors."""
    failed: dict[str, str] = {}
    runs = []
    for c in contenders:
        try:
            # A configuration that does not compile is no reason to stop.
            with c.context():
                c.output(x)
            runs.append(c)
        except Exception as error:
            failed[c.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    if runs:
        verify(runs, case, x, gradients=gradients)
    return {c.name for c in runs}, failed


def _step_actions(backend: Backend, case: Case, setting: Setting) -> Found:
    """Check the candidates for a step; yield those that pass."""
    x = make_step_inputs(case.sizes, setting.torch_dtype, setting.device)
    s = case.sizes
    start = torch.randn(s.B, s.HV, s.K, s.V, device=setting.device)

    def action(c: Candidate, state: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        call = _bound(GATED_DELTA_STEP, **x.named(), state=state, inplace=True)
        return lambda: eager.run_step(c.backend, call)

    space = candidates(backend, _bound(GATED_DELTA_STEP, **x.named(), state=start, inplace=True))
    found: Actions = {}
    failed: dict[str, str] = {}
    for c in space:
        run = action(c, start.clone())
        try:
            with c.context():
                result = run()
        except Exception as error:
            failed[c.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        check_step(c.name, x, start, result, setting)
        found[c.name] = (c, run)
    yield "step", found, failed


def _time(actions: Actions, setting: Setting) -> dict[str, Timing]:
    """Time the actions that passed, in turns."""
    if not setting.device.startswith("cuda"):
        runs = {name: _within(c, run) for name, (c, run) in actions.items()}
        return interleave(runs, setting.repeats, device=find_device(setting.device))
    device = Cuda(torch.device(setting.device).index or 0)
    with device.working():
        replays = {name: _captured(c, run, device) for name, (c, run) in actions.items()}
        samples = sample_in_turns(replays, 2.0 * len(replays), device.clock)
    return {name: Timing(tuple(found)) for name, found in samples.items()}


def _within(c: Candidate, run: Run) -> Run:
    def wrapped() -> object:
        with c.context():
            return run()

    return wrapped


def _captured(c: Candidate, run: Run, device: Cuda) -> Callable[[], float]:
    """Return a function that times the device's work of a run."""
    with c.context():
        for _ in range(WARMUPS):
            run()
        try:
            return device.graph([run])
        except RuntimeError:
            return device.events([_within(c, run)])
