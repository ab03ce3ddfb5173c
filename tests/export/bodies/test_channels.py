"""Every body takes a decay of every key channel, and computes what the definition does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from gdn_ops import export
from gdn_ops.export.model.nodes import check_model
from gdn_ops.export.runtime.comparison import as_array
from onnx_needs import ALL_BODIES, WRITTEN_ONNX_BODY, needs_reference_scan, skip_without
from onnx_steps import (
    DTYPES,
    NEW_STATE,
    STATE,
    Step,
    as_prompt,
    assert_right,
    engine_of,
    in_engine,
    in_session,
    prompt_feed,
    rounding,
)

RULES = ("gated_delta", "gated")
SHAPES = ((1, 1, 8, 6), (2, 4, 5, 12), (2, 6, 16, 3), (3, 3, 1, 4))
"""H, HV, K and V."""


def channel_steps(dtype: tuple[str, str], **options: Any) -> list[Step]:
    """Return steps of all shapes, which take turns in rules, beta and norms."""
    return [
        Step(
            RULES[i % 2], *dtype, H=H, HV=HV, K=K, V=V,
            scale=(1.0, 0.3, None)[i % 3], qk_l2norm=K > 1 and i % 2 == 1, has_beta=i != 2,
            seed=i, decay="channel", **options,
        )
        for i, (H, HV, K, V) in enumerate(SHAPES)
    ]  # fmt: skip


def worst_head(computed: Any, exact: Tensor) -> float:
    """Return the largest error of a head (B, HV), over the norm of what is right there."""
    error = torch.from_numpy(np.asarray(computed, np.float64)) - exact.double()
    sizes = exact.double().flatten(2).norm(dim=2)
    return float((error.flatten(2).norm(dim=2) / sizes.clamp(min=1e-30)).max())


def assert_heads_right(step: Step, tokens: Any, start: Tensor, run: Any) -> None:
    """Compare the last token and the state head by head with the definition in float64."""
    exact_o, exact_state = step.run(tokens, start, wide=True)
    own_o, own_state = step.run(tokens, start, wide=False)
    found_o, found_state = run(tokens, start)
    least = step.K * rounding("float64" if step.dtype == "float64" else "float32")
    for found, own, exact, dtype in (
        (found_o[-1], own_o[-1], exact_o[-1], step.dtype),
        (found_state, own_state, exact_state, step.state_dtype),
    ):
        allowed = 2 * worst_head(own.double(), exact) + 4 * rounding(dtype) + 4 * least
        assert worst_head(found, exact) <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids="-".join)
@pytest.mark.parametrize("body", ALL_BODIES)
def test_every_head_of_every_body_is_right(body: str, dtype: tuple[str, str]) -> None:
    skip_without(body, dtype[1])
    for step in channel_steps(dtype, tokens=12):
        model = step.model(body)
        check_model(model)
        assert_right(step, *step.draw(), in_session(model, body))
        assert_heads_right(step, *step.draw(), in_session(model, body))


@pytest.mark.parametrize("body", ALL_BODIES)
def test_a_prompt_is_read_token_by_token(body: str) -> None:
    for step in channel_steps(("float32", "float32"), tokens=9):
        tokens, start = step.draw()
        engine = engine_of(step.prefill_model(body))
        assert_right(step, tokens, start, as_prompt(engine))
        assert_heads_right(step, tokens, start, as_prompt(engine))
        if body == "onnx":
            continue
        # No token at all leaves the state as it is.
        none = {name: x[:, :0] for name, x in prompt_feed(tokens).items()}
        assert np.array_equal(engine.run(None, {**none, STATE: as_array(start)})[1], start)


@pytest.mark.parametrize(
    "body", [pytest.param("standard", marks=needs_reference_scan), WRITTEN_ONNX_BODY]
)
def test_onnx_reference_runs_a_body(body: str) -> None:
    for step in channel_steps(("float32", "float32"), tokens=5)[1:3]:
        for engine, run in ((step.model(body), in_engine), (step.prefill_model(body), as_prompt)):
            assert_right(step, *step.draw(), run(ReferenceEvaluator(engine)))


@pytest.mark.parametrize("body", ALL_BODIES)
def test_a_reset_channel_forgets_exactly_what_it_held(body: str) -> None:
    step = Step(K=5, V=12, tokens=7, decay="channel")
    tokens, start = step.draw()
    for token in tokens:
        token["log_alpha"] = token["log_alpha"].clamp(min=-1)
    # Channel 3 of all heads, channel 0 of head 1: at the first token, and at one behind it.
    tokens[0]["log_alpha"][:, :, 3] = -np.inf
    tokens[2]["log_alpha"][:, 1, 0] = -np.inf
    changed = start.clone()
    changed[:, :, 3] = 1e30
    for model, run in ((step.model(body), None), (step.prefill_model(body), as_prompt)):
        runner = in_session(model, body) if run is None else run(engine_of(model))
        (o, state), (other_o, other_state) = (runner(tokens, x) for x in (start, changed))
        assert np.isfinite(state).all()
        assert np.array_equal(np.stack(o), np.stack(other_o))
        assert np.array_equal(state, other_state)
        assert_heads_right(step, tokens, start, runner)


@pytest.mark.parametrize("body", ALL_BODIES)
def test_strong_decays_of_single_channels_are_right_and_finite(body: str) -> None:
    step = Step(K=5, V=6, tokens=40, decay="channel")
    tokens, start = step.draw()
    for t, token in enumerate(tokens):
        for channel, value in enumerate((-np.inf, -1e4, -90.0, -20.0, 0.0)):
            if (t + channel) % 3:
                token["log_alpha"][:, :, channel] = value
    assert_heads_right(step, tokens, start, in_session(step.model(body), body))


@pytest.mark.parametrize("body", ALL_BODIES)
def test_equal_channels_are_the_decay_of_a_head(body: str) -> None:
    step = Step(tokens=6)
    tokens, start = step.draw()
    wide = [dict(token) for token in tokens]
    for token in wide:
        token["log_alpha"] = token["log_alpha"].unsqueeze(-1).repeat(1, 1, step.K)
    channels = replace(step, decay="channel")
    found = in_session(channels.model(body), body)(wide, start)
    same = in_session(step.model(body), body)(tokens, start)
    assert np.allclose(np.stack(found[0]), np.stack(same[0]), rtol=1e-5, atol=1e-6)
    assert np.allclose(found[1], same[1], rtol=1e-5, atol=1e-6)


def test_one_file_serves_every_batch() -> None:
    for body in ("standard", "ort"):
        if body not in export.available_bodies():
            continue
        engine = engine_of(Step(decay="channel").model(body))
        for batch in (0, 1, 3):
            step = Step(B=batch, tokens=3, seed=batch, decay="channel")
            assert_right(step, *step.draw(), in_engine(engine))


@pytest.mark.parametrize("body", ["standard", "ort"])
def test_a_batch_that_does_not_match_is_an_error(body: str) -> None:
    if body not in export.available_bodies():
        pytest.skip(f"body {body!r} does not run")
    step = Step(B=3, tokens=1, decay="channel")
    (token,), start = step.draw()
    feeds = {name: as_array(x) for name, x in token.items()} | {STATE: as_array(start)}
    feeds["log_alpha"] = feeds["log_alpha"][:1]
    with pytest.raises(Exception, match="cannot be reshaped to the requested shape"):
        engine_of(step.model(body)).run(None, feeds)


def test_a_model_says_that_its_decay_is_of_channels() -> None:
    model = Step(decay="channel").model("standard")
    (node,) = export.nodes_of(model)
    assert node.variant.decay == "channel"
    assert node.variant.overload == "gated_delta_channel_decay_beta_float"
    assert "decay" in model.functions[0].attribute
    sizes = [d.dim_param or d.dim_value for d in model.graph.input[3].type.tensor_type.shape.dim]
    assert sizes == ["batch", 4, 8]
    assert export.states_of(model) == {STATE: NEW_STATE}
    there_and_back = export.set_body(export.set_body(model, "ort"), "standard")
    assert there_and_back.SerializeToString() == model.SerializeToString()
