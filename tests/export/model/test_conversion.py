"""A model of an older opset is converted for the body that needs a newer one, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from errors import refusal
from gdn_ops import export
from gdn_ops.export.model import conversion
from gdn_ops.export.model.nodes import check_model
from gdn_ops.export.runtime import sessions
from gdn_ops.export.runtime.comparison import compare
from onnx_needs import at_opset, needs_onnx_body, needs_written, tells_overloads_apart
from onnx_steps import RULES, Step, assert_right, in_session


@needs_onnx_body
@pytest.mark.parametrize("opset", [18, 21, at_opset(25, opset=25), at_opset(26, opset=26)])
def test_a_file_of_an_older_opset_is_converted_for_the_onnx_body(
    opset: int, tmp_path: Path
) -> None:
    path = tmp_path / "step.onnx"
    for rule in RULES:
        step = Step(rule, qk_l2norm=True, tokens=16)
        onnx.save(step.model("standard", opset), path)
        before = path.read_bytes()
        assert_right(step, *step.draw(), in_session(path, "onnx"))
        assert path.read_bytes() == before
        prompt = step.prefill_model("standard", opset)
        written = prompt.SerializeToString()
        errors = compare(prompt, "onnx", batch=3, tokens=40)
        assert errors.passed, errors
        assert prompt.SerializeToString() == written


EXTRAS = {
    "a function of somebody else": "q_in = mine.Twice (q, weights)",
    "a branch": """q_in = If (yes) <
        then_branch = a () => (float[batch, 2, 8] q_a) { q_a = Add (q, weights) },
        else_branch = b () => (float[batch, 2, 8] q_b) { q_b = Identity (q) }>""",
    "an operator that changed": """half = Constant <value_floats = [0.5]> ()
        grid_to = Constant <value_ints = [1, 2, 2, 2]> ()
        grid = Expand (half, grid_to)
        image_to = Constant <value_ints = [1, 1, 2, 8]> ()
        image = Reshape (weights, image_to)
        sampled = GridSample <mode = "bilinear"> (image, grid)
        drop = Constant <value_ints = [0, 1]> ()
        square = Squeeze (sampled, drop)
        once = ReduceMean <keepdims = 0> (square)
        q_in = Mul (q, once)""",
}


def with_nodes(step: Step, text: str, opset: int) -> Any:
    """Return a model whose query goes through nodes of others first."""
    model = step.model("standard", opset)
    model.graph.node[0].input[0] = "q_in"
    graph = onnx.parser.parse_graph(
        f"extra (float[batch, 2, 8] q, float[2, 8] weights, bool yes) => (float[batch, 2, 8] q_in)"
        f" {{ {text} }}"
    )
    for node in reversed(graph.node):
        node.metadata_props.add(key="written by", value="a test")
        model.graph.node.insert(0, node)
    weights = np.arange(16, dtype=np.float32).reshape(2, 8)
    for name, value in (("weights", weights), ("yes", np.array(True))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    if "mine" in text:
        function = f'<domain: "mine", opset_import: ["": {opset}]> Twice (x, y) => (z) {{'
        function += " both = Add (x, y) z = Relu (both) }"
        model.functions.append(onnx.parser.parse_function(function))
        model.opset_import.append(onnx.helper.make_opsetid("mine", 1))
    return model


def assert_bodies_agree(model: Any, tokens: Any, state: Any) -> None:
    o, after = in_session(model, "standard")(tokens, state)
    o_onnx, after_onnx = in_session(model, "onnx")(tokens, state)
    for x, y in zip((*o_onnx, after_onnx), (*o, after), strict=True):
        assert np.abs(x - y).max() < 2e-6 * max(1, np.abs(y).max())


@needs_onnx_body
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("extra", EXTRAS)
def test_a_conversion_keeps_what_a_model_computes_beside_our_node(extra: str) -> None:
    step = Step(tokens=4)
    assert_bodies_agree(with_nodes(step, EXTRAS[extra], 18), *step.draw())


@needs_written(27)
def test_a_conversion_changes_no_node_that_is_the_same_in_both_opsets() -> None:
    model = with_nodes(Step(), "sum = Add (q, weights) q_in = Relu (sum)", 21)
    model.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(np.full((64, 2, 8), 0.5, np.float32), "weights")
    )
    model.metadata_props.add(key="licence", value="MIT")
    model.doc_string, model.graph.doc_string = "a model", "a graph"
    converted = conversion.with_opset(model, 27, "label", "cure")
    assert {o.domain: o.version for o in converted.opset_import} == {"": 27, "gdn_ops": 1}
    expected = export.set_body(model, None)
    expected.opset_import[0].version = 27
    expected.ir_version = converted.ir_version
    assert converted.SerializeToString() == expected.SerializeToString()
    check_model(export.set_body(converted, "onnx"))


def released(version: str) -> tuple[int, ...]:
    """Return the release of a version, as two numbers."""
    return tuple(map(int, version.split(".")[:2]))


TAKEN_FROM = dict.fromkeys((18, 19, 20, 21), (1, 20)) | {
    opset: released(text.split()[0]) for opset, text in sessions._OPSETS.items()
}


def test_the_versions_that_errors_and_the_page_name_are_those_that_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime, writer = released(ort.__version__), released(onnx.__version__)
    monkeypatch.delenv("ALLOW_RELEASED_ONNX_OPSET_ONLY", raising=False)
    taken = {opset for opset in TAKEN_FROM if sessions.takes_opset(opset)}
    assert taken == {opset for opset, oldest in TAKEN_FROM.items() if runtime >= oldest}
    assert tells_overloads_apart() == (runtime >= (1, 27))
    expected = {"standard": True, "ort": runtime >= (1, 25)}
    for setting, oldest in ((None, (1, 32)), ("0", (1, 28))):
        if setting is not None:
            monkeypatch.setenv("ALLOW_RELEASED_ONNX_OPSET_ONLY", setting)
        expected["onnx"] = runtime >= oldest and writer >= (1, 22)
        assert export.available_bodies() == tuple(b for b, runs in expected.items() if runs)


@needs_onnx_body
def test_weights_in_another_file_stay_there_in_a_conversion(tmp_path: Path) -> None:
    step = Step(tokens=1)
    model = with_nodes(
        step, "sums = Add (q, weights) q_in = ReduceMean <keepdims = 0> (sums, axis)", 18
    )
    model.graph.node[1].input[0] = "sums"
    weights = np.linspace(-1, 1, 64 * 16, dtype=np.float32).reshape(64, 1, 2, 8)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "weights"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "axis"))
    path = tmp_path / "step.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin")
    assert (tmp_path / "weights.bin").stat().st_size >= weights.nbytes
    assert_bodies_agree(path, *step.draw())


CANNOT: dict[str, tuple[Callable[[], Any], str]] = {
    "float64": (
        lambda: Step(dtype="float64", state_dtype="float64").model("standard"),
        "gdn_ops::GatedDeltaStep: the state is float64, body 'onnx' should have float32 or "
        "shorter; take body='standard'",
    ),
    "scale": (
        lambda: Step(scale=0.0).model("standard"),
        "gdn_ops::GatedDeltaStep: scale is 0, which LinearAttention of body 'onnx' reads as "
        "K ** -0.5; take body='standard'",
    ),
    "an operator that the converter forgets": (
        lambda: with_nodes(
            Step(),
            "g = Constant <value_floats = [1.0]> () q_in = GroupNormalization <num_groups = 1> "
            "(q, g, g)",
            18,
        ),
        f"DecodeSession: the model has opset 18, which onnx {onnx.__version__} cannot convert to "
        "27: it leaves GroupNormalization as it was before 21; export it with opset=27, or take "
        "body='standard'",
    ),
    "an operator that is none": (
        lambda: with_nodes(Step(), "q_in = NoSuchOperator (q)", 21),
        f"DecodeSession: the model has opset 21, which onnx {onnx.__version__} cannot convert to "
        "27: .+; export it with opset=27, or take body='standard'",
    ),
}


@needs_onnx_body
@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_converted_for_the_onnx_body_is_refused_with_the_cure(name: str) -> None:
    make, text = CANNOT[name]
    message = refusal(export.DecodeSession, make(), batch=2, body="onnx")
    assert message == text or (".+" in text and re.fullmatch(text, message, re.DOTALL))


@needs_onnx_body
def test_the_onnx_body_needs_a_row() -> None:
    assert refusal(Step().session, batch=0, body="onnx") == (
        "DecodeSession: batch is 0, should be at least 1 for body 'onnx', whose operator "
        "onnxruntime does not run on no rows; take body='standard'"
    )
