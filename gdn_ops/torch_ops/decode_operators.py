"""Register the decode ops with torch.library from their specs: schema, fake and autograd.

    gdn_ops::gated_delta_step       one token
    gdn_ops::gated_delta_step_      one token, state updated in place
    gdn_ops::gated_delta_steps      a few tokens
    gdn_ops::gated_delta_steps_     a few tokens, state updated in place

The operators of a few tokens always return `states`; where it is not asked for, it has T = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gdn_ops.call.bind import Call
from gdn_ops.spec.language import OpSpec
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS
from gdn_ops.torch_ops.operators import (
    NAMESPACE,
    advance,
    advance_tokens,
    bound,
    differentiable_names,
    empty_output,
    full_precision,
    schema_arguments,
    schema_names,
    torch_schema,
)


def _empty_state(call: Call) -> Tensor:
    if call.state is not None:
        return torch.empty(call.state.shape, dtype=call.state.dtype, device=call.device)
    s = call.sizes
    return torch.empty((s.B, s.HV, s.K, s.V), dtype=call.compute_dtype, device=call.device)


def _empty_states(call: Call) -> Tensor:
    s = call.sizes
    stored = call.compute_dtype if call.state is None else call.state.dtype
    shape = (s.B, s.T if call.return_states else 0, s.HV, s.K, s.V)
    return torch.empty(shape, dtype=stored, device=call.device)


# One token.


def _step(*values: Any) -> tuple[Tensor, Tensor]:
    call, backend = bound(GATED_DELTA_STEP, values, False)
    with full_precision(call.device.type):
        return advance(backend, call)


def _step_fake(*values: Any) -> tuple[Tensor, Tensor]:
    call = bound(GATED_DELTA_STEP, values, False)[0]
    return empty_output(call), _empty_state(call)


def _step_inplace(*values: Any) -> Tensor:
    call, backend = bound(GATED_DELTA_STEP, values, False, inplace=True)
    with full_precision(call.device.type):
        return advance(backend, call)[0]


def _step_inplace_fake(*values: Any) -> Tensor:
    return empty_output(bound(GATED_DELTA_STEP, values, False, inplace=True)[0])


def _step_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    names = schema_names(GATED_DELTA_STEP)
    tensors = {arg.name for arg in GATED_DELTA_STEP.tensors}
    values = dict(zip(names, inputs, strict=True))
    ctx.attributes = {name: value for name, value in values.items() if name not in tensors}
    ctx.save_for_backward(*(values[n] for n in names if n in tensors))


def _step_autograd_backward(ctx: Any, d_o: Tensor, d_state: Tensor) -> tuple[Any, ...]:
    """Compute the gradients of a step as those of a sequence of one token."""
    names = schema_names(GATED_DELTA_STEP)
    tensor_names = [name for name in names if name not in ctx.attributes]
    values = ctx.attributes | dict(zip(tensor_names, ctx.saved_tensors, strict=True))
    if values["state_indices"] is not None:
        raise RuntimeError(NO_GRADIENTS.format("gated_delta_step with state_indices"))
    sequence = values | {"initial_state": values["state"], "cu_seqlens": None, "chunk_size": None}
    for name in tensor_names:
        if name != "state" and values[name] is not None:
            sequence[name] = values[name].unsqueeze(1)
    grads = iter(
        torch.ops.gdn_ops.gated_delta_backward(
            *(sequence[name] for name in schema_names(GATED_DELTA)), [], d_o.unsqueeze(1), d_state
        )
    )
    present = [name for name in differentiable_names(GATED_DELTA) if sequence[name] is not None]
    by_name = {
        name: next(grads) if name == "initial_state" else next(grads).squeeze(1) for name in present
    }
    by_name["state"] = by_name.pop("initial_state", None)
    return tuple(by_name.get(name) for name in names)


NO_GRADIENTS = "{} is for decoding and has no gradients; gated_delta has"


# A few tokens.


def _steps(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    call, backend = bound(GATED_DELTA_STEPS, values, False)
    with full_precision(call.device.type):
        o, state, states = advance_tokens(backend, call)
    return o, state, _empty_states(call) if states is None else states


def _steps_fake(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = bound(GATED_DELTA_STEPS, values, False)[0]
    return empty_output(call), _empty_state(call), _empty_states(call)


def _steps_inplace(*values: Any) -> tuple[Tensor, Tensor]:
    call, backend = bound(GATED_DELTA_STEPS, values, False, inplace=True)
    with full_precision(call.device.type):
        o, _, states = advance_tokens(backend, call)
    return o, _empty_states(call) if states is None else states


def _steps_inplace_fake(*values: Any) -> tuple[Tensor, Tensor]:
    call = bound(GATED_DELTA_STEPS, values, False, inplace=True)[0]
    return empty_output(call), _empty_states(call)


def _no_gradients(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(NO_GRADIENTS.format("gated_delta_steps"))


def _define_inplace(
    spec: OpSpec, function: Callable[..., Any], fake: Callable[..., Any], outputs: str
) -> None:
    """Register the operator that updates its state; its name ends in an underscore."""
    operator = torch.library.custom_op(
        f"{NAMESPACE}::{spec.name}_",
        function,
        mutates_args={"state"},
        schema=f"({', '.join(schema_arguments(spec, 'state'))}) -> {outputs}",
    )
    operator.register_fake(fake)


def _define() -> None:
    """Register the operators of the decode ops; runs once, at import."""
    step = torch.library.custom_op(
        f"{NAMESPACE}::gated_delta_step",
        _step,
        mutates_args=(),
        schema=torch_schema(GATED_DELTA_STEP),
    )
    step.register_fake(_step_fake)
    step.register_autograd(_step_autograd_backward, setup_context=_step_setup_context)
    _define_inplace(GATED_DELTA_STEP, _step_inplace, _step_inplace_fake, "Tensor o")
    steps = torch.library.custom_op(
        f"{NAMESPACE}::gated_delta_steps",
        _steps,
        mutates_args=(),
        schema=torch_schema(GATED_DELTA_STEPS),
    )
    steps.register_fake(_steps_fake)
    steps.register_autograd(_no_gradients)
    outputs = "(Tensor o, Tensor states)"
    _define_inplace(GATED_DELTA_STEPS, _steps_inplace, _steps_inplace_fake, outputs)


_define()
