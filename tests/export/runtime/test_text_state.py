"""A state is a value: kept, forked, saved, and unchanged by what is generated from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from errors import message_of, refusal
from exported_models import FLAVOURS, greedy, prompts, session
from gdn_ops import SpecTypeError
from gdn_ops.export import ModelSession, TextState

FAMILY, OTHER = "qwen3_next-2:1", "olmo_hybrid-1:1"
BEGIN, ENDS = prompts()[0], ([5, 6, 7], [11, 3, 19])


@pytest.fixture(params=FLAVOURS)
def made(request: pytest.FixtureRequest) -> ModelSession:
    return session(FAMILY, request.param)


def copied(state: TextState) -> TextState:
    return TextState(state.mask.copy(), {name: x.copy() for name, x in state.values.items()})


def is_equal(a: TextState, b: TextState) -> bool:
    """Return whether two states are the same bit for bit."""
    return (
        np.array_equal(a.mask, b.mask)
        and a.values.keys() == b.values.keys()
        and all(np.array_equal(a.values[name], b.values[name]) for name in a.values)
    )


def test_two_continuations_of_one_beginning_are_those_of_whole_prompts(made: ModelSession) -> None:
    _, state = made.read([BEGIN])
    for end in ENDS:
        assert made.generate(end, 16, state=state) == made.generate([*BEGIN, *end], 16)
    whole = [[*BEGIN, *end] for end in ENDS]
    together = made.generate(ENDS, 16, state=state.select([0, 0]))
    assert together == made.generate(whole, 16)
    assert together[0] != together[1]


def test_what_was_drafted_is_forgotten_with_the_state_before_it(made: ModelSession) -> None:
    _, state = made.read([BEGIN])
    before = copied(state)
    draft = made.generate(ENDS[0], 12, state=state)
    made.read([draft], state)
    assert is_equal(state, before)
    # All but the first token of the draft are taken back: as if they had never been read.
    _, accepted = made.read([[*ENDS[0], draft[0]]], state)
    _, never = made.read([[*BEGIN, *ENDS[0], draft[0]]])
    assert made.generate([draft[1]], 8, state=accepted) == made.generate([draft[1]], 8, state=never)
    assert made.generate([*ENDS[0], draft[0]], 11, state=state) == draft[1:]


def test_steps_of_one_token_are_a_whole_prompt(made: ModelSession) -> None:
    state, added = None, []
    logits, state = made.read([BEGIN])
    for _ in range(16):
        added.append(int(logits[0].argmax()))
        logits, state = made.read([added[-1:]], state)
    assert added == greedy(FAMILY)[0][:16]
    assert (state.rows, state.tokens) == (1, len(BEGIN) + 16)


def test_rows_are_selected_with_their_padding(made: ModelSession) -> None:
    _, state = made.read(prompts())
    chosen = state.select([2, 0])
    assert chosen.rows == 2
    assert chosen.mask.tolist() == [[0] * 7 + [1] * 2, [1] * 9]
    added = made.generate([[8], [8]], 16, state=chosen)
    assert added == made.generate([[*prompts()[2], 8], [*prompts()[0], 8]], 16)
    assert chosen.nbytes == sum(x.nbytes for x in chosen.values.values()) > 0
    assert state.select([]).rows == 0


def test_a_state_is_saved_and_loaded_bit_for_bit(made: ModelSession, tmp_path: Path) -> None:
    _, state = made.read(prompts())
    path = tmp_path / "state"
    state.save(path)
    assert list(tmp_path.iterdir()) == [path]
    loaded = TextState.load(str(path))
    assert is_equal(loaded, state)
    rows = [[8], [9], [10]]
    assert made.generate(rows, 8, state=loaded) == made.generate(rows, 8, state=state)


@pytest.mark.parametrize("row", [-1, 3])
def test_a_row_that_is_not_there_is_named(row: int) -> None:
    _, state = session(FAMILY).read(prompts())
    assert refusal(state.select, [0, row]) == (
        f"TextState.select: rows has {row}, should have numbers in [0, 2]"
    )


def test_a_state_of_another_model_is_refused() -> None:
    one, other = session(FAMILY), session(OTHER)
    _, state = one.read([BEGIN])
    name = "past_key_values.0.conv_state"
    for method, label in (
        (other.read, "read"),
        (lambda *a: other.generate(a[0], 3, state=a[1]), "generate"),
    ):
        assert refusal(method, [BEGIN], state) == (
            f"ModelSession.{label}: state has {name} of shape (1, 128, 3), should be (1, 288, 3): "
            f"it is of another model"
        )
    # As one flavour lays a state out, the other does not.
    assert refusal(session(FAMILY, "onnxruntime").read, [BEGIN], state) == (
        f"ModelSession.read: state has {name} of shape (1, 128, 3), should be (1, 3, 128): it is "
        f"of another model"
    )
    fewer = TextState(state.mask, {k: x for k, x in state.values.items() if k != name})
    assert refusal(one.read, [BEGIN], fewer) == (
        f"ModelSession.read: state has no {name}: it is of another model"
    )
    shorter = TextState(state.mask[:, 1:], state.values)
    assert refusal(one.read, [BEGIN], shorter) == (
        "ModelSession.read: state has past_key_values.3.key of shape (1, 1, 9, 16), should be "
        "(1, 1, 8, 16): it is of another model"
    )
    wide = TextState(state.mask, {k: x.astype(np.float64) for k, x in state.values.items()})
    assert refusal(one.read, [BEGIN], wide) == (
        f"ModelSession.read: state has {name} of dtype float64, should be float32"
    )


def test_rows_that_do_not_fit_a_state_are_refused() -> None:
    made = session(FAMILY)
    _, state = made.read(prompts())
    for rows, text in (
        ([[3], [4]], "2 of 1 to 1 tokens"),
        ([[3], [4], [5, 6]], "3 of 1 to 2 tokens"),
    ):
        for method, label in ((made.read, "read"), (made.generate, "generate")):
            options = {"state": state} | ({"max_new_tokens": 2} if label == "generate" else {})
            assert refusal(method, rows, **options) == (
                f"ModelSession.{label}: prompts are {text}, should be 3 of one length: they "
                f"continue the rows of a state"
            )


def test_what_is_no_state_is_refused_by_its_type() -> None:
    assert message_of(SpecTypeError, session(FAMILY).read, [BEGIN], {"a": 1}) == (
        "ModelSession.read: state has type dict, should be a TextState"
    )


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    _, state = session(FAMILY).read([BEGIN])
    state.save(path)
    whole = path.read_bytes()
    start = f"TextState.load: path is {str(path)!r}, should be a file that TextState.save wrote: "
    for content in (b"", b"text", whole[:1000], whole[:200] + b"?" + whole[201:]):
        path.write_bytes(content)
        assert refusal(TextState.load, path).startswith(start)
    np.save(path.with_suffix(".npy"), np.zeros(3))
    path.with_suffix(".npy").rename(path)
    assert refusal(TextState.load, path).startswith(start)
    np.savez(path, x=np.zeros(3))
    assert refusal(TextState.load, path) == (
        f"TextState.load: path is {str(path)!r}, which has no attention_mask: should be a file "
        f"that TextState.save wrote"
    )
    path.unlink()
    assert refusal(TextState.load, path) == (
        f"{start}[Errno 2] No such file or directory: {str(path)!r}"
    )
