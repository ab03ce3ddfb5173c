"""Every body computes what the definition does, for every rule, dtype and shape."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from paths import ROOT

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

import gdn_ops  # noqa: E402
from gdn_ops import export  # noqa: E402
from gdn_ops.export.model.opsets import check_model  # noqa: E402
from gdn_ops.export.runtime.comparison import compare  # noqa: E402
from gdn_ops.export.runtime.sessions import why_not  # noqa: E402
from onnx_needs import (  # noqa: E402
    ALL_BODIES,
    BODIES,
    at_opset,
    needs_onnx_body,
    needs_reference_scan,
    needs_written,
    opset_for,
    reference_has_bfloat16,
)
from onnx_steps import (  # noqa: E402
    DTYPES,
    HEADS,
    NEW_STATE,
    RULES,
    SCALES,
    STATE,
    Step,
    assert_right,
    feed,
    in_engine,
    in_session,
    to_numpy,
    varied,
)

ONNX_BODY = pytest.param("onnx", marks=needs_written(27))


def steps_of(dtype: tuple[str, str], rule: str) -> Step:
    """Return a step with shapes that differ from dtype to dtype and rule to rule."""
    i = DTYPES.index(dtype) + 2 * RULES.index(rule)
    step = Step(rule, *dtype, qk_l2norm=i % 3 == 0, has_beta=i % 5 != 4, seed=i)
    return varied(step, i)


@pytest.mark.parametrize("dtype", DTYPES, ids="-".join)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("body", ALL_BODIES)
def test_a_body_is_the_definition_over_64_steps(
    body: str, rule: str, dtype: tuple[str, str]
) -> None:
    if body != "standard" and dtype[1] == "float64":
        pytest.skip("LinearAttention has no float64")
    step = steps_of(dtype, rule)
    assert_right(step, *step.draw(), in_session(step.model(body), body))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids="-".join)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("body", ALL_BODIES)
def test_a_body_is_the_definition_for_all_heads_and_scales(
    body: str, rule: str, dtype: tuple[str, str]
) -> None:
    if body != "standard" and dtype[1] == "float64":
        pytest.skip("LinearAttention has no float64")
    flags = itertools.product((False, True), repeat=2)
    for heads, scale, (l2norm, has_beta) in itertools.product(HEADS, SCALES, flags):
        for K, V in ((8, 6), (5, 12)):
            step = Step(rule, *dtype, *heads, K, V, 2, scale, l2norm, has_beta)
            assert_right(step, *step.draw(), in_session(step.model(body), body))


@pytest.mark.parametrize("dtype", DTYPES, ids="-".join)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("body", ["standard", ONNX_BODY])
def test_onnx_reference_runs_a_body(body: str, rule: str, dtype: tuple[str, str]) -> None:
    if body == "onnx" and dtype[1] == "float64":
        pytest.skip("ai.onnx LinearAttention has no float64")
    if "bfloat16" in dtype and not reference_has_bfloat16():
        pytest.skip(f"onnx.reference {onnx.__version__} has no bfloat16")
    step = replace(steps_of(dtype, rule), tokens=64 if body == "standard" else 8)
    assert_right(step, *step.draw(), in_engine(ReferenceEvaluator(step.model(body))))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("body", "opset"),
    [
        at_opset(body, opset, opset=opset, body=body)
        for body in ("standard", "ort", "onnx")
        for opset in (18, 21, 25, 26, 27, 28)
        if body != "onnx" or opset >= 27
    ],
)
def test_a_body_is_valid_and_right_at_every_opset(body: str, opset: int, rule: str) -> None:
    step = Step(rule, qk_l2norm=True, tokens=8)
    model = step.model(body, opset)
    check_model(model)
    assert {o.domain: o.version for o in model.opset_import}[""] == opset
    assert_right(step, *step.draw(), in_session(model, body))


@pytest.mark.parametrize("body", BODIES)
def test_one_file_serves_every_batch(body: str) -> None:
    model = Step().model(body)
    engine = ort.InferenceSession(model.SerializeToString())
    for batch in (0, 1, 3, 7):
        step = Step(B=batch, tokens=8, seed=batch)
        assert_right(step, *step.draw(), in_engine(engine))
        assert_right(step, *step.draw(), in_session(model, body))


RUN_ONNX_BODY = """
import sys
import onnxruntime
sys.path.insert(0, "tests")
from onnx_steps import RULES, Step, assert_right, in_session
from gdn_ops import export
if "onnx" in export.available_bodies():
    for rule in RULES:
        step = Step(rule, tokens=16)
        for opset in (21, 27):
            model = step.model("standard", opset)
            assert_right(step, *step.draw(), in_session(model, "onnx"))
    print("ran", len(RULES))
