"""Every body reads a prompt as the definition does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx.reference import ReferenceEvaluator  # noqa: E402

from gdn_ops import export  # noqa: E402
from gdn_ops.export.model.opsets import check_model  # noqa: E402
from gdn_ops.export.runtime.comparison import compare  # noqa: E402
from onnx_needs import (  # noqa: E402
    ALL_BODIES,
    BODIES,
    WRITTEN_ONNX_BODY,
    at_opset,
    needs_onnx_body,
    needs_reference_scan,
    opset_for,
    skip_without,
)
from onnx_steps import DTYPES, RULES, STATE, Step, feed, to_numpy, varied  # noqa: E402


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
    skip_without(body, dtype[1])
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
@pytest.mark.parametrize(
    "body",
    [
        pytest.param("standard", marks=needs_reference_scan),
        WRITTEN_ONNX_BODY,
    ],
)
def test_onnx_reference_reads_a_prompt(body: str, rule: str) -> None:
    step = Step(rule, tokens=5)
    tokens, state = step.draw()
    feeds = {name: np.stack([feed(token)[name] for token in tokens], 1) for name in feed(tokens[0])}
    exact_o, exact_state = step.run(tokens, state, wide=True)
    model = export.make_prefill_model(**step.options(), body=body, opset=opset_for(body))
    o, new = ReferenceEvaluator(model).run(None, {**feeds, STATE: to_numpy(state)})
    assert np.abs(o - np.stack([x.numpy() for x in exact_o], 1)).max() < 2e-6
    assert np.abs(new - exact_state.numpy()).max() < 2e-6
