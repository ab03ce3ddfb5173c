"""Translate torch operators to our nodes, for torch.onnx.export."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from onnx import TensorProto

from gdn_ops.export.node.attributes import HeadSizes
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
    tensors = _Tensors(q, k, v, alpha, beta, log_alpha)
    return tensors.call(label, STEP, state, rule, scale, qk_l2norm)


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

    tensors = _Tensors(q, k, v, alpha, beta, log_alpha)
    state = tensors.widen(initial_state)
    results = tensors.call(label, SEQUENCE, state, rule, scale, qk_l2norm)
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

    tensors = _Tensors(q, k, v, alpha, beta, log_alpha)
    o, new_state = tensors.call(label, SEQUENCE, state, rule, scale, qk_l2norm)
    return o, new_state, op.Constant(value_floats=[])


def _refuse_pool(label: str, state_indices: Any) -> None:
    if state_indices is not None:
        raise SpecError(
            f"{label}: state_indices is given, should be None in an export to ONNX: a node "
            f"has one state per row; gather the rows of the pool before it"
        )


class _Tensors(NamedTuple):
    """Hold the tensors of a call besides its state, as values of the graph; None if not given."""

    q: Any
    k: Any
    v: Any
    alpha: Any
    beta: Any
    log_alpha: Any

    @property
    def compute_type(self) -> int:
        """Return the element type to compute in: double for double, else float."""
        is_double = int(self.q.dtype) == TensorProto.DOUBLE
        return int(TensorProto.DOUBLE if is_double else TensorProto.FLOAT)

    def widen(self, x: Any) -> Any:
        """Return a value in the compute type, None for None."""
        from onnxscript import opset18 as op

        is_wide = x is None or int(x.dtype) == self.compute_type
        return x if is_wide else op.Cast(x, to=self.compute_type)

    def zero_state(self) -> Any:
        """Return the state that a sequence starts from when none is given."""
        from onnxscript import opset18 as op

        sizes = op.Constant(value_ints=[self.v.shape[-2], self.q.shape[-1], self.v.shape[-1]])
        shape = op.Concat(op.Shape(self.q, start=0, end=1), sizes, axis=0)
        return op.Expand(op.Cast(op.Constant(value_float=0.0), to=self.compute_type), shape)

    def call(
        self,
        label: str,
        operator: Operator,
        state: Any,
        rule: str,
        scale: float | None,
        qk_l2norm: bool,
    ) -> Any:
        """Write a node, with its gates in the compute type and the decay as its logarithm."""
        from onnxscript import opset18 as op

        q, v = self.q.shape, self.v.shape
        for name, size in (("H", q[-2]), ("K", q[-1]), ("HV", v[-2]), ("V", v[-1])):
            if not isinstance(size, int):
                raise SpecError(
                    f"{label}: {name} is symbolic ({size}), should be fixed in an export to ONNX: "
                    f"leave it out of dynamic_shapes"
                )
        sizes = HeadSizes(q[-2], v[-2], q[-1], v[-1])
        attributes = sizes.attributes(label, operator, rule, scale, qk_l2norm)
        if state is None:
            state = self.zero_state()
        else:
            check_dtypes(label, _dtype_name(self.q), _dtype_name(state))
        log_alpha = self.widen(self.log_alpha)
        if self.alpha is not None:
            log_alpha = op.Log(self.widen(self.alpha))
        beta = self.widen(self.beta)
        write = _node(operator)
        return write(self.q, self.k, self.v, log_alpha, beta, state, **attributes.as_onnx())


def _dtype_name(x: Any) -> str:
    return next(
        (name for name, kind in ELEMENT_TYPES.items() if kind == int(x.dtype)), str(x.dtype)
    )
