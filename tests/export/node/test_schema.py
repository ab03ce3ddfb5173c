"""The schema of a node is what the spec says, and a node that cannot be is refused."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch

import gdn_ops
from errors import refusal
from gdn_ops import export
from onnx_steps import NEW_STATE, STATE, Step, assert_right, in_session


@pytest.mark.parametrize(
    ("text", "options"),
    {
        "num_v_heads is 3, should be a multiple of num_qk_heads=2": {"num_v_heads": 3},
        "num_qk_heads is 0, should be at least 1": {"num_qk_heads": 0},
        "head_k_dim is 0, should be at least 1": {"head_k_dim": 0},
        "rule is 'lstm', should be one of gated_delta, delta, gated, linear": {"rule": "lstm"},
        "body is 'fast', should be one of standard, ort, onnx, or None for none": {"body": "fast"},
        "the model has opset 17, should have 18 or newer; export it with opset=18 or convert it "
        "with onnx.version_converter": {"opset": 17},
        "the model has opset 21, body 'onnx' should have 27 or newer; export with opset=27, or "
        "take body='standard'": {"body": "onnx"},
        "the state is float64, body 'ort' should have float32 or shorter; take body='standard'": {
            "body": "ort",
            "dtype": "float64",
        },
        "scale is 0, which LinearAttention of body 'ort' reads as K ** -0.5; take "
        "body='standard'": {"body": "ort", "scale": 0.0},
        "scale is inf, should be a finite number in float32": {"scale": float("inf")},
        "scale is 1e+300, should be a finite number in float32": {"scale": 1e300},
        "scale is an integer beyond float32, should be a finite number in float32": {
            "scale": 10**400
        },
        "scale is 1e-300, which is 0 in float32, should be 0 or larger": {"scale": 1e-300},
        "scale has type str, should be a finite number": {"scale": "x"},
        "num_v_heads has type float, should be an integer": {"num_v_heads": 4.0},
        "num_qk_heads has type bool, should be an integer": {"num_qk_heads": True},
        "head_k_dim is 2147483648, should be at most 2147483647": {"head_k_dim": 2**31},
        "head_v_dim is of 1329 bits, should be at most 2147483647": {"head_v_dim": 10**400},
        "qk_l2norm has type str, should be True or False": {"qk_l2norm": "no"},
        "has_beta has type NoneType, should be True or False": {"has_beta": None},
        "opset has type NoneType, should be an integer": {"opset": None},
        "rule is [], should be one of gated_delta, delta, gated, linear": {"rule": []},
        "body is ['ort'], should be one of standard, ort, onnx, or None for none": {
            "body": ["ort"]
        },
        "dtype is torch.float32, should be one of float64, float32, bfloat16, float16": {
            "dtype": torch.float32
        },
        "state_dtype is '', should be one of float64, float32, bfloat16, float16": {
            "state_dtype": ""
        },
        "q is float64 and the state float32, should both be float64 or neither": {
            "dtype": "float64",
            "state_dtype": "float32",
        },
        "decay is 'vector', should be one of scalar, channel": {"decay": "vector"},
        "decay has type bool, should be a text": {"decay": True},
        "decay is 'channel', should be left out: rule 'delta' has no decay": {
            "decay": "channel",
            "rule": "delta",
        },
        "dtype is 'int8', should be one of float64, float32, bfloat16, float16": {"dtype": "int8"},
    }.items(),
)
def test_a_model_that_cannot_be_is_refused(text: str, options: dict[str, Any]) -> None:
    arguments = Step().options() | {"state_dtype": None} | options
    assert refusal(export.make_decode_model, **arguments) == (f"gdn_ops::GatedDeltaStep: {text}")


def test_a_function_or_schema_that_cannot_be_is_refused() -> None:
    (node,) = export.nodes_of(Step().model("standard"))
    for arguments, text in (
        ((None, node.variant, 21), "body is None, should be one of standard, ort, onnx"),
        (("standard", "x", 21), "variant has type str, should be a gdn_ops.export.node.attributes."
                                "Variant"),
        (("standard", node.variant, 21.0), "opset has type float, should be an integer"),
    ):  # fmt: skip
        assert refusal(export.decode_function, *arguments) == f"decode_function: {text}"
    assert refusal(export.op_schema, "GatedDelta") == (
        "op_schema: operator has type str, should be an operator, STEP or SEQUENCE"
    )


def test_the_schema_holds_what_the_spec_says() -> None:
    schema = export.op_schema()
    assert (schema.domain, schema.name, schema.since_version) == ("gdn_ops", "GatedDeltaStep", 1)
    assert [x.name for x in schema.inputs] == ["q", "k", "v", "log_alpha", "beta", "state"]
    assert [x.name for x in schema.outputs] == ["o", "new_state"]
    required = {name for name, attribute in schema.attributes.items() if attribute.required}
    assert required == set(schema.attributes) - {"decay"}
    assert {name: attribute.type.name for name, attribute in schema.attributes.items()} == {
        "num_qk_heads": "INT",
        "num_v_heads": "INT",
        "scale": "FLOAT",
        "rule": "STRING",
        "qk_l2norm": "INT",
        "decay": "STRING",
    }
    for line in (*gdn_ops.GATED_DELTA_STEP.equations, *gdn_ops.GATED_DELTA_STEP.sources):
        assert line in schema.doc
    shapes = [x.description.partition(")")[0] + ")" for x in (*schema.inputs, *schema.outputs)]
    assert shapes[0] == shapes[1] == "(B, H, K)"
    assert shapes[2] == shapes[6] == "(B, HV, V)"
    assert shapes[3] == shapes[4] == "(B, HV)"
    assert ", or (B, HV, K) where decay is channel, in [-inf, 0]: " in schema.inputs[3].description
    assert shapes[5] == shapes[7] == "(B, HV, K, V)"
    node = Step(scale=None).model(None).graph.node[0]
    written = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert written.pop("scale") == pytest.approx(8**-0.5)
    expected = {"num_qk_heads": 2, "num_v_heads": 4, "rule": b"gated_delta", "qk_l2norm": 0}
    assert written == expected
    node = Step(decay="channel", scale=0.5).model(None).graph.node[0]
    written = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert written == expected | {"scale": 0.5, "decay": b"channel"}


def with_decay(decay: Any, made_with: str = "scalar", rule: str = "gated_delta") -> Any:
    """Return a model whose node has another attribute decay than the model was made with."""
    model = Step(rule, decay=made_with).model(None)
    (node,) = model.graph.node
    kept = [attribute for attribute in node.attribute if attribute.name != "decay"]
    del node.attribute[:]
    node.attribute.extend(kept)
    if decay is not None:
        node.attribute.append(onnx.helper.make_attribute("decay", decay))
    return model


@pytest.mark.parametrize(
    ("text", "decay", "options"),
    [
        (
            "log_alpha 'log_alpha' has 3 dimensions, should have 2, (B, HV): decay is 'scalar'; a "
            "node with a decay of each key channel has the attribute decay='channel'",
            None,
            {"made_with": "channel"},
        ),
        (
            "log_alpha 'log_alpha' has 2 dimensions, should have 3, (B, HV, K): decay is 'channel'",
            "channel",
            {},
        ),
        ("decay is 'lstm', should be one of scalar, channel", "lstm", {}),
        ("attribute decay has type INT, should be STRING", 1, {}),
        (
            "decay is 'channel', should be left out: rule 'linear' has no decay",
            "channel",
            {"rule": "linear"},
        ),
    ],
)
def test_a_node_whose_decay_is_not_as_it_says_is_refused(
    text: str, decay: Any, options: dict[str, Any]
) -> None:
    model = with_decay(decay, **options)
    for function, arguments in ((export.nodes_of, ()), (export.set_body, ("standard",))):
        refused = refusal(function, model, *arguments)
        assert refused == f"gdn_ops::GatedDeltaStep 'GatedDeltaStep': {text}"


def test_a_decay_of_heads_may_be_written_too() -> None:
    model = export.set_body(with_decay("scalar"), "standard")
    step = Step(tokens=3)
    assert_right(step, *step.draw(), in_session(model, "standard"))


def test_the_names_of_states_are_those_of_onnxruntime_genai() -> None:
    assert export.states_of(Step().model("standard")) == {STATE: NEW_STATE}
