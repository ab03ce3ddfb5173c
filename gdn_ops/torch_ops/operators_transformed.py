"""Run the registered operators under the transforms of torch.func as the public functions run.

torch asks the dispatch key of all transforms first. Registered there, an operator that a transform
concerns becomes the call that the public function makes, and any other is called outside of them.
What a backward wants saved is not returned then: it is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gdn_ops.call import transforms
from gdn_ops.call.bind import Call, bind
from gdn_ops.dispatch.backend import Backend
from gdn_ops.dispatch.registry import select
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP
from gdn_ops.torch_ops import eager, transformed
from gdn_ops.torch_ops.operators import OPERATORS, Operator, empty_states

TRANSFORMS = "FuncTorchDynamicLayerFrontMode"
"""The dispatch key that is asked while a transform is active, before any other of tensors."""


def _run(operator: Operator, values: tuple[Any, ...]) -> Any:
    """Run an operator in a transformed function."""
    arguments, extra = operator.arguments(values)
    call = bind(operator.spec, arguments, check_values=False, sees_transforms=True)
    given = [x for x in extra if isinstance(x, Tensor)]
    if given:
        under = call.transforms.joined(transforms.transforms_of(given))
        call = replace(call, needs_grad=operator.needs_grad(*extra), transforms=under)
    tensors = [x for x in values if isinstance(x, Tensor)]
    if call.transforms is transforms.NONE and not any(map(transforms.is_wrapped, tensors)):
        with transforms.outside():
            return getattr(torch.ops.gdn_ops, operator.name)(*values)
    backend = select(call, arguments.backend)
    if given:
        return transformed.run_backward(backend, call, *given)
    return _results(operator, backend, call)


def _results(operator: Operator, backend: Backend, call: Call) -> tuple[Any, ...] | Tensor:
    """Return what an operator returns, from a call that is run eagerly."""
    results: tuple[Any, ...]
    if call.op is GATED_DELTA:
        results = (*eager.run_sequence(backend, call), [])
    elif call.op is GATED_DELTA_STEP:
        results = eager.run_step(backend, call)
    else:
        o, state, states = eager.run_steps(backend, call)
        results = (o, state, empty_states(call) if states is None else states)
    if operator.is_inplace:
        results = (results[0], *results[2:])
    return results[0] if len(results) == 1 else results


def _kernel(operator: Operator) -> Callable[..., Any]:
    """Return what torch calls for an operator."""
    return lambda *values: _run(operator, values)


_LIBRARY = torch.library.Library("gdn_ops", "FRAGMENT")  # unregisters when it is collected

for _operator in OPERATORS:
    _LIBRARY.impl(_operator.name, _kernel(_operator), TRANSFORMS)
