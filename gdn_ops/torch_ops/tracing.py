"""Run calls that are traced, or of tensor subclasses: as one operator, or through a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gdn_ops.call.bind import Arguments, Call, bind, check_gradients, with_python_numbers
from gdn_ops.call.structure import check_subclasses, is_narrow
from gdn_ops.call.subclasses import distributed_type, is_distributed
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import Backend
from gdn_ops.spec.language import OpSpec
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS
from gdn_ops.torch_ops import eager, onnx_export
from gdn_ops.torch_ops import operators as operators  # registers the operators
from gdn_ops.torch_ops import operators_transformed as operators_transformed  # and transforms


def traced_sequence(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Call the operator of `gated_delta`; return (o, final_state)."""
    values = _schema_values(GATED_DELTA, arguments)
    o, state, _ = torch.ops.gdn_ops.gated_delta(*values, _needs_grad(arguments))
    return o, state


def traced_step(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Trace through the step of a backend of plain torch ops, or call the opaque operator."""
    values = _schema_values(GATED_DELTA_STEP, arguments)
    name = registry.traceable_step(arguments.backend, arguments.tokens.q.device.type)
    if name is not None and not _stays_whole(arguments):
        # It is loaded already: nothing is imported while a graph is traced.
        backend = registry.get_backend(name)
        assert not isinstance(backend, str)
        call = bind(GATED_DELTA_STEP, arguments, check_values=False)
        # The operator passes over a backend with reasons against it, or refuses it in words.
        if not registry.reasons_under_auto(backend, call):
            with eager.full_precision(call.device.type):
                return _traced_through(backend, call)
    if _needs_grad(arguments):
        check_gradients(GATED_DELTA_STEP, arguments)
    if arguments.inplace and arguments.state is not None:
        return torch.ops.gdn_ops.gated_delta_step_(*values), arguments.state
    return torch.ops.gdn_ops.gated_delta_step(*values)  # type: ignore[no-any-return]


def _traced_through(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """Trace through a step. In place, the state is written when all is read.

    A graph does not say which of its inputs share memory: one may lie within the state.
    """
    if call.needs_grad:
        return eager.tied(call, *eager.decode_one(backend, call))
    if not call.inplace or call.state is None or call.state_indices is not None:
        return eager.decode_one(backend, call)
    o, new = eager.decode_one(backend, replace(call, inplace=False))
    return o, call.state.copy_(new)


def traced_steps(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator of `gated_delta_steps`: a graph never unrolls over T."""
    values = _schema_values(GATED_DELTA_STEPS, arguments)
    if _needs_grad(arguments):
        check_gradients(GATED_DELTA_STEPS, arguments)
    if arguments.inplace and arguments.state is not None:
        o, states = torch.ops.gdn_ops.gated_delta_steps_(*values)
        return o, arguments.state, states
    return torch.ops.gdn_ops.gated_delta_steps(*values)  # type: ignore[no-any-return]


def _schema_values(spec: OpSpec, arguments: Arguments) -> list[Any]:
    """Return the arguments of an op's operator, after the check for torch.onnx.export."""
    check_subclasses(spec, arguments)
    if is_distributed(arguments.tokens.q):
        load_rules_of_distributed()
    arguments = with_python_numbers(arguments)
    onnx_export.check_call(spec.name, arguments.inplace)
    return [arguments.value(field) for field in operators.schema_fields(spec)]


def load_rules_of_distributed() -> None:
    """Load how operators run on DTensors, which torch then asks for."""
    from gdn_ops.torch_ops import sharded as sharded  # imports torch.distributed.tensor


# Do what torch.compiler.assume_constant_result does, see `registry.traceable_step`.
load_rules_of_distributed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _needs_grad(arguments: Arguments) -> bool:
    tensors = (*arguments.tokens, arguments.state)
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in tensors
    )


def _stays_whole(arguments: Arguments) -> bool:
    """Return whether a step must be one operator, whichever backend runs it."""
    if onnx_export.is_exporting() or is_distributed(arguments.tokens.q):
        return True
    # A graph cannot warn; and it differentiates what was traced under the caller's autocast.
    tokens = arguments.tokens
    is_on = eager.is_autocast_on(tokens.q.device.type)
    is_bad = isinstance(tokens.alpha, Tensor) and is_narrow(tokens.alpha)
    return is_bad or (is_on and _needs_grad(arguments))


if distributed_type() is not None:
    load_rules_of_distributed()
