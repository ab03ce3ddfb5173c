"""Register `gated_delta` with torch.library from its spec, and run the calls of all ops.

An operator looks its arguments up by the names in its schema, binds them like any call, and
hands them to a backend. Those of the decode ops stand in `decode_operators`; here are

    gdn_ops::gated_delta            the sequence op, with what its backward wants saved
    gdn_ops::gated_delta_backward   its gradients
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gdn_ops.call.bind import GRAD_NAMES, Call, bind
from gdn_ops.dispatch.backend import Backend, Grads
from gdn_ops.dispatch.decode_fallbacks import through_rows
from gdn_ops.dispatch.registry import select
from gdn_ops.spec.language import OpSpec, TensorArg
from gdn_ops.spec.ops import GATED_DELTA

NAMESPACE = "gdn_ops"

SECOND_ORDER = (
    "second derivatives of gated_delta need eager mode and a backend that has them: "
    'backend="torch" or backend="naive"'
)


def schema_arguments(spec: OpSpec, mutated: str | None = None) -> list[str]:
    """Return the arguments of a spec as torch schema text, in public order."""
    found = []
    for arg in spec.args:
        if isinstance(arg, TensorArg):
            kind = "Tensor(a!)" if arg.name == mutated else "Tensor"
            optional = "?" if arg.optional and arg.name != mutated else ""
            found.append(f"{kind}{optional} {arg.name}")
        elif arg.schema is not None:
            found.append(f"{arg.schema} {arg.name}")
    return found


def schema_names(spec: OpSpec) -> list[str]:
    """Return the names of the arguments that are part of an operator's schema."""
    return [a.name for a in spec.args if isinstance(a, TensorArg) or a.schema is not None]


def torch_schema(spec: OpSpec) -> str:
    """Return the torch.library schema of an op, given its spec."""
    outputs = [f"Tensor {output.name}" for output in spec.outputs]
    arguments = schema_arguments(spec)
    if spec is GATED_DELTA:
        arguments.append("bool save")
        outputs.append("Tensor[] saved")
    return f"({', '.join(arguments)}) -> ({', '.join(outputs)})"


def _arguments(spec: OpSpec, values: tuple[Any, ...], **more: Any) -> dict[str, Any]:
    """Return every argument of the public signature, given those of the schema in order."""
    arguments = {attr.name: attr.default for attr in spec.attrs}
    arguments.update(zip(schema_names(spec), values, strict=True))
    return {**arguments, **more}


def bound(
    spec: OpSpec, values: tuple[Any, ...], needs_grad: bool, **more: Any
) -> tuple[Call, Backend]:
    """Bind the arguments of an operator and select its backend. No value is looked at."""
    arguments = _arguments(spec, values, **more)
    call = replace(bind(spec, arguments, check_values=False), needs_grad=needs_grad)
    return call, select(call, arguments["backend"])


def empty_output(call: Call) -> Tensor:
    """Return an uninitialised tensor for o."""
    return torch.empty(call.v.shape, dtype=call.v.dtype, device=call.device)


# Asked once, at import: Dynamo of torch 2.11 does not trace the question.
_WITHOUT_AUTOCAST = frozenset(
    kind for kind in ("lazy", "meta", "vulkan") if not torch.amp.is_autocast_available(kind)
)


def is_autocast_on(device_type: str) -> bool:
    """Return whether autocast is active for a device type; some, like meta, have none."""
    return device_type not in _WITHOUT_AUTOCAST and torch.is_autocast_enabled(device_type)


def full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Return a context that keeps autocast out of a backend's own arithmetic."""
    if is_autocast_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


# The sequence op.


