"""Translate torch operators to our nodes, for torch.onnx.export."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from onnx import TensorProto

from gdn_ops.export.node.model import check_heads
from gdn_ops.export.node.schema import (
    DOMAIN,
    ELEMENT_TYPES,
    SEQUENCE,
    STEP,
    VERSION,
    Operator,
    op_schema,
)
from gdn_ops.export.node.single import check_dtypes
from gdn_ops.spec.errors import SpecError
from gdn_ops.torch_ops import onnx_export


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


def _step(
    q: Any,
    k: Any,
    v: Any,
    alpha: Any = None,
    beta: Any = None,
    state: Any = None,
    log_alpha: Any = None,
    rule: str = "gated_delta",
    scale: float | None = None,
    qk_l2norm: bool = False,
    state_indices: Any = None,
    backend: str = "auto",
) -> Any:
    """Translate gdn_ops::gated_delta_step."""
    label = STEP.spec.name
    _refuse_pool(label, state_indices)
    if state is None:
        raise SpecError(
            f"{label}: state is None, should be a tensor in an export to ONNX: what a decode step "
            f"remembers is an input and an output of the graph"
        )
    check_dtypes(label, _dtype_name(q), _dtype_name(state))
    attributes = _attributes(label, q, v, rule, scale, qk_l2norm)
    return _call(STEP, (q, k, v, alpha, beta, log_alpha), state, attributes)


def _sequence(
    q: Any,
    k: Any,
    v: Any,
    alpha: Any = None,
    beta: Any = None,
    log_alpha: Any = None,
    rule: str = "gated_delta",
    scale: float | None = None,
    qk_l2norm: bool = False,
    initial_state: Any = None,
    cu_seqlens: Any = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    save: bool = False,
) -> Any:
    """Translate gdn_ops::gated_delta; there are no tensors saved for a backward."""
    label = SEQUENCE.spec.name
    if cu_seqlens is not None:
        raise SpecError(
            f"{label}: cu_seqlens is given, should be None in an export to ONNX: pass a batch of "
            f"sequences of one length"
        )
    if save:
        raise SpecError(
            f"{label}: gradients are needed, should not be: export under torch.no_grad()"
        )
    from onnxscript import opset18 as op

    attributes = _attributes(label, q, v, rule, scale, qk_l2norm)
    gates = alpha, beta, log_alpha
    results = _call(SEQUENCE, (q, k, v, *gates), _wide_state(q, v, initial_state), attributes)
    # torch wants a value for every output, and drops this one.
    return *results, op.SequenceEmpty()


def _steps(
    q: Any,
    k: Any,
    v: Any,
    alpha: Any = None,
    beta: Any = None,
    state: Any = None,
    log_alpha: Any = None,
    rule: str = "gated_delta",
    scale: float | None = None,
    qk_l2norm: bool = False,
    state_indices: Any = None,
    return_states: bool = False,
    backend: str = "auto",
) -> Any:
    """Translate gdn_ops::gated_delta_steps; the states after each token have no output."""
    label = "gated_delta_steps"
    _refuse_pool(label, state_indices)
    if return_states:
        raise SpecError(f"{label}: return_states is True, should be False in an export to ONNX")
    from onnxscript import opset18 as op

    attributes = _attributes(label, q, v, rule, scale, qk_l2norm)
    if state is not None:
        check_dtypes(label, _dtype_name(q), _dtype_name(state))
    start = _wide_state(q, v, None) if state is None else state
    o, new_state = _call(SEQUENCE, (q, k, v, alpha, beta, log_alpha), start, attributes)
    return o, new_state, op.Constant(value_floats=[])


def _refuse_pool(label: str, state_indices: Any) -> None:
    if state_indices is not None:
        raise SpecError(
            f"{label}: state_indices is given, should be None in an export to ONNX: a node "
            f"has one state per row; gather the rows of the pool before it"
        )


def _attributes(
    label: str, q: Any, v: Any, rule: str, scale: float | None, qk_l2norm: bool
) -> dict[str, Any]:
    """Return the attributes of a node, the scale resolved."""
    names = {"H": q.shape[-2], "K": q.shape[-1], "HV": v.shape[-2], "V": v.shape[-1]}
    for name, size in names.items():
        if not isinstance(size, int):
            raise SpecError(
                f"{label}: {name} is symbolic ({size}), should be fixed in an export to ONNX: "
                f"leave it out of dynamic_shapes"
            )
    check_heads(label, names["H"], names["HV"])
    found = float(names["K"]) ** -0.5 if scale is None else float(scale)
    if not math.isfinite(found):
        raise SpecError(f"{label}: scale is {found}, should be a finite number")
    return {
        "num_qk_heads": names["H"],
        "num_v_heads": names["HV"],
        "scale": found,
        "rule": rule,
        "qk_l2norm": int(qk_l2norm),
    }


def _compute_type(x: Any) -> int:
    """Return the element type to compute in: double for double, else float."""
    return int(TensorProto.DOUBLE if int(x.dtype) == TensorProto.DOUBLE else TensorProto.FLOAT)


def _wide_state(q: Any, v: Any, state: Any) -> Any:
    """Return the state that a sequence starts from, in the type of its final state."""
    from onnxscript import opset18 as op

    to = _compute_type(q)
    if state is not None:
        return state if int(state.dtype) == to else op.Cast(state, to=to)
    sizes = op.Constant(value_ints=[v.shape[-2], q.shape[-1], v.shape[-1]])
    shape = op.Concat(op.Shape(q, start=0, end=1), sizes, axis=0)
    return op.Expand(op.Cast(op.Constant(value_float=0.0), to=to), shape)


def _call(
    operator: Operator, tensors: tuple[Any, ...], state: Any, attributes: dict[str, Any]
) -> Any:
    """Write a node, with its gates in the compute type and the decay as its logarithm."""
    from onnxscript import opset18 as op

    q, k, v, alpha, beta, log_alpha = tensors
    to = _compute_type(q)

    def gate(x: Any) -> Any:
        return x if x is None or int(x.dtype) == to else op.Cast(x, to=to)

    logarithm = gate(log_alpha) if alpha is None else op.Log(gate(alpha))
    return _node(operator)(q, k, v, logarithm, gate(beta), state, **attributes)


def _dtype_name(x: Any) -> str:
    return next(
        (name for name, kind in ELEMENT_TYPES.items() if kind == int(x.dtype)), str(x.dtype)
    )
