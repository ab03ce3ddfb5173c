"""Exchange the function bodies of the nodes in a model."""

from __future__ import annotations

import copy

from onnx import FunctionProto, ModelProto, helper

from gdn_ops.export.bodies.table import body_of, check_body, decode_function
from gdn_ops.export.model.nodes import check_type, nodes_of, opset_of, own_nodes
from gdn_ops.export.node.attributes import Variant
from gdn_ops.export.node.schema import DOMAIN, OPERATORS, VERSION, Operator

_IMPORT_KEY = "gdn_ops.import"
"""Metadata of a function: an import that its body brought into the model."""


def set_body(model: ModelProto, body: str | None) -> ModelProto:
    """Return a model whose nodes have another function body; nothing else changes.

    Setting the body that is there changes no byte, and neither does setting another one and the
    first one again. The body of a file whose weights lie in another one is set without them:
    `load_model` loads it so.

    Args:
        model: with nodes of this library; it is not modified.
        body: its name, a key of `BODIES`: "standard", "ort" or "onnx"; or None for no function,
            where the runtime has a kernel.

    Raises:
        SpecError: the model has no such node, or the body cannot do what a node asks for.
    """
    check_type("set_body", model)
    changed = copy.deepcopy(model)
    _drop_functions(changed)
    nodes, opset = nodes_of(changed), opset_of(changed)
    chosen = None
    for node in nodes:
        chosen = check_body(body, node.variant, opset, node.scale)
        # Without a function nothing tells overloads apart.
        node.proto.ClearField("overload")
    if body is None or chosen is None:
        return changed
    _import(changed, DOMAIN, VERSION)
    brought = [domain for domain, version in chosen.imports if _import(changed, domain, version)]
    first: dict[Operator, Variant] = {}
    for node in nodes:
        if first.setdefault(node.variant.operator, node.variant) != node.variant:
            node.proto.overload = node.variant.overload
    for variant in dict.fromkeys(node.variant for node in nodes):
        function = decode_function(body, variant, opset)
        if first[variant.operator] != variant:
            function.overload = variant.overload
        for domain in brought:
            function.metadata_props.add(key=_IMPORT_KEY, value=domain)
        changed.functions.append(function)
    return changed


def without_overloads(model: ModelProto) -> ModelProto:
    """Give our functions and nodes names that tell them apart without an overload.

    onnxruntime before 1.27 ignores overloads, and runs one function for all nodes.
    """
    if not any(function.overload for function in model.functions):
        return model
    renamed = copy.deepcopy(model)
    for function in renamed.functions:
        if function.domain == DOMAIN and function.overload:
            function.name += f"_{function.overload}"
            function.ClearField("overload")
    for node in own_nodes(renamed.graph.node):
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


def _own_functions(model: ModelProto) -> list[FunctionProto]:
    return [f for f in model.functions if f.domain == DOMAIN and f.name in OPERATORS]


def _drop_functions(model: ModelProto) -> None:
    """Remove our functions, and the imports that they brought along."""
    own = _own_functions(model)
    brought = {p.value for f in own for p in f.metadata_props if p.key == _IMPORT_KEY}
    for function in own:
        model.functions.remove(function)
    for opset in [o for o in model.opset_import if o.domain in brought]:
        model.opset_import.remove(opset)


def bodies_of(model: ModelProto) -> tuple[str, ...]:
    """Return the bodies that a model holds for our nodes: none or one, unless it was edited."""
    check_type("bodies_of", model)
    return tuple(dict.fromkeys(body_of(function) for function in _own_functions(model)))
