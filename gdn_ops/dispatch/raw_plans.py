"""Run a step whose gates are raw in one call of a backend that makes them itself.

A step of gates that are made before costs one operation of torch after another for them. Where the
backend of the step has a kernel that makes them, calls of one signature go there, as those of
`plans` do; where anything is unusual, or the call is wrong, the gates are made before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from gdn_ops.call.bind import Arguments, bind, signature
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import Backend, PreparedRaw, RawGates
from gdn_ops.dispatch.plans import MOST_PLANS, Plan, is_ordinary
from gdn_ops.spec.errors import BackendUnsupportedError, SpecError
from gdn_ops.spec.ops import GATED_DELTA_STEP


class _Found(NamedTuple):
    """Hold the plan of the calls of one signature, and what its backend has prepared."""

    plan: Plan
    run: PreparedRaw


_found: OrderedDict[Any, _Found | None] = OrderedDict()
"""By signature and gates; None where the backend has no kernel for them."""


def run(
    arguments: Arguments,
    gates: RawGates,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    check: Callable[[], object],
) -> tuple[Tensor, Tensor] | None:
    """Run a step of raw gates, if its backend makes them.

    Args:
        arguments: those of the step; log_alpha and beta are raw.
        gates: what is made of them.
        A_log, dt_bias: the parameters of the decay.
        check: raises where they do not fit the raw decay; called once for a signature.

    Returns:
        o and the new state; or None: then nothing is done yet.
    """
    if not is_ordinary():
        return None
    parts: list[Any] = [gates]
    needs_grad = False
    for x in (A_log, dt_bias):
        if x is None:
            parts.append(None)
            continue
        if type(x) is not Tensor and type(x) is not Parameter:
            return None
        if x.dtype != torch.float32 or not x.is_contiguous():
            return None
        parts += (x.shape, x.device)
        needs_grad |= x.requires_grad
    if needs_grad and torch.is_grad_enabled():
        return None
    key = signature(GATED_DELTA_STEP, arguments)
    if key is None:
        return None
    whole = (key, *parts)
    if whole not in _found:
        _found[whole] = _find(arguments, gates, check)
        if len(_found) > MOST_PLANS:
            _found.popitem(last=False)
    found = _found[whole]
    if found is None:
        return None
    prepared = partial(found.run, A_log, dt_bias)
    results: tuple[Tensor, Tensor] | None = found.plan._replace(run=prepared).repeated(arguments)
    return results


def _find(arguments: Arguments, gates: RawGates, check: Callable[[], object]) -> _Found | None:
    """Return the plan for calls like one, or None where there is none, or the call is wrong."""
    try:
        check()
        call = bind(GATED_DELTA_STEP, arguments, check_values=False)
        backend: Backend = registry.select(call, arguments.backend)
    except (SpecError, BackendUnsupportedError):
        return None
    if call.needs_grad or not registry.is_first(backend, call, arguments.backend):
        return None
    call = call.without_memory()
    prepared = backend.prepared_raw(call, gates)
    if prepared is None:
        return None
    plan = Plan(call, arguments.backend, backend, partial(prepared, None, None))
    return _Found(plan, prepared)
