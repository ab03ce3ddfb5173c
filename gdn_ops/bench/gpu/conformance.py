"""Check a backend briefly before `bench gpu` times it: fixed calls at the widths that are timed.

It is no certificate: `gdn-ops check` draws many more. Here a kernel is compiled for few shapes, so
that the check ends within a minute, and nothing but torch is needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

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


CALLS: tuple[tuple[Callable[[str, Example], Verdict], Example], ...] = (
    (_outputs_and_gradients, _wide(T=150)),
    (_outputs_and_gradients, _wide(T=200, lengths=(70, 0, 1, 129))),
    (single_steps_equal_one_prefill, _wide(T=16)),
    (an_in_place_step_equals_a_step, _wide(B=3)),
    (_outputs_and_gradients, _wide(T=129, gate="extreme", log_gate=False, keys="repeated")),
    (_outputs_and_gradients, _wide(B=2, T=65, gate="strong", beta="wide")),
    (_outputs_and_gradients, _wide(T=64, H=1, R=4, keys="parallel", strided=True)),
    (rows_of_a_batch_do_not_meet, _wide(B=3, T=70)),
    (a_reset_forgets_the_past, _wide(T=70)),
    (_outputs_and_gradients, _wide(T=70, dtype="float32")),
    (_outputs_and_gradients, _wide(T=70, K=96, V=192, R=1)),
)
"""(law, example of it), the most important first."""


def _is_within(limits: Limits, example: Example) -> bool:
    dims = limits.head_dims
    return (
        example.dtype in limits.dtypes
        and (example.lengths is None or limits.varlen)
        and (dims is None or {example.K, example.V} <= set(dims))
        and example.K % limits.head_dim_multiple == 0
        and example.V % limits.head_dim_multiple == 0
    )


def short_check(
    name: str, device: str, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> Iterator[Conformance]:
    """Judge the calls that a backend can run; yield the result so far after each of them.

    No call but the first is begun after `seconds`.
    """
    instance = registry.get_backend(name)
    if isinstance(instance, str):
        raise BackendUnsupportedError(f"backend {name!r}: {instance}")
    calls = [
        (law, replace(example, device=device))
        for law, example in CALLS
        if _is_within(instance.limits, example)
    ]
    start, worst, done = clock(), 0.0, 0
    for law, example in calls:
        if done and clock() - start > seconds:
            text = f"the time of {seconds:.0f} s was up"
            yield Conformance(name, True, done, len(calls), worst, text)
            return
        try:
            verdict = law(name, example)
        except BackendUnsupportedError:
            continue
        done += 1
        worst = max(worst, verdict.worst)
        if not verdict.passed:
            text = f"{verdict}\n{example.code(name)}"
            yield Conformance(name, False, done, len(calls), worst, text)
            return
        yield Conformance(name, True, done, len(calls), worst)
