"""A generation can be advanced call by call, beside others, and closed at any time."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from errors import refusal
from gdn_ops.export.runtime import text_run
from gdn_ops.export.runtime.model_session import ModelSession
from served_models import export_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("exported") / "tiny")


@pytest.fixture(scope="module")
def session(folder: Path) -> ModelSession:
    return ModelSession(folder, threads=1, prompt_chunk=4)


PROMPT = list(range(10, 20))


def test_each_call_reads_a_piece_of_the_prompt_or_adds_a_token(session: ModelSession) -> None:
    generation = session.begin(PROMPT, 5)
    steps = []
    while not generation.is_done:
        steps.append((generation.is_reading, generation.advance()))
    expected = [[token] for token in session.generate(PROMPT, 5)]
    # Ten tokens by four: the third call reads the last two, and adds a token.
    assert steps == [
        (True, []),
        (True, []),
        (True, expected[0]),
        *((False, x) for x in expected[1:]),
    ]
    assert generation.prompt_tokens == 10
    assert generation.reasons == ["length"]
    assert generation.advance() == []


def test_generations_that_take_turns_are_as_each_is_alone(session: ModelSession) -> None:
    prompts = [[n, n + 1, *range(n)] for n in range(1, 20, 3)]
    options: list[dict[str, Any]] = [
        {"temperature": n % 3 * 0.5, "seed": n, "top_k": n % 2 * 9} for n in range(len(prompts))
    ]
    pairs = list(zip(prompts, options, strict=True))
    begun = [session.begin(prompt, 12, **more) for prompt, more in pairs]
    found: list[list[int | None]] = [[] for _ in prompts]
    while not all(generation.is_done for generation in begun):
        for tokens, generation in zip(found, begun, strict=True):
            tokens += generation.advance()
    assert found == [session.generate(prompt, 12, **more) for prompt, more in pairs]
    assert len({tuple(tokens) for tokens in found}) == len(prompts)


def test_reasons_say_which_text_has_ended_and_why(session: ModelSession) -> None:
    rows = session.generate([PROMPT, PROMPT[:3]], 6)
    stop = next(token for token in rows[0] if token not in rows[1])
    at = rows[0].index(stop)
    generation = session.begin([PROMPT, PROMPT[:3]], 6, stop=[stop])
    assert generation.reasons == [None, None]
    steps = list(generation)
    assert [step[0] for step in steps] == [*rows[0][:at], *[None] * (6 - at)]
    assert [step[1] for step in steps] == rows[1]
    assert generation.reasons == ["stop", "length"]


def test_a_generation_of_no_token_is_done_at_once(session: ModelSession) -> None:
    generation = session.begin(PROMPT, 0)
    assert generation.is_done
    assert not generation.is_reading
    assert list(generation) == []
    assert generation.reasons == ["length"]


@pytest.mark.parametrize("how", ["closed", "left", "ended", "failed"])
def test_states_are_freed_when_a_generation_ends(
    session: ModelSession, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[text_run.TextRun]] = []
    init = text_run.TextRun.__init__

    def noted(run: text_run.TextRun, *arguments: Any) -> None:
        init(run, *arguments)
        made.append(weakref.ref(run))

    monkeypatch.setattr(text_run.TextRun, "__init__", noted)
    generation = session.begin(PROMPT, 3)
    assert made == []
    generation.advance()
    (run,) = made
    assert run() is not None
    if how == "closed":
        generation.close()
        assert generation.advance() == []
    elif how == "left":
        steps = iter(generation)
        next(steps)
        del steps
    elif how == "ended":
        assert len(list(generation)) == 3
    else:
        monkeypatch.setattr(text_run.TextRun, "read", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generation.advance()
    gc.collect()
    assert generation.is_done
    assert run() is None


def test_what_generate_refuses_is_refused_before_anything_runs(session: ModelSession) -> None:
    for prompt, count, options in (
        ([], 1, {}),
        ([999], 1, {}),
        ([1], -1, {}),
        ([1], 1, {"top_p": 2}),
    ):
        found = refusal(session.begin, prompt, count, **options)
        assert found == refusal(session.generate, prompt, count, **options)
    message = refusal(ModelSession, "anywhere", prompt_chunk=0)
    assert message == "ModelSession: prompt_chunk is 0, should be at least 1"


def test_pieces_of_a_prompt_change_nothing_but_roundings(
    session: ModelSession, folder: Path
) -> None:
    other = ModelSession(folder, threads=1, prompt_chunk=3)
    assert other.generate(PROMPT, 20) == session.generate(PROMPT, 20)
