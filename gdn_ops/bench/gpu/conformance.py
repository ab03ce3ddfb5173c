"""Check a backend briefly before `bench gpu` times it: fixed calls at the widths that are timed.

It is no certificate: `gdn-ops check` draws many more. Here a kernel is compiled for few shapes, so
that the check ends within a minute, and nothing but torch is needed. Of a call that fails the
smallest one that still fails is shown, as code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from gdn_ops.bench.contender import error_line
from gdn_ops.bench.gpu.result import Conformance
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import Backend
from gdn_ops.spec.errors import BackendUnsupportedError
from gdn_ops.spec.rules import Limits
from gdn_ops.testing.decode_laws import (
    an_in_place_step_equals_a_step,
    single_steps_equal_one_prefill,
)
from gdn_ops.testing.example import Example
from gdn_ops.testing.laws import a_reset_forgets_the_past, rows_of_a_batch_do_not_meet
from gdn_ops.testing.oracle import Verdict, judge


def _wide(**changes: Any) -> Example:
    common = {"dtype": "bfloat16", "H": 2, "R": 2, "K": 128, "V": 128, "gate": "slow"}
    return Example(**{**common, "initial_state": True, "log_gate": True, **changes})


def _outputs_and_gradients(backend: str, example: Example) -> Verdict:
    instance = registry.get_backend(backend)
    return judge(example, backend, isinstance(instance, Backend) and instance.limits.grad)


Law = Callable[[str, Example], Verdict]

CALLS: tuple[tuple[Law, Example], ...] = (
    (_outputs_and_gradients, _wide(T=150)),
    (_outputs_and_gradients, _wide(T=200, lengths=(70, 0, 1, 129))),
    (single_steps_equal_one_prefill, _wide(T=16)),
    (an_in_place_step_equals_a_step, _wide(B=3)),
    (_outputs_and_gradients, _wide(T=129, gate="extreme", log_gate=False, keys="repeated")),
    (_outputs_and_gradients, _wide(B=2, T=65, gate="strong", beta="wide")),
    (_outputs_and_gradients, _wide(T=64, H=1, R=4, keys="parallel", strided=True)),
    (rows_of_a_batch_do_not_meet, _wide(B=3, T=70)),
    (a_reset_forgets_the_past, _wide(T=70)),
    (_outputs_and_gradients, _wide(T=150, channels=True)),
    (_outputs_and_gradients, _wide(T=200, lengths=(70, 0, 1, 129), channels=True)),
    (single_steps_equal_one_prefill, _wide(T=16, channels=True)),
    (an_in_place_step_equals_a_step, _wide(B=3, channels=True)),
    (_outputs_and_gradients, _wide(T=129, channels=True, gate="extreme", log_gate=False)),
    (_outputs_and_gradients, _wide(T=65, channels=True, apart="channels")),
    (_outputs_and_gradients, _wide(T=70, dtype="float32")),
    (_outputs_and_gradients, _wide(T=70, K=96, V=192, R=1)),
)
"""(law, example of it), the most important first."""


def _code(law: Law, name: str, example: Example) -> str:
    """Return the code that judges a backend on an example again."""
    if law is _outputs_and_gradients:
        return example.code(name)
    return (
        "from gdn_ops.testing import Example\n"
        f"from {law.__module__} import {law.__name__}\n"
        f"print({law.__name__}({name!r}, {example!r}))"
    )


def _is_within(limits: Limits, example: Example, *, decode: bool = False) -> bool:
    dims = limits.head_dims
    return (
        example.dtype in limits.dtypes
        and (example.lengths is None or limits.varlen)
        and _has_widths(limits, example, decode)
        and (dims is None or {example.K, example.V} <= set(dims))
        and example.K % limits.head_dim_multiple == 0
        and example.V % limits.head_dim_multiple == 0
    )


def _has_widths(limits: Limits, example: Example, decode: bool) -> bool:
    """Return whether calls may have an example's decays, and its erase and write."""
    limits = limits.of(decode=decode)
    if example.channels and "channel" not in limits.decays:
        return False
    if example.apart is None:
        return True
    erases = "channel" if example.apart in ("channels", "erase") else "scalar"
    writes = "channel" if example.apart in ("channels", "write") else "scalar"
    return limits.apart and erases in limits.erases and writes in limits.writes


def _smaller(example: Example) -> Iterator[Example]:
    """Yield calls that are smaller or plainer than an example in one respect."""
    if example.lengths is not None:
        yield replace(example, lengths=None, T=max(example.lengths))
    elif example.T > 1:
        yield from (replace(example, T=T) for T in (1, example.T // 2, example.T - 1))
    plain: dict[str, Any] = {
        "B": 1,
        "R": 1,
        "H": 1,
        "initial_state": False,
        "strided": False,
        "keys": "random",
        "channels": False,
        "apart": None,
    }
    for name, value in plain.items():
        if getattr(example, name) != value:
            yield replace(example, **{name: value})


def smallest(law: Law, name: str, example: Example, is_time_up: Callable[[], bool]) -> Example:
    """Return the smallest call found on which a backend is still wrong, from one where it is."""

    def is_wrong(smaller: Example) -> bool:
        try:
            return not law(name, smaller).passed
        except Exception:
            # Pass over what a smaller call raises: it may be another fault than the one looked for.
            return False

    while True:
        tried = (smaller for smaller in _smaller(example) if not is_time_up())
        found = next(filter(is_wrong, tried), None)
        if found is None:
            return example
        example = found


def short_check(
    name: str, device: str, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> Iterator[Conformance]:
    """Judge the calls that a backend can run; yield the result so far before and after each.

    No call but the first is begun after `seconds`. Before a call the text is its code: it names the
    call that a process did not survive.
    """
    instance = registry.get_backend(name)
    if isinstance(instance, str):
        raise BackendUnsupportedError(f"backend {name!r}: {instance}")
    calls = [
        (law, replace(example, device=device))
        for law, example in CALLS
        if _is_within(instance.limits, example, decode=law is an_in_place_step_equals_a_step)
    ]
    end, so_far = clock() + seconds, Conformance(name, True, 0, len(calls))

    def is_time_up() -> bool:
        return clock() > end

    for law, example in calls:
        if so_far.examples and is_time_up():
            yield replace(so_far, text=f"the time of {seconds:.0f} s was up")
            return
        yield replace(so_far, text=_code(law, name, example))
        judged, worst = so_far.examples + 1, so_far.worst
        try:
            verdict = law(name, example)
        except BackendUnsupportedError:
            continue
        except torch.OutOfMemoryError as error:
            # Others use the same memory meanwhile.
            yield replace(
                so_far, text=f"not judged: {error_line(error)}\n{_code(law, name, example)}"
            )
            return
        except Exception as error:
            text = f"raised {error_line(error)}\n{_code(law, name, example)}"
            yield replace(so_far, passed=False, examples=judged, text=text)
            return
        so_far = replace(so_far, examples=judged, worst=max(worst, verdict.worst))
        if not verdict.passed:
            shown = smallest(law, name, example, is_time_up)
            text = f"{verdict}\n{_code(law, name, shown)}"
            yield replace(so_far, passed=False, text=text)
            return
        yield so_far
