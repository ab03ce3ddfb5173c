"""Every body computes what the definition does, for every rule, dtype and shape."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from gdn_ops import export
from gdn_ops.export.model.nodes import check_model
from gdn_ops.export.runtime.sessions import why_not
from onnx_needs import (
    ALL_BODIES,
    BODIES,
    WRITTEN_ONNX_BODY,
    at_opset,
    reference_has_bfloat16,
    skip_without,
)
from onnx_steps import (
    DTYPES,
    HEADS,
    RULES,
    SCALES,
    Step,
    assert_right,
    engine_of,
    in_engine,
    in_session,
    varied,
)
from processes import printed


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
    skip_without(body, dtype[1])
    step = steps_of(dtype, rule)
    assert_right(step, *step.draw(), in_session(step.model(body), body))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids="-".join)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("body", ALL_BODIES)
def test_a_body_is_the_definition_for_all_heads_and_scales(
    body: str, rule: str, dtype: tuple[str, str]
) -> None:
    skip_without(body, dtype[1])
    flags = itertools.product((False, True), repeat=2)
    for heads, scale, (l2norm, has_beta) in itertools.product(HEADS, SCALES, flags):
        for K, V in ((8, 6), (5, 12)):
            step = Step(rule, *dtype, *heads, K, V, 2, scale, l2norm, has_beta)
            assert_right(step, *step.draw(), in_session(step.model(body), body))


@pytest.mark.parametrize("dtype", DTYPES, ids="-".join)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("body", ["standard", WRITTEN_ONNX_BODY])
def test_onnx_reference_runs_a_body(body: str, rule: str, dtype: tuple[str, str]) -> None:
    skip_without(body, dtype[1])
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
    engine = engine_of(model)
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
    result = printed(RUN_ONNX_BODY, ALLOW_RELEASED_ONNX_OPSET_ONLY="0")
    if not result:
        pytest.skip(why_not("onnx"))
    assert result == f"ran {len(RULES)}"


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
    runs = (run(tokens, start), *(step.run(tokens, start, wide=wide) for wide in (False, True)))
    triples = zip(*((*outputs, state) for outputs, state in runs), strict=True)
    size = max([1.0, *(float(x["v"].abs().max()) for x in tokens if x["v"].numel())])
    if start.numel():
        size = max(size, float(start.abs().max())) * (1 + step.K) * len(tokens)
    for computed, own, exact in triples:
        if not computed.size:
            assert computed.shape == tuple(exact.shape)
            continue
        error = np.abs(computed - exact.numpy()).max()
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


def test_a_scale_of_zero_is_zero_in_the_standard_body() -> None:
    step = Step(scale=0.0, tokens=1)
    (token,), state = step.draw()
    (o,), _ = in_session(step.model("standard"), "standard")([token], state)
    assert np.array_equal(o, np.zeros_like(o))
