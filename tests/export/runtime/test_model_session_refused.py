"""A session names what is wrong with a folder, its files or what it is asked to continue."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import exported_models
from errors import message_of, refusal
from exported_models import exported, session
from gdn_ops import SpecTypeError
from gdn_ops.export import ModelSession
from gdn_ops.export.runtime import sessions

FAMILY = "qwen3_5-3:1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder that a test may change."""
    return shutil.copytree(exported(FAMILY), tmp_path / "exported")


def refused(folder: Path) -> str:
    """Return what a session says of a folder, behind its name."""
    text, start = refusal(ModelSession, folder), f"ModelSession: path is {str(folder)!r}, "
    assert text.startswith(start)
    return text.removeprefix(start)


NO_FOLDER = "should be a folder with a gdn_ops.json, as `gdn-ops export --model` writes it"


def test_a_folder_without_description_is_refused(folder: Path) -> None:
    (folder / "gdn_ops.json").unlink()
    assert refused(folder) == NO_FOLDER
    assert refused(folder / "model.onnx") == NO_FOLDER
    assert refused(folder / "not there") == NO_FOLDER
    assert message_of(SpecTypeError, ModelSession, None) == (
        "ModelSession: path has type NoneType, should be a path"
    )


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_file_that_has_changed_is_named(name: str, folder: Path) -> None:
    file = folder / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert refused(folder) == (
        f"where {name} has changed since it was exported: its SHA-256 is another one than "
        f"gdn_ops.json says; export the model again"
    )


@pytest.mark.parametrize("checks_files", [True, False])
@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_file_that_is_missing_is_named(name: str, checks_files: bool, folder: Path) -> None:
    (folder / name).unlink()
    assert refusal(ModelSession, folder, checks_files=checks_files) == (
        f"ModelSession: path is {str(folder)!r}, where {name} is missing; export the model again"
    )


def test_files_are_not_read_whole_where_that_is_not_wanted(folder: Path) -> None:
    weights = folder / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    start = content.rfind(bytes(64))
    content[start] ^= 1
    weights.write_bytes(content)
    # Change what lies between two weights.
    added = ModelSession(folder, checks_files=False).generate([3, 4], 4)
    assert added == session(FAMILY).generate([3, 4], 4)


@pytest.mark.parametrize(
    ("changed", "text"),
    {
        "has schema 2, should have 1, which this release of gdn_ops reads": {"schema": 2},
        "has schema None, should have 1, which this release of gdn_ops reads": {"schema": None},
        "has no 'states'": {"states": ...},
        "has an unknown 'kind'": {"kind": 3},
        "has states None, which is of another kind than it should be": {"states": None},
        "has eos 3, which is of another kind than it should be": {"eos": 3},
        "has vocabulary '97', which is of another kind than it should be": {"vocabulary": "97"},
        "has digests [], which is of another kind than it should be": {"digests": []},
    }.items(),
)
def test_a_description_that_says_something_else_is_refused(
    text: dict[str, Any], changed: str, folder: Path
) -> None:
    file = folder / "gdn_ops.json"
    facts = {**json.loads(file.read_text()), **text}
    file.write_text(json.dumps({k: x for k, x in facts.items() if x is not ...}))
    assert refused(folder) == f"whose gdn_ops.json {changed}: export the model again"


def test_a_description_that_is_no_json_is_refused(folder: Path) -> None:
    file = folder / "gdn_ops.json"
    whole = file.read_text()
    file.write_text(whole[:-9])
    assert refused(folder).startswith("whose gdn_ops.json is no JSON: Expecting ")
    file.write_text("[" * 100_000)
    assert refused(folder).startswith("whose gdn_ops.json is no JSON: maximum recursion")
    file.write_text("[]")
    assert refused(folder) == (
        "whose gdn_ops.json has schema None, should have 1, which this release of gdn_ops reads: "
        "export the model again"
    )
    file.write_bytes(b"\xff\xfe")
    assert refused(folder) == NO_FOLDER


