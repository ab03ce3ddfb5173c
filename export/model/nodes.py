"""Read our nodes in a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from gdn_ops.export.node.attributes import Attributes
from gdn_ops.export.node.schema import DOMAIN, INPUTS, OPERATORS
from gdn_ops.export.node.variant import Variant
from gdn_ops.spec.errors import SpecError

_STATE = INPUTS.index("state")


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
    types = _element_types(model, {proto.input[_STATE] for proto in protos if len(proto.input) > 5})
    return [_read(proto, types) for proto in protos]


def own_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Yield our nodes among the nodes of a graph and of its subgraphs."""
    for node in nodes:
        if node.domain == DOMAIN and node.op_type in OPERATORS:
            yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from own_nodes(graph.node)


def _element_types(model: ModelProto, names: set[str]) -> Mapping[str, int]:
    """Return the element types of values by name, inferred where the model does not state them."""
    found = _written_types(model)
    if not names <= set(found):
        bare = ModelProto()
        bare.CopyFrom(model)
        found |= _written_types(onnx.shape_inference.infer_shapes(bare))
    return found


def _written_types(model: ModelProto) -> dict[str, int]:
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    found = {value.name: int(value.type.tensor_type.elem_type) for value in values}
    found |= {tensor.name: int(tensor.data_type) for tensor in graph.initializer}
    return {name: kind for name, kind in found.items() if kind}


def _read(proto: NodeProto, types: Mapping[str, int]) -> Node:
    """Return one of our nodes, given the element types of the model's values."""
    label = f"{DOMAIN}::{proto.op_type} {proto.name!r}"
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
    attributes.check(label, operator)
    is_double = state_type == TensorProto.DOUBLE
    variant = Variant(
        operator,
        attributes.rule,
        attributes.qk_l2norm,
        has_beta=bool(inputs["beta"]),
        compute="double" if is_double else "float",
        stores_wide=is_double or state_type == TensorProto.FLOAT,
    )
    if variant.has_decay != bool(inputs["log_alpha"]):
        should = "given" if variant.has_decay else "left out"
        raise SpecError(f"{label}: log_alpha should be {should}: rule is {variant.rule!r}")
    heads = attributes.num_qk_heads, attributes.num_v_heads
    return Node(proto, variant, *heads, attributes.scale)
