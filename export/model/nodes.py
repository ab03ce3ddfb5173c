"""Read a model, that is, its opset and our nodes, and check it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from gdn_ops.export.node.attributes import Attributes, Variant
from gdn_ops.export.node.schema import (
    DECAY,
    DOMAIN,
    ELEMENT_TYPES,
    INPUTS,
    OPERATORS,
    VERSION,
)
from gdn_ops.spec.errors import SpecError, SpecTypeError
from gdn_ops.spec.language import printed_shape

_STATE, _LOG_ALPHA = INPUTS.index("state"), INPUTS.index("log_alpha")

_OLDEST_IR = 10
"""The oldest IR version that has overloads and metadata of functions."""


class NoNodeError(SpecError):
    """Report a model that holds no node of ours."""


@dataclass(frozen=True)
class Node:
    """Describe one of our nodes, as read from a model.

    Attributes:
        proto: the node.
        variant: what its function is written for.
        num_qk_heads, num_v_heads, scale: its attributes.
    """

    proto: NodeProto
    variant: Variant
    num_qk_heads: int
    num_v_heads: int
    scale: float

    @property
    def state(self) -> str:
        """Return the name of the state that the node reads."""
        return str(self.proto.input[_STATE])

    @property
    def new_state(self) -> str:
        """Return the name of the state that the node writes."""
        return str(self.proto.output[1]) if len(self.proto.output) > 1 else ""


def nodes_of(model: ModelProto) -> list[Node]:
    """Return our nodes in a model, in the order of the graph, those of subgraphs included.

    Raises:
        SpecError: there is none, or one of them is not as the schema says.
    """
    check_type("nodes_of", model)
    protos = list(own_nodes(model.graph.node))
    for function in model.functions:
        if any(own_nodes(function.node)):
            raise SpecError(
                f"{function.domain}::{function.name} holds a node of {DOMAIN}, which should stand "
                f"in the graph: inline it with onnx.inliner.inline_selected_functions"
            )
    if not protos:
        raise NoNodeError(
            f"the model holds no {' or '.join(f'{DOMAIN}::{name}' for name in OPERATORS)} node; "
            f"export a module that calls gated_delta_step or gated_delta with "
            f"gdn_ops.export.export_decode or export_prefill"
        )
    version = opset_of(model, DOMAIN)
    if version > VERSION:
        raise SpecError(
            f"the model imports {DOMAIN} {version}, should import {VERSION}, which this release of "
            f"gdn_ops knows: a newer release wrote it"
        )
    types = _element_types(model, {proto.input[_STATE] for proto in protos if len(proto.input) > 5})
    nodes = [_read(proto, types) for proto in protos]
    ranks = _written_ranks(model)
    for node in nodes:
        _check_rank(node, ranks)
    return nodes


def check_type(label: str, model: Any) -> None:
    """Refuse what is no model where a model is given.

    Raises:
        SpecTypeError: it is none.
    """
    if not isinstance(model, ModelProto):
        raise SpecTypeError(
            f"{label}: model has type {type(model).__name__}, should be an onnx.ModelProto; "
            f"gdn_ops.export.load_model reads one from a file"
        )


def all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Yield the nodes of a graph and of its subgraphs."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from all_nodes(graph.node)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Yield the graphs that a node holds, such as the branches of an If."""
    for attribute in node.attribute:
        yield from (attribute.g, *attribute.graphs)


