"""Read our nodes and their bodies in a model, and exchange the bodies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from gdn_ops.export.bodies.functions import body_of, decode_function
from gdn_ops.export.bodies.linear_attention import MICROSOFT
from gdn_ops.export.node.schema import ATTRIBUTES, DOMAIN, INPUTS, OPERATORS, VERSION
from gdn_ops.export.node.variants import Variant, check_body
from gdn_ops.spec.errors import SpecError

STATES_KEY = "gdn_ops.states"
"""Metadata of a model: which output is the next value of which input, as JSON."""

_IMPORT_KEY = "gdn_ops.import"
"""Metadata of a function: the import that its body brought into the model."""

_STATE = INPUTS.index("state")
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


def opset_of(model: ModelProto, domain: str = "") -> int:
    """Return the version of a domain that a model imports, 0 if it does not."""
    return next((int(o.version) for o in model.opset_import if o.domain == domain), 0)


def nodes_of(model: ModelProto) -> list[Node]:
    """Return our nodes in a model, in the order of the graph, those of subgraphs included.

    Raises:
        SpecError: there is none, or one of them is not as the schema says.
    """
    protos = list(_own_nodes(model.graph.node))
    for function in model.functions:
        if any(_own_nodes(function.node)):
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


def _own_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        if node.domain == DOMAIN and node.op_type in OPERATORS:
            yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _own_nodes(graph.node)


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
    label = f"{DOMAIN}::{proto.op_type} {proto.name!r}"
    attributes = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
    missing = [name for name in ATTRIBUTES if name not in attributes]
    if missing:
        raise SpecError(f"{label}: attribute {missing[0]} is missing, should be written")
    if len(proto.input) != len(INPUTS):
        raise SpecError(
            f"{label}: has {len(proto.input)} inputs, should have {len(INPUTS)}: "
            f"{', '.join(INPUTS)}, an empty name for one that is not given"
        )
    state = proto.input[_STATE]
    if state not in types:
        raise SpecError(
            f"{label}: the type of {state!r} is unknown, should be written in value_info: "
            f"onnx.shape_inference.infer_shapes writes it"
        )
    rule = attributes["rule"].decode()
    operator = OPERATORS[proto.op_type]
    if rule not in operator.spec.rule:
        known = ", ".join(operator.spec.rule)
        raise SpecError(f"{label}: rule is {rule!r}, should be one of {known}")
    has_decay, given = operator.spec.rule[rule].has_decay, bool(proto.input[3])
    if has_decay != given:
        should = "given" if has_decay else "left out"
        raise SpecError(f"{label}: log_alpha should be {should}: rule is {rule!r}")
    heads = attributes["num_qk_heads"], attributes["num_v_heads"]
    check_heads(label, *heads)
    variant = Variant(
        operator,
        rule,
        bool(attributes["qk_l2norm"]),
        bool(proto.input[4]),
        "double" if types[state] == TensorProto.DOUBLE else "float",
        types[state] in (TensorProto.DOUBLE, TensorProto.FLOAT),
    )
    return Node(proto, variant, *heads, attributes["scale"])


def check_heads(label: str, num_qk_heads: int, num_v_heads: int) -> None:
    """Check that value heads can share key heads.

    Raises:
        SpecError: there is no head, or num_v_heads is no multiple of num_qk_heads.
    """
    if num_qk_heads < 1:
        raise SpecError(f"{label}: num_qk_heads is {num_qk_heads}, should be at least 1")
    if num_v_heads < 1 or num_v_heads % num_qk_heads:
        raise SpecError(
            f"{label}: num_v_heads is {num_v_heads}, should be a multiple of "
            f"num_qk_heads={num_qk_heads}"
        )


def set_body(model: ModelProto, body: str | None) -> ModelProto:
    """Return a model whose nodes have another function body; nothing else changes.

    Setting the body that is there changes no byte, and neither does setting another one and the
    first one again. The body of a file whose weights lie in another one is set without them:
    `onnx.load(path, load_external_data=False)`.

    Args:
        model: with nodes of this library; it is not modified.
        body: "standard", "ort", "onnx", or None for no function, where the runtime has a kernel.

    Raises:
        SpecError: the model has no such node, or the body cannot do what a node asks for.
    """
    changed = ModelProto()
    changed.CopyFrom(model)
    _drop_functions(changed)
    nodes, opset = nodes_of(changed), opset_of(changed)
    for node in nodes:
        check_body(body, node.variant, opset, node.scale)
        # Without a function nothing tells overloads apart.
        node.proto.ClearField("overload")
    if body is None:
        return changed
    _import(changed, DOMAIN, VERSION)
    added = body == "ort" and _import(changed, MICROSOFT, 1)
    first: dict[str, Variant] = {}
    written: set[Variant] = set()
    for node in nodes:
        name, variant = node.proto.op_type, node.variant
        if first.setdefault(name, variant) != variant:
            node.proto.overload = variant.overload
        if variant in written:
            continue
        written.add(variant)
        function = decode_function(body, variant, opset)
        if first[name] != variant:
            function.overload = variant.overload
        if added:
            function.metadata_props.add(key=_IMPORT_KEY, value=MICROSOFT)
        changed.functions.append(function)
    return changed


def without_overloads(model: ModelProto) -> ModelProto:
    """Give our functions and nodes names that tell them apart without an overload.

    onnxruntime before 1.27 ignores overloads, and runs one function for all nodes.
    """
    if not any(function.overload for function in model.functions):
        return model
    renamed = ModelProto()
    renamed.CopyFrom(model)
    for function in renamed.functions:
        if function.domain == DOMAIN and function.overload:
            function.name += f"_{function.overload}"
            function.ClearField("overload")
    for node in _own_nodes(renamed.graph.node):
        if node.overload:
            node.op_type += f"_{node.overload}"
            node.ClearField("overload")
    return renamed


def _import(model: ModelProto, domain: str, version: int) -> bool:
    """Import a domain into a model; return whether it was missing."""
    if opset_of(model, domain):
        return False
    model.opset_import.append(helper.make_opsetid(domain, version))
    return True


def _drop_functions(model: ModelProto) -> None:
    """Remove our functions, and the imports that they brought along."""
    own = [f for f in model.functions if f.domain == DOMAIN and f.name in OPERATORS]
    brought = {p.value for f in own for p in f.metadata_props if p.key == _IMPORT_KEY}
    for function in own:
        model.functions.remove(function)
    for opset in [o for o in model.opset_import if o.domain in brought]:
        model.opset_import.remove(opset)


def bodies_of(model: ModelProto) -> tuple[str, ...]:
    """Return the bodies that a model holds for our nodes: none or one, unless it was edited."""
    own = [f for f in model.functions if f.domain == DOMAIN and f.name in OPERATORS]
    return tuple(dict.fromkeys(body_of(function) for function in own))


def states_of(model: ModelProto) -> dict[str, str]:
    """Return the output that is the next value of each state input.

    The metadata written at export count; without them, the names that onnxruntime-genai uses,
    `past_key_values.{i}.recurrent_state` and `present.{i}.recurrent_state`.
    """
    written = next((p.value for p in model.metadata_props if p.key == STATES_KEY), None)
    if written is not None:
        return dict(json.loads(written))
    outputs = {value.name for value in model.graph.output}
    pairs = {
        value.name: "present." + value.name.removeprefix("past_key_values.")
        for value in model.graph.input
        if value.name.startswith("past_key_values.")
    }
    return {name: output for name, output in pairs.items() if output in outputs}


def write_states(model: ModelProto, states: Mapping[str, str]) -> None:
    """Write into a model's metadata which output is the next value of which input."""
    for entry in [p for p in model.metadata_props if p.key == STATES_KEY]:
        model.metadata_props.remove(entry)
    model.metadata_props.add(key=STATES_KEY, value=json.dumps(dict(states)))


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