def _gated_delta(*values: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    *values_, save = values
    call, backend = bound(GATED_DELTA, tuple(values_), save)
    with full_precision(call.device.type):
        out = backend.forward(call)
    return out.o, out.final_state, [*out.saved] if save else []


def _gated_delta_fake(*values: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    *values_, save = values
    call, backend = bound(GATED_DELTA, tuple(values_), save)
    s = call.sizes
    state = torch.empty((s.N, s.HV, s.K, s.V), dtype=call.compute_dtype, device=call.device)
    return empty_output(call), state, [*backend.saved_like(call)] if save else []


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    names = schema_names(GATED_DELTA)
    tensors = {arg.name for arg in GATED_DELTA.tensors}
    values = dict(zip(names, inputs, strict=False))
    ctx.attributes = {name: value for name, value in values.items() if name not in tensors}
    ctx.tensor_count = len(tensors)
    ctx.save_for_backward(*(values[n] for n in names if n in tensors), *output[2])


def _autograd_backward(ctx: Any, d_o: Tensor, d_state: Tensor, d_saved: Any) -> tuple[Any, ...]:
    names = schema_names(GATED_DELTA)
    tensor_names = [name for name in names if name not in ctx.attributes]
    # Read once: under activation checkpointing a second read is an error.
    kept = ctx.saved_tensors
    tensors, saved = kept[: ctx.tensor_count], kept[ctx.tensor_count :]
    values = ctx.attributes | dict(zip(tensor_names, tensors, strict=True))
    grads = iter(
        torch.ops.gdn_ops.gated_delta_backward(
            *(values[name] for name in names), list(saved), d_o, d_state
        )
    )
    present = [name for name in differentiable_names(GATED_DELTA) if values[name] is not None]
    by_name = {name: next(grads) for name in present}
    return *(by_name.get(name) for name in names), None


def differentiable_names(spec: OpSpec) -> list[str]:
    """Return the names of the arguments that have gradients."""
    return [arg.name for arg in spec.tensors if arg.differentiable]


def _backward(*values: Any) -> list[Tensor]:
    *values_, saved, d_o, d_state = values
    call, backend = bound(GATED_DELTA, tuple(values_), True)
    with full_precision(call.device.type), torch.no_grad():
        grads = backend.backward(call, tuple(saved), d_o, d_state)
    return [
        torch.zeros_like(x) if grad is None else grad
        for x, grad in zip(_public_order(call.tensors()), _public_order(grads), strict=True)
        if x is not None
    ]


def _public_order(tensors: tuple[Tensor | None, ...] | Grads) -> list[Tensor | None]:
    """Reorder tensors, or their gradients, from GRAD_NAMES to the public signature."""
    by_name = dict(zip(GRAD_NAMES, tensors, strict=True))
    by_name["initial_state"] = by_name["state"]
    return [by_name[name] for name in differentiable_names(GATED_DELTA)]


def _backward_fake(*values: Any) -> list[Tensor]:
    call = bound(GATED_DELTA, tuple(values[:-3]), True)[0]
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in _public_order(call.tensors())
        if x is not None
    ]


def _no_second_order(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(SECOND_ORDER)


def _define() -> None:
    """Register the operators of `gated_delta`; runs once, at import."""
    sequence = schema_arguments(GATED_DELTA)
    forward = torch.library.custom_op(
        f"{NAMESPACE}::gated_delta", _gated_delta, mutates_args=(), schema=torch_schema(GATED_DELTA)
    )
    forward.register_fake(_gated_delta_fake)
    forward.register_autograd(_autograd_backward, setup_context=_setup_context)
    backward = torch.library.custom_op(
        f"{NAMESPACE}::gated_delta_backward",
        _backward,
        mutates_args=(),
        schema=f"({', '.join(sequence)}, Tensor[] saved, Tensor d_o, Tensor d_state) -> Tensor[]",
    )
    backward.register_fake(_backward_fake)
    backward.register_autograd(_no_second_order)


_define()


# Eager calls do not go through the operators: autograd is attached directly.


class _Function(torch.autograd.Function):
    """Run a sequence call on a backend that brings its own backward."""

    @staticmethod
    def forward(
        ctx: Any, backend: Backend, call: Call, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # Detached, so that a backend which compiles does not look for the gradients of non-leaves.
        detached = (x.detach() if x is not None and x.requires_grad else x for x in tensors)
        out = backend.forward(call.with_tensors(*detached))
        ctx.backend, ctx.count = backend, len(tensors)
        ctx.call = call.with_tensors(*(None for _ in tensors))
        ctx.save_for_backward(*tensors, *out.saved)
        return out.o, out.final_state

    @staticmethod
    def backward(ctx: Any, d_o: Tensor, d_state: Tensor) -> tuple[Any, ...]:
        backend: Backend = ctx.backend
        # Read once: under activation checkpointing a second read is an error.
        kept = ctx.saved_tensors
        tensors, saved = kept[: ctx.count], kept[ctx.count :]
        second = torch.is_grad_enabled()
        if second and not backend.limits.second_grad:
            raise RuntimeError(f"backend {backend.name!r}: {SECOND_ORDER}")
        if not second:
            tensors = tuple(None if x is None else x.detach() for x in tensors)
        call = ctx.call.with_tensors(*tensors)
        with full_precision(d_o.device.type):
            grads = backend.backward(call, None if second else saved, d_o, d_state)
        wanted = zip(grads, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(grad if needed else None for grad, needed in wanted)


def run(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Run a bound `gated_delta` call eagerly; return (o, final_state)."""
    if is_autocast_on(call.device.type):
        with torch.autocast(call.device.type, enabled=False):
            return run(backend, call)
    if call.needs_grad and not backend.differentiable:
        return _Function.apply(backend, call, *call.tensors())  # type: ignore[no-untyped-call, no-any-return]
    if call.needs_grad or not torch.is_grad_enabled():
        out = backend.forward(call)
    else:
        with torch.no_grad():
            out = backend.forward(call)
    return out.o, out.final_state


def run_step(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Run a bound `gated_delta_step` call eagerly; return (o, state)."""
    if is_autocast_on(call.device.type):
        with torch.autocast(call.device.type, enabled=False):
            return run_step(backend, call)
    if not call.needs_grad and torch.is_grad_enabled():
        with torch.no_grad():
            return advance(backend, call)
    if not call.needs_grad or backend.differentiable or backend.traceable_step:
        return advance(backend, call)
    o, state = run(backend, as_sequence(call))
    return o.squeeze(1), state if call.state is None else state.to(call.state.dtype)


def run_steps(backend: Backend, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a bound `gated_delta_steps` call eagerly; return (o, state, states or None)."""
    with full_precision(call.device.type), torch.no_grad():
        return advance_tokens(backend, call)


def advance(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Run the step of a backend, also on a pool that the backend does not support."""
    if call.state_indices is None:
        return backend.step(call)
    if backend.limits.pools:
        return backend.step(call.on_own_pool())
    o, state, _ = through_rows(call, lambda rows: (*backend.step(rows), None))
    return o, state


def advance_tokens(backend: Backend, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the steps of a backend, also on a pool that the backend does not support."""
    if call.state_indices is None:
        return backend.steps(call)
    if backend.limits.pools:
        return backend.steps(call.on_own_pool())
    return through_rows(call, backend.steps)


def as_sequence(call: Call) -> Call:
    """Turn a call of a step into a call of a sequence of one token."""
    *token, state = call.tensors()
    tensors = [None if x is None else x.unsqueeze(1) for x in token]
    return replace(call, op=GATED_DELTA).with_tensors(*tensors, state)
