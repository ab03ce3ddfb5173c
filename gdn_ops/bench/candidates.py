"""Prepare the configurations that `gdn-ops bench --tune` tries: their calls, and whose is right.

A backend takes part through `tunables(call)` and `using(config)` (`Tunable`); str() of a
configuration is the row to paste. In a direction only those are tried that launch differently
there: a choice for the backward is no candidate for the forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn_ops.bench.contender import Contender, Prepared
from gdn_ops.bench.device import Run
from gdn_ops.bench.inputs import (
    Inputs,
    Setting,
    inputs_of,
    make_output_gradient,
    make_step_inputs,
)
from gdn_ops.bench.steps import check_step
from gdn_ops.bench.verify import Definition, RefusedError, define_step
from gdn_ops.call.bind import Call, arguments_of, bind
from gdn_ops.dispatch.backend import Backend
from gdn_ops.kernel_support.backend import KernelBackend
from gdn_ops.kernel_support.launches import Launch, recording
from gdn_ops.kernel_support.tuning import Tunable
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
        return Prepared(lambda: eager.run_sequence(backend, bound(GATED_DELTA, x))[:1])

    def step(x: Inputs) -> Prepared:
        in_place = bound(GATED_DELTA_STEP, x, inplace=True)
        return Prepared(lambda: eager.run_step(backend, in_place))

    own = [
        Contender(str(c), sequence, step, context=functools.partial(backend.using, c))
        for c in configs
    ]
    return [Contender(AS_IT_IS, sequence, step), *own]


def bound(spec: OpSpec, x: Inputs, **given: object) -> Call:
    """Return the call of inputs, with other arguments by name."""
    return bind(spec, arguments_of(spec, {**x.named(), **given}))


class Direction(NamedTuple):
    """Hold the candidates of one direction of a case.

    Attributes:
        what: "forward", "backward" or "step".
        space: the candidates that launch differently in it, AS_IT_IS first.
        first_call: calls a candidate; returns its run, to be timed, and its results.
        fault: returns what is wrong with the results of a candidate of that name, or "".
    """

    what: str
    space: list[Contender]
    first_call: Callable[[Contender], tuple[Run, list[Tensor]]]
    fault: Callable[[str, list[Tensor]], str]


def directions(backend: Backend, case: Case, setting: Setting) -> Iterator[Direction]:
    """Yield the directions in which a case is tuned: step, or forward and backward."""
    if case.sizes.T == 1:
        yield _step(backend, case, setting)
        return
    x = inputs_of(case, setting)
    d_o = make_output_gradient(case.sizes, setting.torch_dtype, setting.device)
    # It takes seconds, and whoever only calls candidates needs none.
    definition = functools.cache(lambda: Definition(case, x, d_o, backend.limits.grad))

    def forward(c: Contender) -> tuple[Run, list[Tensor]]:
        run = _within(c, c.sequence(x).run)
        return run, list(run())

    def backward(c: Contender) -> tuple[Run, list[Tensor]]:
        leaves = x.with_grad()
        with c.context(), torch.enable_grad():
            (o,) = c.sequence(leaves).results()
        grad = functools.partial(torch.autograd.grad, o, leaves.operands(), d_o, retain_graph=True)
        run = _within(c, grad)
        return run, [o.detach(), *run()]

    actions = {"forward": forward, "backward": backward}
    for what, action in actions.items() if backend.limits.grad else [("forward", forward)]:
        operands = x.with_grad() if what == "backward" else x
        space = candidates(backend, bound(GATED_DELTA, operands))
        distinct = _distinct(backend, space, operands, setting)
        yield Direction(what, distinct, action, _Judge(definition).fault)


class _Judge:
    """Judge the candidates of a direction by the definition, and by the first that was right."""

    def __init__(self, definition: Callable[[], Definition]) -> None:
        self.definition = definition
        self.first: tuple[str, list[Tensor]] | None = None

    def fault(self, name: str, results: list[Tensor]) -> str:
        """Return what is wrong with a candidate's o and gradients, or ""."""
        definition = self.definition()
        checks = [definition.check(name, results)]
        if self.first is not None:
            checks.append(definition.agree(name, results, *self.first))
        failed = "; ".join(str(check) for check in checks if not check.passed)
        if not failed and self.first is None:
            self.first = name, results
        return failed


def _step(backend: Backend, case: Case, setting: Setting) -> Direction:
    s = case.sizes
    start = torch.randn(s.B, s.HV, s.K, s.V, dtype=torch.float32, device=setting.device)
    drawn = make_step_inputs(s, setting.torch_dtype, setting.device, channels=case.channels)
    x = replace(drawn, state=start)
    exact = functools.cache(lambda: define_step(x))

    def step(c: Contender) -> tuple[Run, list[Tensor]]:
        run = _within(c, c.step(replace(x, state=start.clone())).run)
        return run, [y.clone() for y in run()]

    def fault(name: str, results: list[Tensor]) -> str:
        try:
            check_step(name, results, exact(), setting)
        except RefusedError as error:
            return str(error)
        return ""

    space = candidates(backend, bound(GATED_DELTA_STEP, x, inplace=True))
    return Direction("step", space, step, fault)


def _within(c: Contender, run: Callable[[], Any]) -> Callable[[], Any]:
    """Return a run in a contender's context."""

    def wrapped() -> Any:
        with c.context():
            return run()

    return wrapped


def _distinct(
    backend: Backend, space: list[Contender], x: Inputs, setting: Setting
) -> list[Contender]:
    """Return AS_IT_IS, and of the candidates that launch the same in a direction the first one.

    Launches are known of backends of kernels; all candidates of others are distinct.
    """
    if not isinstance(backend, KernelBackend):
        return space
    needs_grad = x.q.requires_grad
    on_meta = x.map(lambda y: y.detach().to("meta").requires_grad_(needs_grad))
    call = bound(GATED_DELTA, on_meta)
    target = backend.tables.target(torch.device(setting.device))
    as_it_is, *own = space
    first: dict[str, Contender] = {}
    for c in own:
        first.setdefault(_launched(backend, c, call, target), c)
    return [as_it_is, *first.values()]


def _launched(backend: Backend, c: Contender, call: Call, target: str) -> str:
    """Return a text of what a candidate launches in a call, in its backward if it needs one."""
    try:
        with recording(target) as launches, torch.no_grad(), c.context():
            out = backend.forward(call)
            if call.needs_grad:
                launches.clear()
                backend.backward(
                    call, out.saved, torch.empty_like(out.o), torch.empty_like(out.final_state)
                )
            return repr([_described(launch) for launch in launches])
    except Exception:
        # Leave it to the first call to tell what is wrong.
        return c.name


def _described(launch: Launch) -> tuple[object, ...]:
    """Return all of a launch that makes it what it is: tensors by dtype, shape and strides."""
    arguments = [
        (x.dtype, x.shape, x.stride()) if isinstance(x, Tensor) else x for x in launch.args
    ]
    return launch.kernel.__name__, launch.grid, arguments, sorted(launch.kwargs.items())
