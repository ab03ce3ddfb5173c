"""Every body reads a prompt as the definition does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from gdn_ops.export.model.nodes import check_model
from gdn_ops.export.runtime.comparison import as_array, compare
from onnx_needs import (
    ALL_BODIES,
    BODIES,
    WRITTEN_ONNX_BODY,
    needs_reference_scan,
    skip_without,
)
from onnx_steps import (
    DTYPES,
    RULES,
    STATE,
    Array,
    Step,
    as_prompt,
    assert_right,
    engine_of,
    in_session,
    prompt_feed,
    varied,
)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("body", BODIES)
def test_a_prompt_is_read_token_by_token(body: str, rule: str) -> None:
    step = Step(rule, qk_l2norm=True, B=2, tokens=9)
    tokens, state = step.draw()
    model = step.prefill_model(body)
    check_model(model)
    engine = engine_of(model)
    assert_right(step, tokens, state, as_prompt(engine))
    # No token at all leaves the state as it is.
    none = {name: x[:, :0] for name, x in prompt_feed(tokens).items()}
    o, same = engine.run(None, {**none, STATE: as_array(state)})
    assert o.shape == (2, 0, 4, 6)
    assert np.array_equal(same, as_array(state))

    def in_two_parts(tokens: Any, start: Tensor) -> tuple[list[Array], Array]:
        """Read the first part by one file, the rest by the other, with the state in between."""
        first, middle = as_prompt(engine)(tokens[:5], start)
        rest, last = in_session(step.model(body), body)(tokens[5:], torch.from_numpy(middle))
        return [*first, *rest], last

    assert_right(step, tokens, state, in_two_parts)


@pytest.mark.parametrize("dtype", DTYPES, ids="-".join)
@pytest.mark.parametrize("body", ALL_BODIES)
def test_a_prompt_is_right_in_every_dtype(body: str, dtype: tuple[str, str]) -> None:
    skip_without(body, dtype[1])
    for i, rule in enumerate(RULES):
        step = varied(Step(rule, *dtype, qk_l2norm=i % 2 == 0, has_beta=i != 1), i)
        errors = compare(step.prefill_model(body), body, batch=3, tokens=40)
        assert errors.passed, errors


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "body", [pytest.param("standard", marks=needs_reference_scan), WRITTEN_ONNX_BODY]
)
def test_onnx_reference_reads_a_prompt(body: str, rule: str) -> None:
    step = Step(rule, tokens=5)
    engine = ReferenceEvaluator(step.prefill_model(body))
    assert_right(step, *step.draw(), as_prompt(engine))
