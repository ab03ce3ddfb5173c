"""An exported model adds the tokens that transformers adds, however prompts are read."""

from __future__ import annotations

import numpy as np
import pytest

import compat_models
import exported_models
from exported_models import COUNT, FAMILIES, FLAVOURS, LENGTHS, greedy, prompts, session
from gdn_ops.export.runtime import model_session
from onnx_needs import BODIES, at_opset, needs_ort_body

ORT = pytest.param("onnxruntime", marks=needs_ort_body)
ALL_FLAVOURS = ("portable", ORT)


# Lara-Mini with drawn weights repeats one token for ever: its logits are compared alone.
@pytest.mark.parametrize("family", FAMILIES[:-1])
@pytest.mark.parametrize("flavour", ALL_FLAVOURS)
@pytest.mark.parametrize("body", BODIES)
def test_greedy_tokens_are_those_of_transformers(body: str, flavour: str, family: str) -> None:
    expected = greedy(family)
    # Rows do not repeat a token for ever, nor one another.
    assert min(len(set(row)) for row in expected) > 10
    assert len({tuple(row) for row in expected}) == len(LENGTHS)
    made = session(family, flavour, body)
    assert made.body == body
    assert made.generate(prompts(), COUNT) == expected
    assert made.generate(prompts()[0], COUNT) == expected[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("flavour", ALL_FLAVOURS)
def test_logits_behind_every_token_are_those_of_the_model(flavour: str, family: str) -> None:
    ids, mask = exported_models.padded(prompts())
    expected = compat_models.run(exported_models.model(family), ids, attention_mask=mask).numpy()
    found, state = session(family, flavour, logits="all").read(prompts())
    assert found.shape == expected.shape
    assert state.mask.tolist() == mask.tolist()
    is_token = mask.numpy() == 1
    difference = np.abs(found - expected)[is_token].max()
    assert difference <= 2e-5 * np.abs(expected).max()
    # And the last of them are all that the other graph returns.
    last, _ = session(family, flavour).read(prompts())
    assert np.abs(last - expected[:, -1]).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("chunk", [1, 3, 4])
@pytest.mark.parametrize("flavour", ALL_FLAVOURS)
@pytest.mark.parametrize("family", ["qwen3_next-2:1", "olmo_hybrid-1:1"])
def test_prompts_that_are_read_in_chunks_add_the_same_tokens(
    family: str, flavour: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_session, "CHUNK", chunk)
    # Whole chunks of the shortest prompt are padding.
    assert session(family, flavour).generate(prompts(), COUNT) == greedy(family)


@pytest.mark.parametrize("flavour", ALL_FLAVOURS)
@pytest.mark.parametrize("family", ["qwen3_5-3:1", "qwen3_5_moe-2:1", "olmo_hybrid-1:1"])
def test_rows_that_go_on_from_states_read_several_tokens(family: str, flavour: str) -> None:
    made = session(family, flavour)
    more = [row[:4] for row in prompts((6, 7, 8))]
    logits, state = made.read(prompts())
    logits, state = made.read(more, state)
    whole, _ = made.read([[*a, *b] for a, b in zip(prompts(), more, strict=True)])
    assert state.rows == 3
    assert state.tokens == max(LENGTHS) + 4
    assert np.abs(logits - whole).max() <= 2e-5 * np.abs(whole).max()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_row_of_a_batch_is_what_it_is_alone(flavour: str) -> None:
    made = session("qwen3_5-3:1", flavour)
    together, _ = made.read(prompts())
    for row, prompt in zip(together, prompts(), strict=True):
        (alone,), _ = made.read([prompt])
        assert np.abs(row - alone).max() <= 2e-5 * np.abs(alone).max()


@pytest.mark.parametrize("flavour", ALL_FLAVOURS)
@pytest.mark.parametrize("opset", [18, at_opset(23, opset=23)])
def test_every_opset_adds_the_same_tokens(opset: int, flavour: str) -> None:
    made = session("qwen3_next-2:1", flavour, opset=opset)
    assert made.generate(prompts(), COUNT) == greedy("qwen3_next-2:1")
