"""Run calls while a graph is traced: as one opaque operator, or by tracing through a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn_ops.call.bind import bind
from gdn_ops.call.structure import check_gradients, is_narrow
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import Backend
from gdn_ops.spec.language import OpSpec
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS
from gdn_ops.torch_ops import decode_operators as decode_operators  # registers its operators
from gdn_ops.torch_ops import onnx_export, operators


def is_traced(q: Any) -> bool:
    """Return whether a graph is traced, or q is on meta or of a tensor subclass."""
    if torch.compiler.is_compiling():
        return True
    if not isinstance(q, Tensor):
        return False
    return q.is_meta or type(q) not in (Tensor, torch.nn.Parameter)


def traced(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Call the operator of `gated_delta`; return (o, final_state)."""
    values = _schema_values(GATED_DELTA, arguments)
    o, state, _ = torch.ops.gdn_ops.gated_delta(*values, _needs_grad(values))
    return o, state


def _schema_values(spec: OpSpec, arguments: dict[str, Any]) -> list[Any]:
    """Return the arguments of an op's operator, after the check for torch.onnx.export."""
    onnx_export.check_call(spec.name, bool(arguments.get("inplace")))
    return [arguments[name] for name in operators.schema_names(spec)]


def _needs_grad(values: list[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in values
    )


def traced_step(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Trace through the step of a backend of plain torch ops, or call the opaque operator."""
    values = _schema_values(GATED_DELTA_STEP, arguments)
    name = registry.traceable_step(arguments["backend"], arguments["q"].device.type)
    if name is not None and not _stays_whole(arguments, values):
        call, backend = bind(GATED_DELTA_STEP, arguments, check_values=False), _loaded(name)
        # The operator passes over a backend with reasons against it, or refuses it in words.
        if not registry.reasons_under_auto(backend, call):
            with operators.full_precision(call.device.type):
                return operators.advance(backend, call)
    if _needs_grad(values):
        check_gradients(GATED_DELTA_STEP, arguments)
    if arguments["inplace"]:
        state: Tensor = arguments["state"]
        return torch.ops.gdn_ops.gated_delta_step_(*values), state
    return torch.ops.gdn_ops.gated_delta_step(*values)  # type: ignore[no-any-return]


def _stays_whole(arguments: dict[str, Any], values: list[Any]) -> bool:
    """Return whether a step must be one operator, whichever backend runs it."""
    if onnx_export.is_exporting():
        return True
    # A graph cannot warn; and it differentiates what was traced under the caller's autocast.
    alpha, is_on = arguments["alpha"], operators.is_autocast_on(arguments["q"].device.type)
    return (isinstance(alpha, Tensor) and is_narrow(alpha)) or (is_on and _needs_grad(values))


def _loaded(name: str) -> Backend:
    """Return a backend that is loaded already: nothing is imported while a graph is traced."""
    backend = registry.get_backend(name)
    assert not isinstance(backend, str)
    return backend


def traced_steps(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator of `gated_delta_steps`: a graph never unrolls over T."""
    values = _schema_values(GATED_DELTA_STEPS, arguments)
    if _needs_grad(values):
        check_gradients(GATED_DELTA_STEPS, arguments)
    if arguments["inplace"]:
        o, states = torch.ops.gdn_ops.gated_delta_steps_(*values)
        return o, arguments["state"], states
    return torch.ops.gdn_ops.gated_delta_steps(*values)  # type: ignore[no-any-return]
