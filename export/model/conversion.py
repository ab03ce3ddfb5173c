"""Convert a model to a newer opset of ai.onnx, for the body that needs it.

onnx's own converter drops functions, metadata and the types of weights. So it converts the nodes
alone, of a model without its weights, and they go back into the original model.
"""

from __future__ import annotations

import copy

import onnx
import onnx.inliner
import onnx.version_converter
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from gdn_ops.export.bodies.table import BODIES, check_body
from gdn_ops.export.model.functions import set_body
from gdn_ops.export.model.nodes import all_nodes, ir_version, nodes_of, opset_of
from gdn_ops.spec.errors import SpecError

_SMALL_BYTES = 1024
"""Weights up to this size may be shapes or axes, whose values a conversion reads."""

_UNCONVERTED = {"GroupNormalization": 21}
"""Operators that mean something else from an opset on, and that onnx's converter leaves alone."""


def with_body(model: ModelProto, body: str | None, label: str) -> ModelProto:
    """Set the body of a model as `set_body` does, converted to the opset that the body needs.

    Raises:
        SpecError: the body cannot do what a node asks for, or the model cannot be converted.
    """
    chosen = BODIES.get(body or "")
    if chosen is not None and opset_of(model) < chosen.min_opset:
        # Say first what no opset mends.
        for node in nodes_of(model):
            check_body(body, node.variant, chosen.min_opset, node.scale)
        cure = f"export it with opset={chosen.min_opset}, or take body='standard'"
        model = with_opset(model, chosen.min_opset, label, cure)
    return set_body(model, body)


def with_opset(model: ModelProto, opset: int, label: str, cure: str) -> ModelProto:
    """Convert a model to a newer opset; our nodes have no function afterwards.

    Functions of others are inlined, because a function may not import another opset than its
    model. Nodes that are the same in both opsets are not touched, and neither is the given model.
    Errors begin with the label of the caller and end with the cure, what else may be done.

    Raises:
        SpecError: the installed onnx does not know the opset or cannot convert to it.
    """
    changed = set_body(model, None)
    have = opset_of(changed)
    failed = f"{label}: the model has opset {have}, which onnx {onnx.__version__} cannot convert"
    newest = onnx.defs.onnx_opset_version()
    if newest < opset:
        raise SpecError(f"{failed} to {opset}: it knows opset {newest} and older; {cure}")
    light = _without_weights(changed)
    # Its errors have no common base but Exception.
    try:
        if light.functions:
            light = onnx.inliner.inline_local_functions(light, convert_version=True)
        converted = onnx.version_converter.convert_version(light, opset)
    except Exception as error:
        raise SpecError(f"{failed} to {opset}: {error}; {cure}") from error
    standard = {node.op_type for node in all_nodes(converted.graph.node) if not node.domain}
    for name, since in _UNCONVERTED.items():
        if have < since <= opset and name in standard:
            raise SpecError(
                f"{failed} to {opset}: it leaves {name} as it was before {since}; {cure}"
            )
    _take_nodes(changed.graph, converted.graph)
    del changed.functions[:]
    for entry in changed.opset_import:
        if not entry.domain:
            entry.version = opset
    changed.ir_version = max(changed.ir_version, ir_version(changed.opset_import))
    return changed


def _without_weights(model: ModelProto) -> ModelProto:
    """Copy a model, with references in place of its large weights."""
    light = copy.deepcopy(model)
    for tensor in light.graph.initializer:
        if tensor.ByteSize() > _SMALL_BYTES:
            reference = TensorProto(
                name=tensor.name,
                dims=tensor.dims,
                data_type=tensor.data_type,
                data_location=TensorProto.EXTERNAL,
            )
            reference.external_data.add(key="location", value="weights")
            tensor.CopyFrom(reference)
    return light


def _take_nodes(graph: GraphProto, converted: GraphProto) -> None:
    """Replace the nodes of a graph by converted ones, except those that are the same."""
    own = {tuple(node.output): node for node in graph.node}
    nodes = []
    for node in converted.node:
        before = own.get(tuple(node.output), node)
        kept = before if _bare(before) == _bare(node) else node
        nodes.append(copy.deepcopy(kept))
    del graph.node[:]
    graph.node.extend(nodes)
    names = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(t for t in converted.initializer if t.name not in names)


def _bare(node: NodeProto) -> bytes:
    """Return a node as bytes, without its name and metadata."""
    bare = copy.deepcopy(node)
    for field in ("name", "doc_string", "overload", "metadata_props"):
        bare.ClearField(field)
    bare.attribute.sort(key=lambda attribute: attribute.name)
    return bytes(bare.SerializeToString(deterministic=True))
