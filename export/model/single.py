"""Make models of one node without a torch module: for tests, benchmarks, hand-built graphs."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import ModelProto, ValueInfoProto, helper

from gdn_ops.export.bodies.body import DEFAULT_OPSET
from gdn_ops.export.bodies.table import check_opset
from gdn_ops.export.model.functions import set_body
from gdn_ops.export.model.opsets import ir_version
from gdn_ops.export.model.states import recurrent_names, write_states
from gdn_ops.export.node.attributes import Attributes, HeadSizes
from gdn_ops.export.node.schema import (
    DOMAIN,
    ELEMENT_TYPES,
    INPUTS,
    OUTPUTS,
    SEQUENCE,
    STEP,
    VERSION,
    Operator,
    check_dtypes,
)

BATCH = "batch"
TOKENS = "sequence"
"""Names of the symbolic sizes B and T."""

_GRAPH_NAMES = dict(zip(("state", "new_state"), recurrent_names(0), strict=True))
"""What the graph calls an input or output of the node, where it is not the node's own name."""


def make_decode_model(
    *,
    num_qk_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    dtype: str = "float32",
    state_dtype: str | None = None,
    rule: str = "gated_delta",
    scale: float | None = None,
    qk_l2norm: bool = False,
    has_beta: bool = True,
    opset: int = DEFAULT_OPSET,
    body: str | None = "standard",
) -> ModelProto:
    """Return a model of one gdn_ops::GatedDeltaStep, its batch symbolic.

    Args:
        num_qk_heads, num_v_heads: H and HV, a multiple of H.
        head_k_dim, head_v_dim: K and V.
        dtype: of q, k, v and o.
        state_dtype: of the state; float32, or float64 with a float64 dtype, when not given.
        rule, scale, qk_l2norm: as in `gated_delta_step`; scale is K ** -0.5 when not given.
        has_beta: whether beta is an input; it is 1 otherwise.
        opset: of ai.onnx.
        body: of the function, as in `set_body`.

    Returns:
        Inputs q, k, v, log_alpha where the rule has a decay, beta, and
        past_key_values.0.recurrent_state; outputs o and present.0.recurrent_state.

    Raises:
        SpecError: a value is not allowed, or the body cannot do what is asked for.
    """
    sizes = HeadSizes(num_qk_heads, num_v_heads, head_k_dim, head_v_dim)
    attributes = sizes.attributes(str(STEP), STEP, rule, scale, qk_l2norm)
    node = _SingleNode(STEP, sizes, attributes, dtype, state_dtype, has_beta)
    return node.model(opset, body)


def make_prefill_model(
    *,
    num_qk_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    dtype: str = "float32",
    state_dtype: str | None = None,
    rule: str = "gated_delta",
    scale: float | None = None,
    qk_l2norm: bool = False,
    has_beta: bool = True,
    opset: int = DEFAULT_OPSET,
    body: str | None = "standard",
) -> ModelProto:
    """Return a model of one gdn_ops::GatedDelta, its batch and number of tokens symbolic.

    Arguments, inputs and outputs are those of `make_decode_model`, with tokens; the state is
    the same.
    """
    sizes = HeadSizes(num_qk_heads, num_v_heads, head_k_dim, head_v_dim)
    attributes = sizes.attributes(str(SEQUENCE), SEQUENCE, rule, scale, qk_l2norm)
    node = _SingleNode(SEQUENCE, sizes, attributes, dtype, state_dtype, has_beta)
    return node.model(opset, body)


@dataclass(frozen=True)
class _SingleNode:
    """Describe a graph of one node.

    Attributes:
        operator: of the node.
        sizes: the heads and their widths.
        attributes: of the node.
        dtype, state_dtype: of q, k, v and of the state; None is as in `make_decode_model`.
        has_beta: whether beta is an input.
    """

    operator: Operator
    sizes: HeadSizes
    attributes: Attributes
    dtype: str
    state_dtype: str | None
    has_beta: bool

    def model(self, opset: int, body: str | None) -> ModelProto:
        """Return a model of the graph, after a check of everything that it is made of."""
        label, inputs = str(self.operator), self._inputs()
        check_dtypes(label, self.dtype, self._stored())
        check_opset(label, opset, body)
        node = helper.make_node(
            self.operator.name,
            [_GRAPH_NAMES.get(name, name) if name in inputs else "" for name in INPUTS],
            [_GRAPH_NAMES.get(name, name) for name in OUTPUTS],
            name=self.operator.name,
            domain=DOMAIN,
            **self.attributes.as_onnx(),
        )
        graph = helper.make_graph(
            [node],
            self.operator.spec.name,
            [self._value(name) for name in inputs],
            [self._value(name) for name in OUTPUTS],
        )
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version(opsets))
        write_states(model, {_GRAPH_NAMES["state"]: _GRAPH_NAMES["new_state"]})
        return set_body(model, body)

    def _inputs(self) -> list[str]:
        """Return the inputs that are there."""
        has_decay = self.operator.spec.rule[self.attributes.rule].has_decay
        is_there = {"log_alpha": has_decay, "beta": self.has_beta}
        return [name for name in INPUTS if is_there.get(name, True)]

    def _stored(self) -> str:
        """Return the dtype of the state."""
        return self.state_dtype or ("float64" if self.dtype == "float64" else "float32")

    def _value(self, name: str) -> ValueInfoProto:
        """Return an input or output of the graph."""
        sizes: dict[str, int | str] = {
            "B": BATCH,
            "T": TOKENS,
            "H": self.sizes.num_qk_heads,
            "HV": self.sizes.num_v_heads,
            "K": self.sizes.head_k_dim,
            "V": self.sizes.head_v_dim,
        }
        stored = self._stored()
        gates = "float64" if stored == "float64" else "float32"
        dtypes = {"state": stored, "new_state": stored, "log_alpha": gates, "beta": gates}
        shape = [sizes[axis] for axis in self.operator.axes(name)]
        kind = ELEMENT_TYPES[dtypes.get(name, self.dtype)]
        return helper.make_tensor_value_info(_GRAPH_NAMES.get(name, name), kind, shape)
