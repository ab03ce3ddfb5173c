"""The schema of a node is what the spec says, and a node that cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


import gdn_ops  # noqa: E402
from gdn_ops import export  # noqa: E402
from onnx_steps import NEW_STATE, STATE, Step  # noqa: E402


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"num_v_heads": 3},
            "num_v_heads is 3, should be a multiple of num_qk_heads=2",
        ),
        ({"num_qk_heads": 0}, "num_qk_heads is 0, should be at least 1"),
        ({"head_k_dim": 0}, "head_k_dim is 0, should be at least 1"),
        (
            {"rule": "lstm"},
            "rule is 'lstm', should be one of gated_delta, delta, gated, linear",
        ),
        (
            {"body": "fast"},
            "body is 'fast', should be one of standard, ort, onnx, or None for none",
        ),
        (
            {"opset": 17},
            "the model has opset 17, should have 18 or newer; export it "
            "with opset=18 or convert it with onnx.version_converter",
        ),
        (
            {"body": "onnx"},
            "the model has opset 21, body 'onnx' should have 27 or newer; "
            "export with opset=27, or take body='standard'",
        ),
        (
            {"body": "ort", "dtype": "float64"},
            "the state is float64, body 'ort' should have float32 or shorter; take body='standard'",
        ),
        (
            {"body": "ort", "scale": 0.0},
            "scale is 0, which LinearAttention of body 'ort' reads as "
            "K ** -0.5; take body='standard'",
        ),
        (
            {"scale": float("inf")},
            "scale is inf, should be a finite number",
        ),
        (
            {"dtype": "float64", "state_dtype": "float32"},
            "q is float64 and the state float32, should both be float64 or neither",
        ),
        (
            {"dtype": "int8"},
            "dtype is 'int8', should be one of float64, float32, bfloat16, float16",
        ),
    ],
)
def test_a_model_that_cannot_be_is_refused(options: dict[str, Any], text: str) -> None:
    sizes = {"num_qk_heads": 2, "num_v_heads": 4, "head_k_dim": 8, "head_v_dim": 6}
    with pytest.raises(gdn_ops.SpecError) as caught:
        export.make_decode_model(**(sizes | options))
    assert str(caught.value) == f"gdn_ops::GatedDeltaStep: {text}"


def test_the_schema_holds_what_the_spec_says() -> None:
    schema = export.op_schema()
    assert (schema.domain, schema.name, schema.since_version) == ("gdn_ops", "GatedDeltaStep", 1)
    assert [x.name for x in schema.inputs] == ["q", "k", "v", "log_alpha", "beta", "state"]
    assert [x.name for x in schema.outputs] == ["o", "new_state"]
    assert all(attribute.required for attribute in schema.attributes.values())
    assert {name: attribute.type.name for name, attribute in schema.attributes.items()} == {
        "num_qk_heads": "INT",
        "num_v_heads": "INT",
        "scale": "FLOAT",
        "rule": "STRING",
        "qk_l2norm": "INT",
    }
    for line in (*gdn_ops.GATED_DELTA_STEP.equations, *gdn_ops.GATED_DELTA_STEP.sources):
        assert line in schema.doc
    shapes = [x.description.partition(")")[0] + ")" for x in (*schema.inputs, *schema.outputs)]
    assert shapes[0] == shapes[1] == "(B, H, K)"
    assert shapes[2] == shapes[6] == "(B, HV, V)"
    assert shapes[3] == shapes[4] == "(B, HV)"
    assert shapes[5] == shapes[7] == "(B, HV, K, V)"
    node = Step(scale=None).model(None).graph.node[0]
    written = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert written.pop("scale") == pytest.approx(8**-0.5)
    assert written == {
        "num_qk_heads": 2,
        "num_v_heads": 4,
        "rule": b"gated_delta",
        "qk_l2norm": 0,
    }


def test_the_names_of_states_are_those_of_onnxruntime_genai() -> None:
    model = Step().model("standard")
    assert export.states_of(model) == {STATE: NEW_STATE}
