"""Read requests of `POST /v1/completions`, and write answers in the shape that its clients know."""

from __future__ import annotations

import json
import reprlib
import secrets
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from worker import Piece, Refused

from gdn_ops import SpecError
from gdn_ops.export import ModelSession, TextGeneration, TextPieces

NEUTRAL: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": None,
    "suffix": None,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
}
"""Fields of the interface that are taken where they ask for nothing, with their values then."""

FIELDS = (
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop",
    "stop_token_ids", "stream", "stream_options", "user", *NEUTRAL,
)  # fmt: skip

MOST_STOPS = 4

LARGEST_SEED = 2**31 - 1


@dataclass(frozen=True)
class Limits:
    """Say how large a request may be."""

    prompt_tokens: int = 4096
    max_tokens: int = 1024
    body_bytes: int = 2**20


@dataclass(frozen=True)
class Completion:
    """Hold a request that was found right, and what begins each of its answers."""

    model: str
    generation: TextGeneration
    pieces: TextPieces | None
    is_streamed: bool
    has_usage: bool
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """Return the JSON of a piece, or of a whole answer without its usage."""
        choice = {
            "index": 0,
            "text": piece.text,
            "token_ids": piece.tokens,
            "logprobs": None,
            "finish_reason": piece.reason,
        }
        return self._head([choice])

    def whole(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """Return the JSON of an answer that is not streamed."""
        parts = list(pieces)
        tokens = [token for part in parts for token in part.tokens]
        piece = Piece(tokens, "".join(part.text for part in parts), parts[-1].reason)
        return {**self.chunk(piece), "usage": self.usage(len(tokens))}

    def last(self, count: int) -> dict[str, Any]:
        """Return the JSON behind the last piece, where the client asks for the usage."""
        return {**self._head([]), "usage": self.usage(count)}

    def usage(self, count: int) -> dict[str, int]:
        """Return how many tokens were read and added."""
        read = self.generation.prompt_tokens
        return {"prompt_tokens": read, "completion_tokens": count, "total_tokens": read + count}

    def _head(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": "text_completion", "created": self.created}
        return {**head, "model": self.model, "choices": choices}


def error_of(refused: Refused) -> dict[str, Any]:
    """Return the JSON of an error."""
    kind = "invalid_request_error" if refused.status < 429 else "server_error"
    error = {"message": refused.message, "type": kind, "param": refused.param}
    return {"error": {**error, "code": refused.status}}


def parse(body: bytes, session: ModelSession, model: str, limits: Limits) -> Completion:
    """Read a request.

    Raises:
        Refused: it is no JSON, a field is wrong, or it is larger than a limit.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {error}") from error
    if not isinstance(asked, dict):
        raise Refused(400, f"the body is {_shown(asked)}, should be an object of JSON")
    _check_names(asked, model)
    given = {name: value for name, value in asked.items() if value is not None}
    count = _integer(given, "max_tokens", 16, 1, limits.max_tokens)
    stop = _stop(given, session)
    ends = _integers(given, "stop_token_ids", session)
    options = {
        "temperature": _number(given, "temperature", 1.0),
        "top_p": _number(given, "top_p", 1.0),
        "top_k": _integer(given, "top_k", 0, 0, session.folder.vocabulary),
        "seed": _integer(given, "seed", secrets.randbelow(2**31), 0, LARGEST_SEED),
    }
    is_streamed = _flag(given, "stream")
    extra = given.get("stream_options", {})
    if not isinstance(extra, dict) or not extra.keys() <= {"include_usage"}:
        raise _wrong("stream_options", extra, "an object with include_usage alone")
    prompt = _prompt(given, session)
    if not prompt:
        raise Refused(400, "prompt has no token, should have one or more", "prompt")
    if len(prompt) > limits.prompt_tokens:
        raise Refused(
            400,
            f"prompt has {len(prompt)} tokens, should have at most {limits.prompt_tokens}",
            "prompt",
        )
    try:
        generation = session.begin(prompt, count, stop=ends, **options)
    except SpecError as error:
        # Drop what stands before, the name of a function that the client has not called.
        raise Refused(400, str(error).partition(": ")[2]) from error
    pieces = None if session.tokenizer is None else TextPieces(session.tokenizer, stop)
    return Completion(model, generation, pieces, is_streamed, _flag(extra, "include_usage"))


def _check_names(asked: dict[str, Any], model: str) -> None:
    """Check that there is no field that would have to be left unheeded."""
    for name, value in asked.items():
        if name not in FIELDS:
            raise Refused(400, f"the request has {_shown(name)}, should have {', '.join(FIELDS)}")
        if name in NEUTRAL and value is not None and value != NEUTRAL[name]:
            raise _wrong(name, value, f"{json.dumps(NEUTRAL[name])}: nothing else is supported")
    if asked.get("model") not in (None, model):
        message = f"model is {_shown(asked['model'])}, should be {model!r}"
        raise Refused(404, message, "model")


def _prompt(given: dict[str, Any], session: ModelSession) -> list[int]:
    """Return the tokens of a prompt, which is a text or a list of them."""
    prompt = given.get("prompt")
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return prompt
    if not isinstance(prompt, str):
        raise _wrong("prompt", prompt, "one text or the tokens of one")
    if session.tokenizer is None:
        raise _wrong("prompt", prompt, "tokens: the model has no tokenizer")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise Refused(400, f"prompt is no Unicode: {error}", "prompt") from error
    return session.tokenizer.encode(prompt)


def _stop(given: dict[str, Any], session: ModelSession) -> list[str]:
    """Return the texts that end an answer."""
    stop = given.get("stop", [])
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise _wrong("stop", stop, "a text or a list of texts, none of them empty")
    if len(texts) > MOST_STOPS:
        raise Refused(400, f"stop has {len(texts)} texts, should have at most {MOST_STOPS}", "stop")
    if texts and session.tokenizer is None:
        raise _wrong("stop", stop, "left out, and stop_token_ids given: the model has no tokenizer")
    return texts


def _integers(given: dict[str, Any], name: str, session: ModelSession) -> list[int]:
    values, most = given.get(name, []), session.folder.vocabulary - 1
    if not isinstance(values, list) or not all(
        type(value) is int and 0 <= value <= most for value in values
    ):
        raise _wrong(name, values, f"a list of tokens in [0, {most}]")
    return values


def _integer(given: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = given.get(name, default)
    if type(value) is not int:
        raise _wrong(name, value, "an integer")
    if not least <= value <= most:
        raise _wrong(name, value, f"at least {least}" if value < least else f"at most {most}")
    return value


def _number(given: dict[str, Any], name: str, default: float) -> float:
    value = given.get(name, default)
    if type(value) not in (int, float):
        raise _wrong(name, value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise _wrong(name, value, "a number that a double holds") from None


def _flag(given: dict[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if type(value) is not bool:
        raise _wrong(name, value, "true or false")
    return value


def _wrong(name: str, value: Any, should: str) -> Refused:
    return Refused(400, f"{name} is {_shown(value)}, should be {should}", name)


def _shown(value: Any) -> str:
    """Return a value as a client would write it, short."""
    if isinstance(value, str | list | dict):
        return reprlib.repr(value)
    return json.dumps(value)
