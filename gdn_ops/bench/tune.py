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
from dataclasses import replace
from typing import Any

import torch

from gdn_ops.bench.contender import Contender, Prepared
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
from gdn_ops.bench.steps import check_step
from gdn_ops.bench.turns import Timing, interleave, sample_in_turns
from gdn_ops.bench.verify import define_step, verify
from gdn_ops.call.bind import Call, arguments_of, bind
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import Backend
from gdn_ops.kernel_support.tuning import Tunable
from gdn_ops.spec.errors import BackendUnsupportedError, SpecError
from gdn_ops.spec.language import Case, OpSpec
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP
from gdn_ops.torch_ops import eager

AS_IT_IS = "as it is"
"""Name of the candidate that leaves the choice to the backend."""


def candidates(backend: Backend, call: Call) -> list[Contender]:
    """Return the configurations to try on a call, each a contender in the context of its own.

    Its name is the row to paste into the backend's table, or AS_IT_IS.

    Raises:
        ValueError: the backend exposes none.
    """
    if not (isinstance(backend, Tunable) and (configs := backend.tunables(call))):
        raise ValueError(f"backend {backend.name!r} exposes no configurations to tune")

    def sequence(x: Inputs) -> Prepared:
        return Prepared(lambda: eager.run_sequence(backend, _bound(GATED_DELTA, x))[:1])

    def step(x: Inputs) -> Prepared:
        in_place = _bound(GATED_DELTA_STEP, x, inplace=True)
        return Prepared(lambda: eager.run_step(backend, in_place))

    own = [
        Contender(str(c), sequence, step, context=functools.partial(backend.using, c))
        for c in configs
    ]
    return [Contender(AS_IT_IS, sequence, step), *own]


def _bound(spec: OpSpec, x: Inputs, **given: object) -> Call:
    return bind(spec, arguments_of(spec, {**x.named(), **given}))


def tune(name: str, cases: Sequence[str], setting: Setting) -> Iterator[str]:
    """Measure every candidate configuration of a backend, in turns.

    Returns:
        An iterator that measures. It yields lines to print for each case, or qwen-16-32-2048: a row
        per candidate, then that to paste.

    Raises:
        SpecError, ValueError: the backend cannot be tuned, or only emulates on the device, or a
            case cannot be taken: raised before anything is measured.
        BackendUnsupportedError: the backend cannot run a case.
    """
    backend = registry.get_backend(name)
    if isinstance(backend, str):
        raise ValueError(f"backend {name!r} is not available: {backend}")
    kind = setting.device.partition(":")[0]
    if kind in backend.limits.emulated_devices:
        raise ValueError(f"backend {name!r} only emulates on {kind}: tune it with --device cuda")
    chosen = [find_case(name) for name in dict.fromkeys(cases or ["qwen-16-32-2048"])]
    for case in chosen:
        if case.lengths:
            raise SpecError(
                f"case {case.name!r} is many sequences in one row, which --tune does not measure"
            )
    for case in chosen:
        _check(backend, case, setting)
    return _lines(backend, chosen, setting)


def _check(backend: Backend, case: Case, setting: Setting) -> None:
    """Refuse a case that the backend cannot run, or for which it has nothing to tune."""
    make, spec = make_inputs, GATED_DELTA
    if case.sizes.T == 1:
        make, spec = make_step_inputs, GATED_DELTA_STEP
    call = _bound(spec, make(case.sizes, setting.torch_dtype, setting.device))
    candidates(backend, call)
    against = registry.reasons(backend, call)
    if against:
        raise BackendUnsupportedError(
            f"backend {backend.name!r} cannot run case {case.name!r}: {'; '.join(against)}"
        )


def _lines(backend: Backend, cases: Sequence[Case], setting: Setting) -> Iterator[str]:
    """Measure the candidates on each case, and yield the lines of `tune`."""
    for case in cases:
        yield f"{case}, {setting.dtype}"
        tuned = _step_actions if case.sizes.T == 1 else _sequence_actions
        for what, runs, failed in tuned(backend, case, setting):
            yield from (f"{row}  failed: {text}" for row, text in failed.items())
            times = _time(runs, setting)
            for row, t in times.items():
                yield f"{what}  {t.median * 1e3:10.4f} ms  {row}"
            own = [row for row in times if row != AS_IT_IS]
            if own:
                best = min(own, key=lambda row: times[row].median)
                yield f"fastest {what}: {best}"


Found = Iterator[tuple[str, dict[str, Run], dict[str, str]]]


def _sequence_actions(backend: Backend, case: Case, setting: Setting) -> Found:
    """Check the candidates for a forward, then for forward and backward; yield those that pass."""
    x = make_inputs(case.sizes, setting.torch_dtype, setting.device)
    d_o = make_output_gradient(case.sizes, setting.torch_dtype, setting.device)

    for what, operands in (("forward", x), ("forward+backward", x.with_grad())):
        gradients = what != "forward"
        if gradients and not backend.limits.grad:
            continue
        space = candidates(backend, _bound(GATED_DELTA, operands))
        called, failed = _call(space, lambda c: c.output(x))
        used = [c for c in space if c.name in called]
        if used:
            verify(used, case, x, gradients=gradients)
        yield what, {c.name: _within(c, c.run(what, x, d_o)) for c in used}, failed


def _call(
    space: list[Contender], call: Callable[[Contender], Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Call a function of every candidate in its context; return the values, and the errors."""
    values, failed = {}, {}
    for c in space:
        try:
            # A configuration that does not compile is no reason to stop.
            with c.context():
                values[c.name] = call(c)
        except Exception as error:
            failed[c.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return values, failed


def _step_actions(backend: Backend, case: Case, setting: Setting) -> Found:
    """Check the candidates for a step; yield those that pass."""
    s = case.sizes
    start = torch.randn(s.B, s.HV, s.K, s.V, dtype=torch.float32, device=setting.device)
    x = replace(make_step_inputs(s, setting.torch_dtype, setting.device), state=start)
    exact = define_step(x)
    space = candidates(backend, _bound(GATED_DELTA_STEP, x, inplace=True))
    runs = {c.name: c.step(replace(x, state=start.clone())).run for c in space}
    results, failed = _call(space, lambda c: runs[c.name]())
    for name, result in results.items():
        check_step(name, result, exact, setting)
    yield "step", {c.name: _within(c, runs[c.name]) for c in space if c.name in results}, failed


def _time(actions: dict[str, Run], setting: Setting) -> dict[str, Timing]:
    """Time the actions that passed, in turns."""
    if not setting.device.startswith("cuda"):
        return interleave(actions, setting.repeats, device=find_device(setting.device))
    device = Cuda(torch.device(setting.device).index or 0)
    with device.working():
        replays = {name: _captured(run, device) for name, run in actions.items()}
        samples = sample_in_turns(replays, 2.0 * len(replays), device.clock)
    return {name: Timing(tuple(times)) for name, times in samples.items()}


def _within(c: Contender, run: Run) -> Run:
    """Return a run in a contender's context."""

    def wrapped() -> object:
        with c.context():
            return run()

    return wrapped


def _captured(run: Run, device: Cuda) -> Callable[[], float]:
    """Return a function that times the device's work of a run."""
    for _ in range(WARMUPS):
        run()
    try:
        return device.graph([run])
    except RuntimeError:
        return device.events([run])
