"""Name a graph's inputs and outputs, and write down which output follows which input as a state.

States get the names that onnxruntime-genai uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

from gdn_ops.export.model.nodes import all_nodes, check_type, nodes_of, subgraphs
from gdn_ops.spec.errors import SpecError, SpecTypeError

Names = tuple[Sequence[str | None], Sequence[str | None]]
"""Names of the inputs and of the outputs, in order; None leaves a name to the exporter."""

_PASSED_ON = ("Identity", "Cast", "CastLike")

STATES_KEY = "gdn_ops.states"
"""Metadata of a model: which output is the next value of which input, as JSON."""


def recurrent_names(layer: int) -> tuple[str, str]:
    """Return the names of a layer's state as input and output, as in onnxruntime-genai."""
    return f"past_key_values.{layer}.recurrent_state", f"present.{layer}.recurrent_state"


def states_of(model: ModelProto) -> dict[str, str]:
    """Return the output that is the next value of each state input.

    The metadata written at export count; without them, the names that onnxruntime-genai uses,
    `past_key_values.{i}.recurrent_state` and `present.{i}.recurrent_state`.

    Raises:
        SpecError: the metadata hold something else.
    """
    check_type("states_of", model)
    written = next((p.value for p in model.metadata_props if p.key == STATES_KEY), None)
    if written is not None:
        return _states_as_written(written)
    outputs = {value.name for value in model.graph.output}
    pairs = {
        value.name: "present." + value.name.removeprefix("past_key_values.")
        for value in model.graph.input
        if value.name.startswith("past_key_values.")
    }
    return {name: output for name, output in pairs.items() if output in outputs}


def _states_as_written(text: str) -> dict[str, str]:
    """Return the states that the metadata hold as JSON."""
    try:
        states = json.loads(text)
    except (ValueError, RecursionError):
        states = None
    if not (isinstance(states, dict) and all(isinstance(x, str) for x in states.values())):
        raise SpecError(
            f"the model's metadata {STATES_KEY!r} hold {text[:60]!r}, should hold an object of "
            f"names: which output is the next value of which input"
        )
    return states


def write_states(model: ModelProto, states: Mapping[str, str]) -> None:
    """Write into a model's metadata which output is the next value of which input."""
    for entry in [p for p in model.metadata_props if p.key == STATES_KEY]:
        model.metadata_props.remove(entry)
    model.metadata_props.add(key=STATES_KEY, value=json.dumps(dict(states)))


def name_values(label: str, model: ModelProto, names: Names | None) -> None:
    """Rename the inputs and outputs of a model in place, and write its states into its metadata.

    Raises:
        SpecError: there are more or fewer names than values, or one twice.
    """
    graph = model.graph
    inputs, outputs = [v.name for v in graph.input], [v.name for v in graph.output]
    pairs = _recurrent_states(model)
    pairs |= _conv_states(graph, {name for pair in pairs for name in pair if name})
    renamed = {
        name: new for old in pairs for name, new in zip(old, pairs[old], strict=True) if name
    }
    others = [name for name in outputs if name not in renamed and name not in inputs]
    renamed |= {
        name: "output" if len(others) == 1 else f"output_{i}" for i, name in enumerate(others)
    }
    if names is not None:
        given = [*_given(label, "inputs", inputs, names[0])]
        given += _given(label, "outputs", outputs, names[1])
        renamed |= {name: new for name, new in given if new is not None}
    # A value may be an input and an output.
    outer = dict.fromkeys([*inputs, *outputs])
    new_names = [renamed.get(name, name) for name in outer]
    _check_unique(label, new_names)
    _check_free(label, new_names, graph, outer)
    states = {renamed[a]: renamed[b] for a, b in pairs if a and b}
    _rename(graph, renamed)
    write_states(model, {**states_of(model), **states})


