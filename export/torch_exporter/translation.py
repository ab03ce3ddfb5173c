"""Translate torch operators to our nodes, for torch.onnx.export."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnx import TensorProto

from gdn_ops.call.bind import arguments_of
from gdn_ops.export.node.attributes import check_strengths, checked_attributes
from gdn_ops.export.node.schema import (
    DOMAIN,
    ELEMENT_TYPES,
    SEQUENCE,
    STEP,
    VERSION,
    Operator,
    check_dtypes,
    op_schema,
)
from gdn_ops.spec.errors import SpecError
from gdn_ops.spec.language import OpSpec
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS
from gdn_ops.torch_ops import onnx_export
from gdn_ops.torch_ops.operators import schema_names


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the table that translates our operators for torch.onnx.export.

    For `torch.onnx.export(module, args, dynamo=True, custom_translation_table=...)`. The nodes
    have no function body yet; `set_body` gives them one. `export_decode` does all of this.

    Raises:
        ModuleNotFoundError: onnxscript is not installed.
    """
    _node(STEP)
    onnx_export.note_table()
    operators = torch.ops.gdn_ops
    return {
        operators.gated_delta_step.default: _step,
        operators.gated_delta.default: _sequence,
        operators.gated_delta_steps.default: _steps,
    }


@functools.cache
def _node(operator: Operator) -> Any:
    """Return an operator as a function of onnxscript; its outputs come from its schema."""
    try:
        from onnxscript import values
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "an export to ONNX needs the onnx extra: pip install 'gdn_ops[onnx]'", name=error.name
        ) from error
    opset = values.Opset(DOMAIN, VERSION)
    return values.Op(opset, operator.name, op_schema(operator))


def _step(*values: Any) -> Any:
    """Translate gdn_ops::gated_delta_step."""
    given = _arguments(GATED_DELTA_STEP, values)
    _refuse_pool(GATED_DELTA_STEP, given)
    if given.state is None:
        raise SpecError(
            f"{GATED_DELTA_STEP.name}: state is None, should be a tensor in an export to ONNX: "
            f"what a decode step remembers is an input and an output of the graph"
        )
    return _write(GATED_DELTA_STEP, STEP, given)


def _sequence(*values: Any) -> Any:
    """Translate gdn_ops::gated_delta; there are no tensors saved for a backward."""
    *own, save = values
    given, label = _arguments(GATED_DELTA, own), GATED_DELTA.name
    if given.cu_seqlens is not None:
        raise SpecError(
            f"{label}: cu_seqlens is given, should be None in an export to ONNX: pass a batch of "
            f"sequences of one length"
        )
    if save:
        raise SpecError(
            f"{label}: gradients are needed, should not be: export under torch.no_grad()"
        )
    from onnxscript import opset18 as op

    # The op returns its state in the compute type, whatever the type of the first one is.
    results = _write(GATED_DELTA, SEQUENCE, given, widens_state=True)
    # torch wants a value for every output, and drops this one.
    return *results, op.SequenceEmpty()


def _steps(*values: Any) -> Any:
    """Translate gdn_ops::gated_delta_steps; the states after each token have no output."""
    given = _arguments(GATED_DELTA_STEPS, values)
    _refuse_pool(GATED_DELTA_STEPS, given)
    if given.return_states:
        raise SpecError(
            f"{GATED_DELTA_STEPS.name}: return_states is True, should be False in an export to ONNX"
        )
    from onnxscript import opset18 as op

    o, new_state = _write(GATED_DELTA_STEPS, SEQUENCE, given)
    return o, new_state, op.Constant(value_floats=[])


def _arguments(spec: OpSpec, values: Sequence[Any]) -> Any:
    """Return the values of an operator's schema as `Arguments` that hold values of the graph."""
    return arguments_of(spec, dict(zip(schema_names(spec), values, strict=True)))


def _refuse_pool(spec: OpSpec, given: Any) -> None:
    if given.state_indices is not None:
        raise SpecError(
            f"{spec.name}: state_indices is given, should be None in an export to ONNX: a node "
            f"has one state per row; gather the rows of the pool before it"
        )


def _compute_type(given: Any) -> int:
    """Return the element type to compute in: double for double, else float."""
    is_double = int(given.tokens.q.dtype) == TensorProto.DOUBLE
    return int(TensorProto.DOUBLE if is_double else TensorProto.FLOAT)


def _widened(x: Any, kind: int) -> Any:
    """Return a value in the compute type, None for None."""
    from onnxscript import opset18 as op

    return x if x is None or int(x.dtype) == kind else op.Cast(x, to=kind)


def _write(spec: OpSpec, operator: Operator, given: Any, widens_state: bool = False) -> Any:
    """Write a node, with its gates in the compute type and the decay as its logarithm."""
    from onnxscript import opset18 as op

    label, kind = spec.name, _compute_type(given)
    q, k, v, alpha, log_alpha, beta, erase, strength = given.tokens
    check_strengths(label, operator, erase=erase, write=strength)
    sizes = {"H": q.shape[-2], "K": q.shape[-1], "HV": v.shape[-2], "V": v.shape[-1]}
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise SpecError(
                f"{label}: {name} is symbolic ({size}), should be fixed in an export to ONNX: "
                f"leave it out of dynamic_shapes"
            )
    gate = log_alpha if alpha is None else alpha
    decay = "channel" if gate is not None and len(gate.shape) == len(q.shape) else "scalar"
    options = given.rule, given.scale, given.qk_l2norm, decay
    attributes = checked_attributes(label, operator, sizes, *options)
    state = given.state
    if state is None:
        shape = op.Constant(value_ints=[sizes[axis] for axis in ("HV", "K", "V")])
        shape = op.Concat(op.Shape(q, start=0, end=1), shape, axis=0)
        state = op.Expand(op.Cast(op.Constant(value_float=0.0), to=kind), shape)
    else:
        check_dtypes(label, _dtype_name(q), _dtype_name(state))
        state = _widened(state, kind) if widens_state else state
    log_alpha = _widened(log_alpha, kind) if alpha is None else op.Log(_widened(alpha, kind))
    write = _node(operator)
    return write(q, k, v, log_alpha, _widened(beta, kind), state, **attributes.as_onnx())


def _dtype_name(x: Any) -> str:
    return next(
        (name for name, kind in ELEMENT_TYPES.items() if kind == int(x.dtype)), str(x.dtype)
    )
