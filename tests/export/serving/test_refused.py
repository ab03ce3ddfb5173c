"""Refuse what is past a limit, by value and limit; end in good order at a signal."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from errors import message_of
from gdn_ops.export.runtime.model_session import ModelSession
from paths import ROOT
from processes import python
from served_models import Served, events, export_tiny, until

pytest.importorskip("starlette", reason="the example needs starlette")
pytest.importorskip("uvicorn", reason="the example needs uvicorn")

LONG = 10**5
"""Tokens of an answer that no test waits for."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    limits = ("--prompt-tokens", 20, "--max-tokens", LONG, "--body-bytes", 500)
    server = Served(folder, "--running", 1, "--waiting", 1, *limits)
    try:
        yield server.wait()
    finally:
        server.kill()


@pytest.fixture(scope="module", autouse=True)
def _still_right(served: Served, folder: Path) -> Iterator[None]:
    """Check behind all refusals that the server still answers, and rightly."""
    yield
    _, answer = served.complete(prompt=[5, 6, 7], max_tokens=9, temperature=0)
    assert answer["choices"][0]["token_ids"] == ModelSession(folder).generate([5, 6, 7], 9)
    assert served.counts() == (0, 0)


PROMPT = {"prompt": [1, 2, 3]}
REFUSED: list[tuple[int, Any, str]] = [
    (400, {"prompt": [1] * 21}, "prompt has 21 tokens, should have at most 20"),
    (400, {"prompt": "é" * 11}, "prompt has 22 tokens, should have at most 20"),
    (400, {"prompt": []}, "prompt has no token, should have one or more"),
    (400, {"prompt": ""}, "prompt has no token, should have one or more"),
    (400, {"prompt": [1, 257]}, "a prompt has token 257, should have tokens in [0, 256]"),
    (400, {"prompt": [1, -1]}, "a prompt has token -1, should have tokens in [0, 256]"),
    (400, {"prompt": [1, True]}, "prompt is [1, True], should be one text or the tokens of one"),
    (400, {"prompt": ["a", "b"]}, "prompt is ['a', 'b'], should be one text or the tokens of one"),
    (400, {"prompt": 7}, "prompt is 7, should be one text or the tokens of one"),
    (400, {}, "prompt is null, should be one text or the tokens of one"),
    (
        400,
        {"prompt": "\ud800"},
        "prompt is no Unicode: 'utf-8' codec can't encode character '\\ud800' in position 0: "
        "surrogates not allowed",
    ),
    (400, {**PROMPT, "max_tokens": LONG + 1}, "max_tokens is 100001, should be at most 100000"),
    (400, {**PROMPT, "max_tokens": 0}, "max_tokens is 0, should be at least 1"),
    (400, {**PROMPT, "max_tokens": 2.5}, "max_tokens is 2.5, should be an integer"),
    (400, {**PROMPT, "max_tokens": True}, "max_tokens is true, should be an integer"),
    (400, {**PROMPT, "temperature": -1}, "temperature is -1.0, should be 0 or more"),
    (400, {**PROMPT, "temperature": float("nan")}, "temperature is nan, should be 0 or more"),
    (400, {**PROMPT, "temperature": "hot"}, "temperature is 'hot', should be a number"),
    (400, {**PROMPT, "top_p": 0}, "top_p is 0.0, should be above 0 and at most 1"),
    (400, {**PROMPT, "top_k": 258}, "top_k is 258, should be at most 257"),
    (400, {**PROMPT, "seed": -4}, "seed is -4, should be at least 0"),
    (400, {**PROMPT, "stream": 1}, "stream is 1, should be true or false"),
    (
        400,
        {**PROMPT, "stream_options": {"include": 1}},
        "stream_options is {'include': 1}, should be an object with include_usage alone",
    ),
    (400, {**PROMPT, "stop": [""]}, "stop is [''], should be a text or a list of texts, none of "
     "them empty"),
    (400, {**PROMPT, "stop": list("abcde")}, "stop has 5 texts, should have at most 4"),
    (
        400,
        {**PROMPT, "stop_token_ids": [300]},
        "stop_token_ids is [300], should be a list of tokens in [0, 256]",
    ),
    (400, {**PROMPT, "n": 2}, "n is 2, should be 1: nothing else is supported"),
    (400, {**PROMPT, "echo": True}, "echo is true, should be false: nothing else is supported"),
    (404, {**PROMPT, "model": "other"}, "model is 'other', should be 'tiny'"),
    (400, [1, 2], "the body is [1, 2], should be an object of JSON"),
    (400, b"{", "the body is no JSON: Expecting property name enclosed in double quotes: line 1 "
     "column 2 (char 1)"),
    (413, b"x" * 501, "the body has 501 bytes in all, should have at most 500"),
    (413, b"x" * 8000, "the body has 8000 bytes in all, should have at most 500"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "message"), REFUSED)
