"""A session ends where a text ends, streams what it generates, and speaks where it can."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import exported_models
from exported_models import CHARACTERS, COUNT, greedy, prompts, session
from gdn_ops import export
from onnx_needs import needs_ort_body

FAMILY = "olmo_hybrid-1:1"
"""Its end of a text is token 1."""


@pytest.fixture(scope="module")
def speaker() -> export.ModelSession:
    return export.ModelSession(exported_models.speaking(), threads=1)


def streamed(made: export.ModelSession, *arguments: Any, **options: Any) -> list[list[int]]:
    """Return what a stream yields, by rows."""
    steps = list(made.stream(*arguments, **options))
    assert all(len(step) == len(steps[0]) for step in steps)
    for row in zip(*steps, strict=True):
        # Go on with None alone where a text has ended.
        ended = [token is None for token in row]
        assert ended == sorted(ended)
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def test_a_row_ends_before_its_first_stop_token_and_others_go_on() -> None:
    expected = greedy(FAMILY)
    # The sixth token of the first row, which the second row has later.
    stop = next(token for token in expected[0] if token in expected[1][10:])
    cut = [row[: row.index(stop)] if stop in row else row for row in expected]
    assert len(cut[0]) < len(cut[1])
    made = session(FAMILY)
    assert made.generate(prompts(), COUNT, stop=[stop]) == cut
    assert streamed(made, prompts(), COUNT, stop=(stop,)) == cut
    assert made.generate(prompts(), COUNT, stop=np.array([stop])) == cut


def test_nothing_is_computed_when_all_rows_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    made = session(FAMILY)
    expected = greedy(FAMILY)
    read, calls = export.runtime.text_run.TextRun.read, []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return read(*arguments)

    monkeypatch.setattr(export.runtime.text_run.TextRun, "read", counted)
    stop = [row[3] for row in expected]
    longest = max(min(row.index(token) for token in stop if token in row) for row in expected)
    made.generate(prompts(), COUNT, stop=stop)
    # The prompt, and each token but the last, which ends the last row.
    assert len(calls) == 1 + longest


def test_the_end_of_the_model_is_always_a_stop(tmp_path: Path) -> None:
    tiny = copy.deepcopy(exported_models.model(FAMILY))
    expected = greedy(FAMILY)
    ends = sorted({expected[0][7], expected[1][3]})
    tiny.generation_config.eos_token_id = ends
    made = export.ModelSession(export.export_model(tiny, tmp_path), threads=1)
    assert made.folder.eos == tuple(ends)

    def cut(row: list[int]) -> list[int]:
        first = min((row.index(token) for token in ends if token in row), default=len(row))
        return row[:first]

    assert made.generate(prompts(), COUNT) == [cut(row) for row in expected]
    assert max(len(cut(row)) for row in expected[:2]) < COUNT


def test_a_stream_yields_what_generate_returns(speaker: export.ModelSession) -> None:
    for options in ({}, {"temperature": 1.5, "seed": 3}):
        assert streamed(speaker, prompts(), 32, **options) == speaker.generate(
            prompts(), 32, **options
        )
    assert list(speaker.stream(prompts(), 0)) == []
    assert speaker.generate(prompts(), 0) == [[], [], []]


def test_what_is_returned_has_the_form_of_what_was_given(speaker: export.ModelSession) -> None:
    tokens = speaker.tokenizer.encode("ab")
    added = speaker.generate(tokens, 8)
    assert speaker.generate([tokens], 8) == [added]
    assert speaker.generate(np.array(tokens), 8) == added
    assert speaker.generate(np.array([tokens]), 8) == [added]
    assert speaker.generate([np.array(tokens)], 8) == [added]
    text = speaker.tokenizer.decode(added)
    assert speaker.generate("ab", 8) == text
    assert speaker.generate(["ab"], 8) == [text]
    assert repr(speaker) == "ModelSession(qwen3_5_text, portable, body='ort')".replace(
        "'ort'", repr(speaker.body)
    )


@pytest.mark.parametrize("flavour", ["portable", pytest.param("onnxruntime", marks=needs_ort_body)])
def test_texts_of_different_lengths_are_continued_as_transformers_does(flavour: str) -> None:
    made = export.ModelSession(exported_models.speaking(flavour), threads=1)
    texts = ["one 😀", "a", "é, €."]
    tokenizer, tiny = exported_models.tokenizer(), exported_models.model("qwen3_5-3:1")
    given = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    found = tiny.generate(
        given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=32,
        do_sample=False, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    expected = tokenizer.batch_decode(
        found[:, given["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert made.generate(texts, 32) == expected
    assert len(set(expected)) == 3


def test_pieces_of_text_are_whole_characters(
    speaker: export.ModelSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = speaker.tokenizer.encode(CHARACTERS)
    assert len(tokens) == len(CHARACTERS.encode()) > len(CHARACTERS)

    def steps(*_: Any, **__: Any) -> Iterator[list[int | None]]:
        return iter([[token] for token in tokens])

    monkeypatch.setattr(speaker, "stream", steps)
    assert list(speaker.stream_text("a", 99)) == list(CHARACTERS)
    # Tell what ends within a character, too.
    tokens = tokens[:-1]
    assert "".join(speaker.stream_text("a", 99)) == CHARACTERS[:-1] + "\ufffd"


def test_pieces_of_text_are_the_text(speaker: export.ModelSession) -> None:
    texts = set()
    for seed in range(6):
        options: dict[str, Any] = {"temperature": 2.0, "seed": seed}
        pieces = list(speaker.stream_text("é€", 48, **options))
        text = speaker.generate("é€", 48, **options)
        assert "".join(pieces) == text
        assert all(pieces)
        texts.add(text)
    assert len(texts) == 6
    # Bytes that are no character are among them.
    assert any("\ufffd" in text for text in texts)


def test_a_text_goes_on_from_the_state_of_its_beginning(speaker: export.ModelSession) -> None:
    _, state = speaker.read("one ")
    assert speaker.generate("two", 16, state=state) == speaker.generate("one two", 16)
    assert "".join(speaker.stream_text("two", 16, state=state)) == speaker.generate("one two", 16)