def test_a_tokenizer_that_cannot_be_read_is_named(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    (folder / "tokenizer.json").write_text("{}")
    assert refused(folder).startswith(
        f"whose tokenizer.json tokenizers {tokenizers.__version__} cannot read: "
    )


def test_a_text_without_a_tokenizer_is_refused() -> None:
    made = session(FAMILY)
    for method, arguments in ((made.read, ()), (made.generate, (3,)), (made.stream_text, (3,))):
        label = "read" if method == made.read else "generate"
        assert refusal(method, "a text", *arguments) == (
            f"ModelSession.{label}: prompts are text, should be tokens: the folder has no "
            f"tokenizer.json, or the package tokenizers is not installed"
        )


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        ([[3, 97]], "a prompt has token 97, should have tokens in [0, 96]"),
        ([-1], "a prompt has token -1, should have tokens in [0, 96]"),
        ([2**70], f"a prompt has token {2**70}, should have tokens in [0, 96]"),
        ([], "prompts has no text, should have one or more"),
        ([[]], "a prompt has no token, should have one or more"),
        ([[3], []], "a prompt has no token, should have one or more"),
        (np.zeros((0, 3), np.int64), "prompts has no text, should have one or more"),
        (np.zeros((2, 0), np.int64), "a prompt has no token, should have one or more"),
    ],
)
def test_a_prompt_that_is_no_tokens_of_the_model_is_refused(prompts: Any, text: str) -> None:
    assert refusal(session(FAMILY).read, prompts) == f"ModelSession.read: {text}"
    assert refusal(session(FAMILY).generate, prompts, 3) == f"ModelSession.generate: {text}"


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        (3, ": prompts have type int, should be a text, tokens, or a list of them"),
        (None, ": prompts have type NoneType, should be a text, tokens, or a list of them"),
        ({3}, ": prompts have type set, should be a text, tokens, or a list of them"),
        ([1.5], ": prompts hold a float, should be all texts or all lists of tokens"),
        (["a", [3]], ": prompts hold a str, should be all texts or all lists of tokens"),
        ([[1.5]], ".read: a token of a prompt has type float, should be an integer"),
        ([["a"]], ".read: a token of a prompt has type str, should be an integer"),
        (np.ones((1, 2)), ".read: a token of a prompt has type float, should be an integer"),
        (np.ones((1, 2, 2), int), ".read: a token of a prompt has type list, should be an integer"),
    ],
)
def test_prompts_of_another_type_are_refused(prompts: Any, text: str) -> None:
    found = message_of(SpecTypeError, session(FAMILY).read, prompts)
    assert found == f"ModelSession{text}"


def test_an_empty_text_is_refused() -> None:
    made = ModelSession(exported_models.speaking(), threads=1)
    assert refusal(made.generate, "", 3) == (
        "ModelSession.generate: a prompt has no token, should have one or more"
    )
    assert message_of(SpecTypeError, made.stream_text, [3], 3) == (
        "ModelSession.stream_text: prompt has type list, should be str"
    )


def test_more_tokens_than_the_model_is_made_for_are_refused() -> None:
    made = session(FAMILY)
    text = (
        "ModelSession.generate: prompt and new tokens are 513, should be at most 512, the "
        "positions that the model is made for"
    )
    assert refusal(made.generate, [3, 4], 511) == text
    assert refusal(made.stream, [[3], [3, 4]], 511) == text
    _, state = made.read([3, 4])
    assert refusal(made.generate, [5], 510, state=state) == text
    stop = made.generate([3, 4], 1)
    assert made.generate([3, 4], 510, stop=stop) == []
    read = (
        "ModelSession.read: tokens of state and prompts are 513, should be at most 512, the "
        "positions that the model is made for"
    )
    assert refusal(made.read, [3] * 513) == read
    assert refusal(made.read, [3] * 511, state) == read


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"threads": 0}, "threads is 0, should be at least 1"),
        ({"threads": 1.5}, "threads has type float, should be an integer"),
        ({"checks_files": "no"}, "checks_files has type str, should be True or False"),
    ],
)
def test_an_argument_that_does_not_fit_is_refused(options: dict[str, Any], text: str) -> None:
    assert refusal(ModelSession, exported(FAMILY), **options) == f"ModelSession: {text}"


def test_a_body_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for body in ("fast", "custom"):
        assert refusal(ModelSession, exported(FAMILY), body=body) == (
            f"ModelSession: body is {body!r}, should be one of auto, standard, ort, onnx"
        )
    monkeypatch.setattr(sessions, "available_bodies", lambda: ("standard",))
    monkeypatch.setattr(sessions, "why_not", lambda body: f"body {body!r} is not there")
    assert refusal(ModelSession, exported(FAMILY), body="ort") == (
        "ModelSession: body 'ort' is not there; take body='standard'"
    )
