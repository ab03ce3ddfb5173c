"""Compare a model of one node with the definition in float64, on random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto
from torch import Tensor

from gdn_ops.export.model.conversion import with_body
from gdn_ops.export.model.naming import recurrent_names
from gdn_ops.export.model.nodes import Node, nodes_of
from gdn_ops.export.node.schema import ELEMENT_TYPES, SEQUENCE
from gdn_ops.export.runtime.buffers import Buffer, Port, numpy_dtype
from gdn_ops.export.runtime.decode_session import DecodeSession
from gdn_ops.export.runtime.sessions import open_session
from gdn_ops.ops import gated_delta

BAND = 4
"""Roundings of what is stored that are granted beside twice the definition's own error."""


@dataclass(frozen=True)
class Comparison:
    """Hold the errors of a body against the definition, as norms relative to the exact results.

    Attributes:
        body: what ran.
        o, state: errors.
        allowed_o, allowed_state: twice the errors of the definition in the same dtypes, and BAND
            roundings (K more in float64).
    """

    body: str
    o: float
    state: float
    allowed_o: float
    allowed_state: float

    @property
    def passed(self) -> bool:
        """Return whether both errors are within their allowance; NaN is not."""
        return self.o <= self.allowed_o and self.state <= self.allowed_state


def compare(
    model: ModelProto,
    body: str,
    *,
    batch: int = 2,
    tokens: int = 64,
    custom_op_library: str | None = None,
) -> Comparison:
    """Compare a model of `make_decode_model` or `make_prefill_model` with the definition.

    Args:
        model: the model.
        body: that is run; a model of an opset too old for it is converted in memory.
        batch: rows.
        tokens: tokens of each row.
        custom_op_library: for body "custom".
    """
    (node,) = nodes_of(model)
    inputs = _draw(model, batch, tokens)
    exact, own = (_define(node, inputs, wide) for wide in (True, False))
    if node.variant.operator is SEQUENCE:
        results = _read(model, body, inputs)
    else:
        results = _decode(model, body, inputs, custom_op_library)
    errors = [relative_error(x, y) for x, y in zip(results, exact, strict=True)]
    # In float64 the definition is no better than a body: it sums over K in another order.
    same = inputs["q"].shape[-1] if node.variant.is_double else 0
    allowed = [
        2 * relative_error(x, y) + (BAND + same) * torch.finfo(x.dtype).eps / 2
        for x, y in zip(own, exact, strict=True)
    ]
    return Comparison(body, *errors, *allowed)


def _draw(model: ModelProto, batch: int, tokens: int) -> dict[str, Tensor]:
    """Draw the inputs of a model as (B, T, ...), and the state before them as `state`."""
    generator = torch.Generator().manual_seed(0)
    state_name, arguments = recurrent_names(0)[0], {}
    dtypes = {kind: getattr(torch, name) for name, kind in ELEMENT_TYPES.items()}
    for value in model.graph.input:
        kind = value.type.tensor_type
        sizes = [d.dim_value for d in kind.shape.dim if not d.dim_param]
        shape = [batch, *([] if value.name == state_name else [tokens]), *sizes]
        x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        if value.name == "k":
            x = torch.nn.functional.normalize(x, dim=-1)
        elif value.name == "log_alpha":
            x = (-0.1 * x.abs()).masked_fill(x > 2.5, -torch.inf)
        elif value.name == "beta":
            x = x.abs().clamp(max=2)
        name = "state" if value.name == state_name else value.name
        arguments[name] = x.to(dtypes[kind.elem_type])
    return arguments


def _define(node: Node, inputs: dict[str, Tensor], wide: bool) -> tuple[Tensor, Tensor]:
    """Run the definition in float64, or in the dtypes of the model."""
    x = {name: value.double() if wide else value for name, value in inputs.items()}
    o, state = gated_delta(
        x["q"],
        x["k"],
        x["v"],
        None,
        x.get("beta"),
        log_alpha=x.get("log_alpha"),
        rule=node.variant.rule,
        scale=node.scale,
        qk_l2norm=node.variant.qk_l2norm,
        initial_state=x["state"],
        return_state=True,
        backend="naive",
    )
    return o, state if wide else state.to(inputs["state"].dtype)


def _decode(
    model: ModelProto, body: str, inputs: dict[str, Tensor], library: str | None
) -> tuple[Any, Any]:
    batch, tokens = inputs["q"].shape[:2]
    session = DecodeSession(model, batch=batch, body=body, threads=1, custom_op_library=library)
    session.state = as_array(inputs["state"])
    feeds = {name: as_array(x) for name, x in inputs.items() if name != "state"}
    outputs = [session.step(**{name: x[:, t] for name, x in feeds.items()}) for t in range(tokens)]
    return np.stack(outputs, 1), session.state[recurrent_names(0)[0]]


def _read(model: ModelProto, body: str, inputs: dict[str, Tensor]) -> tuple[Any, Any]:
    session = open_session(with_body(model, body, "compare"), None, 1, None)
    names = recurrent_names(0)
    arrays = {names[0] if n == "state" else n: as_array(x) for n, x in inputs.items()}
    arrays |= {"o": arrays["v"], names[1]: arrays[names[0]]}
    buffers, binding = {}, session.io_binding()
    for value in (*model.graph.input, *model.graph.output):
        name, x = value.name, arrays[value.name]
        port = Port(name, value.type.tensor_type.elem_type, x.shape, symbolic=())
        buffers[name] = Buffer(port)
        np.copyto(buffers[name].array, x)
        is_output = name in ("o", names[1])
        bind = binding.bind_ortvalue_output if is_output else binding.bind_ortvalue_input
        bind(name, buffers[name].value)
    session.run_with_iobinding(binding)
    return buffers["o"].array, buffers[names[1]].array


def as_array(x: Tensor) -> Any:
    """Return a tensor as an array; numpy itself has no bfloat16."""
    if x.dtype != torch.bfloat16:
        return x.numpy()
    kind = numpy_dtype(TensorProto.BFLOAT16)
    return x.contiguous().view(torch.uint16).numpy().view(kind)


def relative_error(computed: Any, exact: Tensor) -> float:
    """Return the norm of the error over the norm of what is right, or where that is 0 over 1."""
    if not isinstance(computed, Tensor):
        computed = torch.from_numpy(computed.astype(np.float64))
    return float((computed.double() - exact).norm()) / (float(exact.norm()) or 1.0)
