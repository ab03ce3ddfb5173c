"""Name the states of a model, and read and write which output follows which input."""

from __future__ import annotations

import json
from collections.abc import Mapping

from onnx import ModelProto

STATES_KEY = "gdn_ops.states"
"""Metadata of a model: which output is the next value of which input, as JSON."""


def recurrent_names(layer: int) -> tuple[str, str]:
    """Return the names of a layer's state as input and output, as in onnxruntime-genai."""
    return f"past_key_values.{layer}.recurrent_state", f"present.{layer}.recurrent_state"


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