def test_a_request_that_is_wrong_or_too_large_is_refused_by_name(
    served: Served, status: int, body: Any, message: str
) -> None:
    assert served.refusal(body) == (status, message)


def test_a_field_that_is_not_known_is_refused_with_those_that_are(served: Served) -> None:
    status, message = served.refusal({**PROMPT, "max_token": 3})
    assert status == 400
    assert message.startswith("the request has 'max_token', should have model, prompt, max_tokens,")


def test_fields_that_ask_for_nothing_are_taken(served: Served) -> None:
    nothing = {"n": 1, "echo": False, "logprobs": None, "presence_penalty": 0, "user": "me"}
    status, answer = served.complete(**PROMPT, **nothing, model="tiny", seed=None)
    assert status == 200
    assert answer["usage"]["completion_tokens"] <= 16


def test_a_body_without_end_is_read_to_16_times_the_limit(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as client:
        head = "POST /v1/completions HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.sendall(head.encode())
        for _ in range(9):
            client.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        answer = http.client.HTTPResponse(client)
        answer.begin()
        error = json.loads(answer.read())["error"]
        assert answer.status == 413
        assert answer.headers["connection"] == "close"
        start, _, end = error["message"].partition(" bytes ")
        assert 8000 < int(start.removeprefix("the body has ")) <= 9000
        assert end == "or more, should have at most 500"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)],
)
def test_what_is_not_served_is_refused_with_what_is(
    served: Served, method: str, path: str, status: int
) -> None:
    found, answer = served.ask(method, path)
    assert found == status
    assert answer["error"]["message"] == (
        f"{method} {path} is not served, should be POST /v1/completions, GET /v1/models or /health"
    )


def test_a_server_that_is_full_refuses_and_then_answers(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        for counts in ((1, 0), (1, 1)):
            stream = served.open_stream(**PROMPT, max_tokens=LONG)
            stack.callback(stream.close)
            until(lambda counts=counts: served.counts() == counts)
        full = served.send("POST", "/v1/completions", PROMPT)
        stack.callback(full.close)
        answer = full.getresponse()
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        error = json.loads(answer.read())["error"]
        assert error["message"] == (
            "the server is full: 1 of 1 requests run and 1 of 1 wait; try again later"
        )
        assert error["type"] == "server_error"
    until(lambda: served.counts() == (0, 0))
    assert served.complete(**PROMPT)[0] == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end_and_takes_no_more(folder: Path, number: signal.Signals) -> None:
    server = Served(folder, "--max-tokens", LONG)
    try:
        with contextlib.closing(server.wait().open_stream(**PROMPT, max_tokens=1000)) as stream:
            pieces = events(stream.getresponse())
            count = len(next(pieces)["choices"][0]["token_ids"])
            server.process.send_signal(number)
            until(lambda: is_closed(server.port))
            *pieces_after, done = pieces
        assert done == "[DONE]"
        count += sum(len(piece["choices"][0]["token_ids"]) for piece in pieces_after)
        assert count == 1000
        assert server.rest() == "ended\n"
        assert server.process.returncode == 0
    finally:
        server.kill()


def test_answers_that_take_longer_than_the_grace_are_ended_with_a_message(folder: Path) -> None:
    server = Served(folder, "--max-tokens", LONG, "--grace", 0.2)
    try:
        server.wait()
        fields = {**PROMPT, "max_tokens": LONG}
        with (
            contextlib.closing(server.send("POST", "/v1/completions", fields)) as whole,
            contextlib.closing(server.open_stream(**fields)) as stream,
        ):
            until(lambda: server.counts() == (2, 0))
            server.process.terminate()
            *_, last = events(stream.getresponse())
            assert last["error"]["message"] == "the server is ending"
            answer = whole.getresponse()
            assert answer.status == 503
            assert json.loads(answer.read()) == last
        assert server.rest() == "ended\n"
        assert server.process.returncode == 0
    finally:
        server.kill()


def is_closed(port: int) -> bool:
    """Return whether nothing listens on a port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except ConnectionError:
        return True
    return False


def test_the_page_has_every_limit_with_its_default() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(--[a-z-]+)` \| (\S+) \|", page, re.MULTILINE))
    usage = python("examples/serve_onnx", "--help", COLUMNS="200")
    assert usage.returncode == 0
    defaults = re.findall(r"^  (--[a-z-]+) .*\(default: (\S+)\)$", usage.stdout, re.MULTILINE)
    assert rows.items() <= dict(defaults).items()
    assert {"--prompt-tokens", "--max-tokens", "--body-bytes", "--running", "--waiting"} < set(rows)
    assert dict(defaults)["--prompt-chunk"] in page


def test_a_folder_that_is_no_model_ends_the_command_with_one_line(tmp_path: Path) -> None:
    done = python("examples/serve_onnx", tmp_path)
    assert done.returncode == 1
    message = message_of(ValueError, ModelSession, tmp_path)
    assert done.stderr == f"serve_onnx: {message}\n"
    assert done.stdout == ""
