"""Make models of one node without a torch module: for tests, benchmarks, hand-built graphs."""

from __future__ import annotations

from onnx import ModelProto, ValueInfoProto, helper

from gdn_ops.export.bodies.body import DEFAULT_OPSET
from gdn_ops.export.bodies.table import check_opset
from gdn_ops.export.model.functions import set_body
from gdn_ops.export.model.naming import recurrent_names, write_states
from gdn_ops.export.model.nodes import ir_version
from gdn_ops.export.node.arguments import check_flag
from gdn_ops.export.node.attributes import checked_attributes
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
"""Names of the graph for the node's state and new state; other values keep the node's names."""


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
    decay: str = "scalar",
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
        decay: width of log_alpha: "scalar", (B, HV), or "channel", (B, HV, K), for a decay of each
            key channel.
        opset: of ai.onnx.
        body: of the function, as in `set_body`.

    Returns:
        Inputs q, k, v, log_alpha where the rule has a decay, beta, and
        past_key_values.0.recurrent_state; outputs o and present.0.recurrent_state.

    Raises:
        SpecError: a value is not allowed, or the body cannot do what is asked for.
    """
    sizes = {"H": num_qk_heads, "HV": num_v_heads, "K": head_k_dim, "V": head_v_dim}
    types = dtype, state_dtype
    return _make(STEP, sizes, types, rule, scale, qk_l2norm, has_beta, decay, opset, body)


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
    decay: str = "scalar",
    opset: int = DEFAULT_OPSET,
    body: str | None = "standard",
) -> ModelProto:
    """Return a model of one gdn_ops::GatedDelta, its batch and number of tokens symbolic.

    Arguments, inputs and outputs are those of `make_decode_model`, with tokens; the state is
    the same.
    """
    sizes = {"H": num_qk_heads, "HV": num_v_heads, "K": head_k_dim, "V": head_v_dim}
    types = dtype, state_dtype
    return _make(SEQUENCE, sizes, types, rule, scale, qk_l2norm, has_beta, decay, opset, body)


def _make(
    operator: Operator,
    sizes: dict[str, int],
    types: tuple[str, str | None],
    rule: str,
    scale: float | None,
    qk_l2norm: bool,
    has_beta: bool,
    decay: str,
    opset: int,
    body: str | None,
) -> ModelProto:
    """Return a model of one node, after a check of everything that it is made of."""
    label, dtype = str(operator), types[0]
    attributes = checked_attributes(label, operator, sizes, rule, scale, qk_l2norm, decay)
    check_flag(label, "has_beta", has_beta)
    stored = types[1]
    if stored is None:
        stored = "float64" if dtype == "float64" else "float32"
    check_dtypes(label, dtype, stored)
    check_opset(label, opset, body)
    gates = "float64" if stored == "float64" else "float32"
    dtypes = {"state": stored, "new_state": stored, "log_alpha": gates, "beta": gates}
    axes = {"B": BATCH, "T": TOKENS} | {axis: int(size) for axis, size in sizes.items()}

    def value(name: str) -> ValueInfoProto:
        shape = [axes[axis] for axis in operator.axes(name, attributes.decay)]
        kind = ELEMENT_TYPES[dtypes.get(name, dtype)]
        return helper.make_tensor_value_info(_GRAPH_NAMES.get(name, name), kind, shape)

    is_there = {"log_alpha": operator.spec.rule[rule].has_decay, "beta": has_beta}
    inputs = [name for name in INPUTS if is_there.get(name, True)]
    node = helper.make_node(
        operator.name,
        [_GRAPH_NAMES.get(name, name) if name in inputs else "" for name in INPUTS],
        [_GRAPH_NAMES.get(name, name) for name in OUTPUTS],
        name=operator.name,
        domain=DOMAIN,
        **attributes.as_onnx(),
    )
    graph = helper.make_graph(
        [node], operator.spec.name, [*map(value, inputs)], [*map(value, OUTPUTS)]
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version(opsets))
    write_states(model, {_GRAPH_NAMES["state"]: _GRAPH_NAMES["new_state"]})
    return set_body(model, body)