def _given(
    label: str, what: str, values: list[str], names: Sequence[str | None]
) -> Iterable[tuple[str, str | None]]:
    if len(values) != len(names):
        raise SpecError(
            f"{label}: names has {len(names)} {what}, should have {len(values)}: "
            f"the graph has {', '.join(values)}"
        )
    return zip(values, names, strict=True)


def check_names(label: str, names: Any) -> None:
    """Check that names are those of inputs and of outputs, each a printable text or None.

    Raises:
        SpecError: they are not; the text says which one.
    """
    if names is None:
        return
    is_pair = isinstance(names, (tuple, list)) and len(names) == 2
    if not is_pair or not all(isinstance(own, (tuple, list)) for own in names):
        raise SpecTypeError(
            f"{label}: names is {names!r:.60}, should be names of inputs and names of outputs: "
            f"([...], [...])"
        )
    for name in (*names[0], *names[1]):
        if name is not None and not (isinstance(name, str) and name and name.isprintable()):
            raise SpecError(f"{label}: names has {name!r:.60}, should have printable texts or None")


def _check_free(
    label: str, names: Iterable[str], graph: GraphProto, outer: Mapping[str, Any]
) -> None:
    """Check that no value inside the graph has one of the names."""
    inner = {name for node in all_nodes(graph.node) for name in node.output}
    inner |= {tensor.name for tensor in graph.initializer}
    for name in names:
        if name in inner - set(outer):
            raise SpecError(
                f"{label}: the name {name!r} is that of a value inside the graph, should be another"
            )


def _check_unique(label: str, names: list[str]) -> None:
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise SpecError(f"{label}: the name {twice[0]!r} is given twice, should be given once")


Pair = tuple[str | None, str | None]
"""The graph input and output that are one state; None where there is none."""


def carries_states(model: ModelProto) -> bool:
    """Return whether the state of every node of ours is an input of the graph, and returned."""
    pairs = _recurrent_states(model)
    is_whole = all(old is not None and new is not None for old, new in pairs)
    return is_whole and len(pairs) == len(nodes_of(model))


def _recurrent_states(model: ModelProto) -> dict[Pair, tuple[str, str]]:
    """Return the graph's inputs and outputs that are states of our nodes, and their new names."""
    graph = model.graph
    made_by = {name: node for node in graph.node for name in node.output}
    read_by = {name: node for node in graph.node for name in node.input}
    inputs, outputs = {v.name for v in graph.input}, {v.name for v in graph.output}
    names: dict[Pair, tuple[str, str]] = {}
    for layer, node in enumerate(nodes_of(model)):
        old, new = node.state, node.new_state
        while old not in inputs and _passes_on(made_by.get(old)):
            old = made_by[old].input[0]
        while new not in outputs and _passes_on(read_by.get(new)):
            new = read_by[new].output[0]
        pair = old if old in inputs else None, new if new in outputs else None
        if pair != (None, None):
            names[pair] = recurrent_names(layer)
    return names


def _passes_on(node: NodeProto | None) -> bool:
    return node is not None and node.op_type in _PASSED_ON and node.domain == ""


def _conv_states(graph: GraphProto, taken: set[str]) -> dict[Pair, tuple[str, str]]:
    """Return names for the states of convolutions, if as many outputs as inputs look like them."""
    inputs = [v for v in graph.input if v.name not in taken and "conv_state" in v.name]
    kinds = {_kind(v) for v in inputs}
    outputs = [v for v in graph.output if v.name not in taken and _kind(v) in kinds]
    if [_kind(v) for v in inputs] != [_kind(v) for v in outputs]:
        return {}
    return {
        (old.name, new.name): (f"past_key_values.{i}.conv_state", f"present.{i}.conv_state")
        for i, (old, new) in enumerate(zip(inputs, outputs, strict=True))
    }


def _kind(value: ValueInfoProto) -> bytes:
    return bytes(value.type.SerializeToString(deterministic=True))


def _rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Rename values of a graph, also where its subgraphs read them."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
        for inner in subgraphs(node):
            _rename(inner, names)