def own_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Yield our nodes among the nodes of a graph and of its subgraphs."""
    return (n for n in all_nodes(nodes) if n.domain == DOMAIN and n.op_type in OPERATORS)


def opset_of(model: ModelProto, domain: str = "") -> int:
    """Return the version of a domain that a model imports, 0 if it does not."""
    return next((int(o.version) for o in model.opset_import if o.domain == domain), 0)


def ir_version(opsets: Iterable[onnx.OperatorSetIdProto]) -> int:
    """Return the oldest IR version that a model with these imports can have."""
    return max(_OLDEST_IR, int(helper.find_min_ir_version_for(list(opsets), ignore_unknown=True)))


def check_model(model: ModelProto) -> None:
    """Run the full checker and strict shape inference of onnx.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: the model is invalid.
    """
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def _element_types(model: ModelProto, names: set[str]) -> Mapping[str, int]:
    """Return the element types of values by name, inferred where the model does not state them."""
    types = _written_types(model)
    if not names <= set(types):
        # Its errors have no common base but Exception.
        try:
            types |= _written_types(onnx.shape_inference.infer_shapes(model))
        except Exception as error:
            raise SpecError(f"onnx cannot infer the types of the model: {error}") from error
    return types


def _written_types(model: ModelProto) -> dict[str, int]:
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: int(value.type.tensor_type.elem_type) for value in values}
    types |= {tensor.name: int(tensor.data_type) for tensor in graph.initializer}
    return {name: kind for name, kind in types.items() if kind}


def _written_ranks(model: ModelProto) -> dict[str, int]:
    """Return the number of dimensions of values by name, of those where the model states it."""
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: value.type.tensor_type for value in values}
    ranks = {name: len(kind.shape.dim) for name, kind in types.items() if kind.HasField("shape")}
    return ranks | {tensor.name: len(tensor.dims) for tensor in graph.initializer}


def _check_rank(node: Node, ranks: Mapping[str, int]) -> None:
    """Check that log_alpha has the dimensions that its node says, where the model states them."""
    name, operator = str(node.proto.input[_LOG_ALPHA]), node.variant.operator
    axes = operator.axes("log_alpha", node.variant.decay)
    rank = ranks.get(name, len(axes)) if name else len(axes)
    if rank == len(axes):
        return
    cure = ""
    if rank == len(operator.axes("log_alpha", "channel")):
        cure = f"; a node with a decay of each key channel has the attribute {DECAY}='channel'"
    raise SpecError(
        f"{_label(node.proto)}: log_alpha {name!r} has {rank} dimensions, should have {len(axes)}, "
        f"{printed_shape(axes)}: {DECAY} is {node.variant.decay!r}{cure}"
    )


def _label(proto: NodeProto) -> str:
    return f"{DOMAIN}::{proto.op_type} {proto.name!r}"


def _read(proto: NodeProto, types: Mapping[str, int]) -> Node:
    """Return one of our nodes, given the element types of the model's values."""
    label = _label(proto)
    attributes = Attributes.read(label, proto)
    if len(proto.input) != len(INPUTS):
        raise SpecError(
            f"{label}: has {len(proto.input)} inputs, should have {len(INPUTS)}: "
            f"{', '.join(INPUTS)}, an empty name for one that is not given"
        )
    inputs = dict(zip(INPUTS, proto.input, strict=True))
    if inputs["state"] not in types:
        raise SpecError(
            f"{label}: the type of {inputs['state']!r} is unknown, should be written in "
            f"value_info: onnx.shape_inference.infer_shapes writes it"
        )
    operator, state_type = OPERATORS[proto.op_type], types[inputs["state"]]
    if state_type not in ELEMENT_TYPES.values():
        raise SpecError(
            f"{label}: the state {inputs['state']!r} has ONNX element type {state_type}, should "
            f"be one of {', '.join(ELEMENT_TYPES)}"
        )
    attributes.check(label, operator)
    is_double = state_type == TensorProto.DOUBLE
    variant = Variant(
        operator,
        attributes.rule,
        attributes.qk_l2norm,
        has_beta=bool(inputs["beta"]),
        compute="double" if is_double else "float",
        stores_wide=is_double or state_type == TensorProto.FLOAT,
        decay=attributes.decay if operator.spec.rule[attributes.rule].has_decay else "none",
    )
    if variant.has_decay != bool(inputs["log_alpha"]):
        should = "given" if variant.has_decay else "left out"
        raise SpecError(f"{label}: log_alpha should be {should}: rule is {variant.rule!r}")
    heads = attributes.num_qk_heads, attributes.num_v_heads
    return Node(proto, variant, *heads, attributes.scale)