"""


def test_onnxruntime_runs_the_onnx_body_where_it_is_told_to_take_new_opsets() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN_ONNX_BODY],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "ALLOW_RELEASED_ONNX_OPSET_ONLY": "0"},
    )
    assert done.returncode == 0, done.stderr
    if not done.stdout:
        pytest.skip(why_not("onnx"))
    assert done.stdout == f"ran {len(RULES)}\n"


@st.composite
def drawn_steps(draw: st.DrawFn) -> Step:
    H = draw(st.sampled_from((1, 2, 3)))
    return Step(
        rule=draw(st.sampled_from(RULES)),
        H=H,
        HV=H * draw(st.sampled_from((1, 2, 3))),
        K=draw(st.sampled_from((1, 2, 5, 16))),
        V=draw(st.sampled_from((1, 3, 8))),
        B=draw(st.sampled_from((0, 1, 2, 3))),
        scale=draw(st.sampled_from((None, 1.0, 0.3, -2.0))),
        # A normalised single number is its sign.
        qk_l2norm=draw(st.booleans()),
        has_beta=draw(st.booleans()),
        tokens=draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 2**16)),
    )


GATES = st.sampled_from((-np.inf, -1e4, -90.0, -20.0, -1.0, -1e-8, 0.0))
STRENGTHS = st.sampled_from((0.0, 1e-30, 0.5, 1.0, 1.5, 2.0))


@settings(max_examples=60)
@given(drawn_steps(), st.data())
def test_drawn_steps_with_resets_and_strong_gates_are_right(step: Step, data: Any) -> None:
    tokens, state = step.draw()
    for token in tokens:
        for name, values in (("log_alpha", GATES), ("beta", STRENGTHS)):
            if name in token and token[name].numel():
                flat = token[name].view(-1)
                flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(values)
    for body in ("standard", "ort"):
        if body in export.available_bodies():
            assert_close(step, tokens, state, in_session(step.model(body), body))


def assert_close(step: Step, tokens: Any, start: Any, run: Any) -> None:
    """Compare with float64, errors measured against the largest that a state has been.

    After a reset what is left may be small against what the step before it rounded.
    """
    exact_o, exact_state = step.run(tokens, start, wide=True)
    own_o, own_state = step.run(tokens, start, wide=False)
    found_o, found_state = run(tokens, start)
    pairs = zip((*found_o, found_state), (*own_o, own_state), (*exact_o, exact_state), strict=True)
    size = max([1.0, *(float(x["v"].abs().max()) for x in tokens if x["v"].numel())])
    if start.numel():
        size = max(size, float(start.abs().max())) * (1 + step.K) * len(tokens)
    for found, own, exact in pairs:
        if not found.size:
            assert found.shape == tuple(exact.shape)
            continue
        error = np.abs(found - exact.numpy()).max()
        allowed = 2 * float((own - exact).abs().max()) + 2e-7 * size
        assert error <= allowed, f"{step}: got {error:.3g}, but should be <= {allowed:.3g}"


def test_an_exact_zero_decay_forgets_everything_and_is_no_nan() -> None:
    step = Step(tokens=1)
    (token,), state = step.draw()
    token["log_alpha"].fill_(-np.inf)
    for body in export.available_bodies():
        results = [in_session(step.model(body), body)([token], s)[1] for s in (state, state * 1e30)]
        assert np.isfinite(results[0]).all()
        assert np.array_equal(*results)


def wrong_batches() -> list[tuple[str, str, tuple[int, ...]]]:
    """Return (rule, input, shape with batch 1) of steps whose other inputs have batch 3."""
    shapes = {"q": (2, 8), "k": (2, 8), "v": (4, 6), "log_alpha": (4,), "beta": (4,)}
    return [
        (rule, name, (1, *rest))
        for rule in RULES
        for name, rest in {**shapes, STATE: (4, 8, 6)}.items()
        if name != "log_alpha" or Step(rule).has_decay
    ]


@pytest.mark.parametrize(("rule", "name", "shape"), wrong_batches())
@pytest.mark.parametrize("body", BODIES)
def test_onnxruntime_refuses_one_row_where_there_are_three(
    body: str, rule: str, name: str, shape: tuple[int, ...]
) -> None:
    step = Step(rule, B=3, tokens=1)
    (token,), state = step.draw()
    feeds = {**feed(token), STATE: to_numpy(state)}
    model = step.model(body)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    engine = ort.InferenceSession(model.SerializeToString(), options)
    assert engine.run(None, feeds)[0].shape == (3, 4, 6)
    with pytest.raises(Exception, match=r"reshape|Reshape|dimension|shape"):
        engine.run(None, feeds | {name: np.zeros(shape, np.float32)})
    if body == "standard":
        with pytest.raises(Exception, match="reshape"):
            ReferenceEvaluator(model).run(None, feeds | {name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("name", "shape"),
    [("q", (3, 4, 8)), ("k", (3, 2, 16)), ("v", (3, 2, 6)), (STATE, (3, 4, 6, 8)), ("beta", (3,))],
)
@pytest.mark.parametrize("body", BODIES)
def test_onnxruntime_refuses_other_heads_and_widths(
    body: str, name: str, shape: tuple[int, ...]
) -> None:
    step = Step(B=3, tokens=1)
    (token,), state = step.draw()
    engine = ort.InferenceSession(step.model(body).SerializeToString())
    feeds = {**feed(token), STATE: to_numpy(state), name: np.zeros(shape, np.float32)}
    with pytest.raises(Exception, match=r"Got invalid dimensions|Invalid rank"):
        engine.run(None, feeds)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("body", BODIES)
def test_a_prompt_is_read_token_by_token(body: str, rule: str) -> None:
    step = Step(rule, qk_l2norm=True, B=2, tokens=9)
    tokens, state = step.draw()
    model = export.make_prefill_model(**step.options(), body=body)
    check_model(model)
    feeds = {name: np.stack([feed(token)[name] for token in tokens], 1) for name in feed(tokens[0])}
    engine = ort.InferenceSession(model.SerializeToString())
    exact_o, exact_state = step.run(tokens, state, wide=True)

    def difference(x: Any, y: Any) -> float:
        return float(np.abs(x - y).max())

    o, new_state = engine.run(None, {**feeds, STATE: to_numpy(state)})
    assert difference(o, np.stack([x.numpy() for x in exact_o], 1)) < 2e-6
    assert difference(new_state, exact_state.numpy()) < 2e-6
    # No token at all leaves the state as it is.
    none = {name: x[:, :0] for name, x in feeds.items()}
    o, same = engine.run(None, {**none, STATE: to_numpy(state)})
    assert o.shape == (2, 0, 4, 6)
    assert np.array_equal(same, to_numpy(state))
    # The first part by one file, the rest by the other, with the state in between.
    first = {name: x[:, :5] for name, x in feeds.items()}
    middle = engine.run(None, {**first, STATE: to_numpy(state)})[1]
    session = export.DecodeSession(step.model(body), batch=2, body=body)
    session.state = middle
    for token, exact in zip(tokens[5:], exact_o[5:], strict=True):
        assert difference(session.step(**feed(token)), exact.numpy()) < 2e-6
    assert difference(session.state[STATE], exact_state.numpy()) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids="-".join)
@pytest.mark.parametrize("body", ALL_BODIES)
def test_a_prompt_is_right_in_every_dtype(body: str, dtype: tuple[str, str]) -> None:
    if body != "standard" and dtype[1] == "float64":
        pytest.skip("LinearAttention has no float64")
    for i, rule in enumerate(RULES):
        step = varied(Step(rule, *dtype, qk_l2norm=i % 2 == 0, has_beta=i != 1), i)
        model = export.make_prefill_model(**step.options(), body=body, opset=opset_for(body))
        found = compare(model, body, batch=3, tokens=40)
        assert found.passed, found


@needs_onnx_body
@pytest.mark.parametrize("opset", [18, 21, at_opset(25, opset=25)])
def test_a_prompt_of_an_older_opset_is_converted_for_the_onnx_body(opset: int) -> None:
    for rule in RULES:
        step = Step(rule, qk_l2norm=True)
        model = export.make_prefill_model(**step.options(), opset=opset)
        before = model.SerializeToString()
        found = compare(model, "onnx", batch=3, tokens=40)
        assert found.passed, found
        assert model.SerializeToString() == before


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("body", [pytest.param("standard", marks=needs_reference_scan), ONNX_BODY])
def test_onnx_reference_reads_a_prompt(body: str, rule: str) -> None:
    step = Step(rule, tokens=5)
    tokens, state = step.draw()
    feeds = {name: np.stack([feed(token)[name] for token in tokens], 1) for name in feed(tokens[0])}
    exact_o, exact_state = step.run(tokens, state, wide=True)
    model = export.make_prefill_model(**step.options(), body=body, opset=opset_for(body))
    o, new = ReferenceEvaluator(model).run(None, {**feeds, STATE: to_numpy(state)})
    assert np.abs(o - np.stack([x.numpy() for x in exact_o], 1)).max() < 2e-6
    assert np.abs(new - exact_state.numpy()).max() < 2e-6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"num_v_heads": 3},
            "gdn_ops::GatedDeltaStep: num_v_heads is 3, should be a multiple of num_qk_heads=2",
        ),
        ({"num_qk_heads": 0}, "gdn_ops::GatedDeltaStep: num_qk_heads is 0, should be at least 1"),
        ({"head_k_dim": 0}, "gdn_ops::GatedDeltaStep: head_k_dim is 0, should be at least 1"),
        (
            {"rule": "lstm"},
            "gdn_ops::GatedDeltaStep: rule is 'lstm', should be one of gated_delta, delta, gated, "
            "linear",
        ),
        (
            {"body": "fast"},
            "gdn_ops::GatedDeltaStep: body is 'fast', should be one of standard, ort, onnx, or "
            "None for none",
        ),
        (
            {"opset": 17},
            "gdn_ops::GatedDeltaStep: the model has opset 17, should have 18 or newer; export it "
            "with opset=18 or convert it with onnx.version_converter",
        ),
        (
            {"body": "onnx"},
            "gdn_ops::GatedDeltaStep: the model has opset 21, body 'onnx' should have 27 or newer; "
            "export with opset=27, or take body='standard'",
        ),
        (
            {"body": "ort", "dtype": "float64"},
            "gdn_ops::GatedDeltaStep: the state is float64, body 'ort' should have float32 or "
            "shorter; take body='standard'",
        ),
        (
            {"body": "ort", "scale": 0.0},
            "gdn_ops::GatedDeltaStep: scale is 0, which LinearAttention of body 'ort' reads as "
            "K ** -0.5; take body='standard'",
        ),
        (
            {"scale": float("inf")},
            "gdn_ops::GatedDeltaStep: scale is inf, should be a finite number",
        ),
        (
            {"dtype": "float64", "state_dtype": "float32"},
            "gdn_ops::GatedDeltaStep: q is float64 and the state float32, should both be float64 "
            "or neither",
        ),
        (
            {"dtype": "int8"},
            "gdn_ops::GatedDeltaStep: dtype is 'int8', should be one of float64, float32, "
            "bfloat16, float16",
        ),
    ],
)
def test_a_model_that_cannot_be_is_refused(options: dict[str, Any], text: str) -> None:
    sizes = {"num_qk_heads": 2, "num_v_heads": 4, "head_k_dim": 8, "head_v_dim": 6}
    with pytest.raises(gdn_ops.SpecError) as caught:
        export.make_decode_model(**(sizes | options))
    assert str(caught.value) == text


def test_a_scale_of_zero_is_zero_in_the_standard_body() -> None:
    step = Step(scale=0.0, tokens=1)
    (token,), state = step.draw()
    (o,), _ = in_session(step.model("standard"), "standard")([token], state)
    assert np.array_equal(o, np.zeros_like(o))


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


def test_the_new_state_is_written_after_all_reads_of_the_old_one() -> None:
    """This makes one buffer for both safe."""
    for rule, body in itertools.product(RULES, ("standard", "ort")):
        model = Step(rule).model(body)
        nodes = [n for n in model.functions[0].node if n.op_type != "Shape"]
        made_by = {name: i for i, node in enumerate(nodes) for name in node.output}
        writer = made_by["new_state"]
        ancestors, waiting = {writer}, [writer]
        while waiting:
            for name in nodes[waiting.pop()].input:
                if name in made_by and made_by[name] not in ancestors:
                    ancestors.add(made_by[name])
                    waiting.append(made_by[name])
        readers = {
            i
            for i, node in enumerate(nodes)
            if "state" in node.input and node.op_type != "CastLike"
        }
        assert readers and readers <= ancestors, (rule, body)


@pytest.mark.parametrize("body", ["standard", "ort", ONNX_BODY])
def test_a_float32_state_is_never_copied_by_a_cast(body: str) -> None:
    for make in (export.make_decode_model, export.make_prefill_model):
        for state_dtype, casts in (("float32", []), ("float16", ["Cast", "CastLike"])):
            options = Step(state_dtype=state_dtype).options()
            model = make(**options, body=body, opset=opset_for(body))
            nodes = model.functions[0].node
            found = [n.op_type for n in nodes if "state" in n.input and "Cast" in n.op_type]
            assert found == casts


def test_the_names_of_states_are_those_of_onnxruntime_genai() -> None:
    model = Step().model("standard")
    assert export.states_of(model) == {STATE: NEW_STATE}
