"""Many clients at once: every answer is the one that its prompt has alone, and nothing is left."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gdn_ops.export.runtime.model_session import ModelSession
from served_models import Served, events, export_tiny, until

pytest.importorskip("starlette", reason="the example needs starlette")
pytest.importorskip("uvicorn", reason="the example needs uvicorn")

CHUNK, CLIENTS, HALF = 16, 16, 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    options = ("--running", 5, "--max-tokens", 10**5, "--prompt-chunk", CHUNK)
    server = Served(folder, *options)
    try:
        yield server.wait()
    finally:
        server.kill()


@pytest.fixture(scope="module")
def alone(folder: Path) -> ModelSession:
    return ModelSession(folder, threads=1, prompt_chunk=CHUNK)


def drawn(number: int) -> dict[str, Any]:
    """Return the fields of a request: prompts of 1 to 80 tokens, answers of 1 to 30."""
    draw = np.random.default_rng(number)
    prompt: Any = draw.integers(0, 256, draw.integers(1, 81)).tolist()
    if number % 3 == 0:
        prompt = "".join(map(chr, draw.integers(32, 500, draw.integers(1, 30))))
    return {
        "prompt": prompt,
        "max_tokens": int(draw.integers(1, 31)),
        "temperature": (0, 0.5, 1.0)[int(draw.integers(3))],
        "top_p": (1.0, 0.9)[int(draw.integers(2))],
        "top_k": int(draw.integers(2)) * 20,
        "seed": number,
        "stop_token_ids": draw.integers(0, 256, draw.integers(0, 20)).tolist(),
    }


def answered(served: Served, number: int) -> tuple[list[int], str, str]:
    """Return tokens, text and reason of an answer: odd ones are streamed."""
    fields = drawn(number)
    if number % 2 == 0:
        status, answer = served.complete(**fields)
        assert status == 200, answer
        (choice,) = answer["choices"]
        read = len(fields["prompt"]) if isinstance(fields["prompt"], list) else None
        assert read in (None, answer["usage"]["prompt_tokens"])
        assert answer["usage"]["completion_tokens"] == len(choice["token_ids"])
        return choice["token_ids"], choice["text"], choice["finish_reason"]
    with contextlib.closing(served.open_stream(**fields)) as connection:
        answer = connection.getresponse()
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        *pieces, done = events(answer)
    assert done == "[DONE]"
    choices = [piece["choices"][0] for piece in pieces]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert len({piece["id"] for piece in pieces}) == 1
    tokens = [token for choice in choices for token in choice["token_ids"]]
    return tokens, "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


def expected(alone: ModelSession, number: int) -> tuple[list[int], str, str]:
    fields = drawn(number)
    count, prompt = fields.pop("max_tokens"), fields.pop("prompt")
    assert alone.tokenizer is not None
    tokens = alone.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    added = alone.generate(tokens, count, stop=fields.pop("stop_token_ids"), **fields)
    return added, alone.tokenizer.decode(added), "length" if len(added) == count else "stop"


def test_200_requests_from_16_clients_are_answered_as_each_is_alone(
    served: Served, alone: ModelSession
) -> None:
    memory = []
    with ThreadPoolExecutor(CLIENTS) as clients:
        for start in (0, HALF):
            numbers = range(start, start + HALF)
            found = list(clients.map(lambda number: answered(served, number), numbers))
            memory.append(served.resident())
            wanted = [expected(alone, number) for number in numbers]
            assert found == wanted
            reasons = [reason for _, _, reason in found]
            assert min(reasons.count("stop"), reasons.count("length")) > HALF // 10
    assert served.counts() == (0, 0)
    # 16 clients at once, 5 at a time: nothing of a request stays behind.
    assert memory[1] - memory[0] < 2 * 2**20, memory


def test_a_text_that_ends_an_answer_is_not_told_in_pieces_nor_whole(
    served: Served, alone: ModelSession
) -> None:
    text = alone.generate("stop", 60, seed=3, temperature=1.0)
    stop = text[20:24]
    at = text.index(stop)
    fields = {"prompt": "stop", "max_tokens": 60, "seed": 3, "stop": ["never comes", stop]}
    _, answer = served.complete(**fields)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text[:at], "stop")
    assert len(choice["token_ids"]) < 60
    usage = {"stream_options": {"include_usage": True}}
    with contextlib.closing(served.open_stream(**fields, **usage)) as connection:
        *pieces, last, _ = events(connection.getresponse())
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == text[:at]
    assert last["choices"] == []
    assert last["usage"] == answer["usage"]


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_goes_away_frees_its_place(
    served: Served, alone: ModelSession, is_streamed: bool
) -> None:
    """The answer of 100 000 tokens would take minutes."""
    fields = {"prompt": [1, 2, 3], "max_tokens": 10**5, "stream": is_streamed}
    gone = []
    for count in range(1, 8):
        gone.append(served.send("POST", "/v1/completions", fields))
        until(lambda count=count: served.counts() == (min(count, 5), max(count - 5, 0)))
    if is_streamed:
        # Five are answered, and have told something.
        for connection in gone[:5]:
            piece = next(events(connection.getresponse()))
            assert piece["choices"][0]["token_ids"]
    for connection in gone:
        connection.close()
    until(lambda: served.counts() == (0, 0))
    assert answered(served, 7) == expected(alone, 7)


def test_health_says_what_is_served(served: Served, alone: ModelSession) -> None:
    status, health = served.ask("GET", "/health")
    assert status == 200
    assert health == {
        "status": "ok",
        "model": "tiny",
        "architecture": alone.folder.architecture,
        "flavour": "portable",
        "body": alone.body,
        "running": 0,
        "waiting": 0,
        "limits": {
            "prompt_tokens": 4096,
            "max_tokens": 10**5,
            "body_bytes": 2**20,
            "running": 5,
            "waiting": 32,
        },
    }
    status, models = served.ask("GET", "/v1/models")
    assert [model["id"] for model in models["data"]] == ["tiny"]
    assert json.dumps(models).count("tiny") == 1
