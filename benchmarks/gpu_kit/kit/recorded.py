"""Find the launches of benchmark, short check and tuning, without a GPU and without memory.

They come in the order in which one process makes them: Triton's key of a kernel depends on which
kernels were looked at before, because the constants of a function that it calls count only where
that function was.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gdn_ops.aot.results import Sample
from gdn_ops.aot.sampling import reasons_against, run
from gdn_ops.bench.gpu.conformance import CALLS
from gdn_ops.bench.gpu.rows import ROWS, GpuRow
from gdn_ops.bench.inputs import Setting, find_case, inputs_of
from gdn_ops.call.bind import Call, arguments_of, bind
from gdn_ops.dispatch.backend import Backend
from gdn_ops.kernel_support.launches import Launch, recording
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP
from gdn_ops.testing.example import Example


def drawn(draw: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the arguments that a function draws, as tensors without memory and without numbers."""
    with FakeTensorMode():
        values = draw()
    return {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        if isinstance(x, torch.Tensor)
        else x
        for name, x in values.items()
    }


def arguments_of_row(row: GpuRow) -> dict[str, Any]:
    """Draw the arguments of a row as `gdn_ops.bench.contender` gives them."""
    x = row.draw("cpu")
    values = x.named()
    if row.what == "step":
        return {**values, "inplace": True}
    state = values.pop("state", None)
    return {**values, "initial_state": state, "cu_seqlens": x.cu_seqlens}


def row_calls(is_step: bool) -> Iterator[tuple[str, Call]]:
    """Yield the calls of the rows of `bench gpu`, or of its rows of steps alone."""
    for row in ROWS:
        if is_step and row.what != "step":
            continue
        values, spec = drawn(functools.partial(arguments_of_row, row)), GATED_DELTA
        if row.what == "step":
            spec = GATED_DELTA_STEP
        call = bind(spec, arguments_of(spec, values), check_values=False)
        yield row.name, replace(call, needs_grad=row.what == "backward")


def check_calls() -> Iterator[tuple[str, Call]]:
    """Yield the calls of the short check: with gradients, and single steps."""
    for _, example in CALLS:
        arguments = drawn(example.arguments)
        call = bind(GATED_DELTA, arguments_of(GATED_DELTA, arguments), check_values=False)
        for needs_grad in (False, True):
            yield f"check {example}", replace(call, needs_grad=needs_grad)
        yield from step_calls(example, arguments)


def step_calls(example: Example, arguments: dict[str, Any]) -> Iterator[tuple[str, Call]]:
    """Yield the calls of a step on the first token of an example, in place and not."""
    if example.lengths is not None or example.dtype == "float32":
        return
    tokens = {
        n: arguments[n]
        for n in ("q", "k", "v", "alpha", "log_alpha", "beta", "erase", "write")
        if arguments.get(n) is not None
    }
    first = {name: x[:, 0] for name, x in tokens.items()}
    s = example.sizes
    first["state"] = torch.empty(s.B, s.HV, s.K, s.V, dtype=torch.float32, device="meta")
    for inplace in (False, True):
        values = {**first, "inplace": inplace}
        call = bind(GATED_DELTA_STEP, arguments_of(GATED_DELTA_STEP, values), check_values=False)
        yield f"check step {example}", call


def tuned_calls(backend: Any, target: str, cases: list[str]) -> Iterator[tuple[str, Call, Context]]:
    """Yield the calls of `bench --tune` on cases, each with the configuration that it runs in."""
    for name in cases:
        draw = functools.partial(inputs_of, find_case(name), Setting("bfloat16"))
        values = drawn(lambda draw=draw: draw().named())
        call = bind(GATED_DELTA, arguments_of(GATED_DELTA, values), check_values=False)
        with recording(target):
            configurations = backend.tunables(call)
        for configuration in configurations:
            using = functools.partial(backend.using, configuration)
            for needs_grad in (False, True):
                yield f"tune {name}", replace(call, needs_grad=needs_grad), using


HISTORIES = ("bench", "steps", "check", "tune")
"""Processes that launch: all rows, rows of steps alone, the short check, and tuning."""

Context = Callable[[], AbstractContextManager[object]]


def calls_of(
    history: str, backend: Any, target: str, cases: list[str]
) -> Iterator[tuple[str, Call, Context]]:
    """Yield the calls of a process, each with its label and the context that it runs in."""
    if history == "tune":
        yield from tuned_calls(backend, target, cases)
        return
    for label, call in check_calls() if history == "check" else row_calls(history == "steps"):
        yield label, call, contextlib.nullcontext


def launches(history: str, backend: Backend, target: str, cases: list[str]) -> Iterator[Launch]:
    """Yield the launches of the calls of a process that the backend can run, for a target."""
    for label, call, context in calls_of(history, backend, target, cases):
        sample = Sample(label, call, False)
        with recording(target) as noted, context():
            if not reasons_against(backend, sample):
                run(backend, sample)
        yield from noted
