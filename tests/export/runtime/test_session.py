"""A session keeps its states, updates them in place, and gives what it returns away."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from gdn_ops import export
from gdn_ops.export.model.naming import recurrent_names, states_of, write_states
from gdn_ops.export.runtime.comparison import relative_error
from onnx_needs import BODIES
from onnx_steps import STATE, Array, Step, assert_right, feed, in_session

LONG = Step(H=2, HV=4, K=16, V=12, tokens=256)


@pytest.mark.parametrize("body", BODIES)
def test_one_buffer_two_buffers_and_float64_agree_over_256_steps(body: str) -> None:
    tokens, state = LONG.draw()
    model = LONG.model(body)
    one, two = in_session(model, body), in_session(model, body, in_place=False)
    assert_right(LONG, tokens, state, one)
    assert_right(LONG, tokens, state, two)
    (outputs, final), (others, other_final) = one(tokens, state), two(tokens, state)
    assert all(np.array_equal(x, y) for x, y in zip(outputs, others, strict=True))
    assert np.array_equal(final, other_final)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("body", BODIES)
def test_a_session_outlives_everything_that_it_was_made_of(body: str, in_place: bool) -> None:
    tokens, state = LONG.draw()
    exact_o, exact_state = LONG.run(tokens, state, wide=True)
    session = export.DecodeSession(
        LONG.model(body), batch=2, body=body, threads=1, in_place=in_place
    )
    session.state = state.numpy().copy()
    rubbish = []
    for token, exact in zip(tokens, exact_o, strict=True):
        # What was freed by mistake is overwritten.
        gc.collect() if len(rubbish) % 16 == 0 else None
        rubbish.append(np.full_like(state.numpy(), np.nan))
        o = session.step(**{name: x.copy() for name, x in feed(token).items()})
        assert relative_error(o, exact) < 2e-5
    del rubbish
    gc.collect()
    assert relative_error(session.state[STATE], exact_state) <= 1e-6


def test_what_a_session_returns_belongs_to_the_caller() -> None:
    tokens, state = Step(tokens=2).draw()
    session = Step().session()
    given = state.numpy().copy()
    session.state = given
    given.fill(7)
    kept = session.state[STATE]
    assert np.array_equal(kept, state.numpy())
    kept.fill(7)
    assert np.array_equal(session.state[STATE], state.numpy())
    o = session.step(**feed(tokens[0]))
    before = o.copy()
    session.step(**feed(tokens[1]))
    assert np.array_equal(o, before)
    assert session.state[STATE].flags.owndata


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "the array": lambda o: o,
    "a part": lambda o: o[1, 1:],
    "a part of a part": lambda o: o[0][:1].T,
    "another dtype": lambda o: o.view(np.int32),
    "a tensor": lambda o: torch.from_numpy(o).numpy(),
    "a buffer": memoryview,
    "an iterator": lambda o: o.flat,
}


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_result_is_not_written_again_while_anybody_has_a_part_of_it(
    holder: str, in_place: bool
) -> None:
    tokens, _ = Step(tokens=6).draw()
    session = Step().session(in_place=in_place)
    held, values = [], []
    for token in tokens:
        o = session.step(**feed(token))
        held.append(HOLDERS[holder](o))
        values.append(np.array(held[-1]))
        del o
    for kept, value in zip(held, values, strict=True):
        assert np.array_equal(np.array(kept), value)


def test_the_memory_of_a_result_that_nobody_has_is_used_again() -> None:
    tokens, _ = Step(tokens=8).draw()
    session = Step().session()
    session.step(**feed(tokens[0]))
    made = session._results[0]
    for token in tokens[1:4]:
        session.step(**feed(token))
    assert session._results == [made]
    # As a loop does that still has the last result while it makes the next.
    o = session.step(**feed(tokens[4]))
    for token in tokens[5:]:
        o = session.step(**feed(token))
    assert len(session._results) == 2 and made in session._results
    assert o.flags.writeable


@pytest.mark.parametrize("body", export.available_bodies())
def test_a_token_written_into_the_buffers_is_one_that_was_given(body: str) -> None:
    tokens, _ = Step(tokens=6).draw()
    given, written = (
        export.DecodeSession(Step().model(body), batch=2, body=body) for _ in range(2)
    )
    for i, token in enumerate(tokens):
        arrays = feed(token)
        expected = given.step(**arrays)
        buffers = written.buffers
        for name in list(arrays)[: i % (len(arrays) + 1)]:
            buffers[name][...] = arrays[name]
            arrays[name] = buffers[name]
        assert np.array_equal(written.step(**arrays), expected)
    for x, y in zip(given.state.values(), written.state.values(), strict=True):
        assert np.array_equal(x, y)


# Arrays that lie in the memory of the session. Here all have the same number of elements.

SQUARE = Step(H=4, HV=4, K=1, V=1, tokens=4)
INPUTS = ("q", "k", "v", "log_alpha", "beta")

WAYS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda x: x,
    "a view": lambda x: x[:],
    "backwards": lambda x: x[::-1, ::-1],
    "a transposed view": lambda x: x.T.reshape(x.shape),
    "a tensor": lambda x: torch.from_numpy(x).numpy(),
    "a buffer": lambda x: np.frombuffer(memoryview(x).cast("B"), x.dtype).reshape(x.shape),
    "an interface": lambda x: np.asarray(Interface(x)),
    "strides": lambda x: np.lib.stride_tricks.as_strided(x),
    "one element": lambda x: np.broadcast_to(x[-1:, -1:], x.shape),
}


class Interface:
    """Give an array away by the array interface, as other libraries do."""

    def __init__(self, x: Array) -> None:
        self._kept = x
        self.__array_interface__ = x.__array_interface__


def written_session(in_place: bool = True) -> tuple[export.DecodeSession, dict[str, Array]]:
    """Return a session after two tokens, and arrays over each of its buffers, by what it holds."""
    tokens, state = SQUARE.draw()
    session = SQUARE.session(in_place=in_place)
    session.state = state.numpy()
    earlier, last = (session.step(**feed(token)) for token in tokens[:2])
    held = {f"the state, turn {i}": x.array for i, x in enumerate(session._states[STATE])}
    return session, session.buffers | {"an earlier o": earlier, "the last o": last} | held


def sized(x: Array, name: str) -> Array:
    """Return the same memory with the shape of an input."""
    return x.reshape((2, 4, 1) if name in ("q", "k", "v") else (2, 4))


HELD = (*INPUTS, "an earlier o", "the last o", "the state, turn 0")


def assert_read_first(
    in_place: bool, choose: Callable[[dict[str, Array]], dict[str, Array]]
) -> None:
    """Compare two steps on arrays in the session's buffers with steps on copies of them."""
    (one, memory), (other, its_memory) = (written_session(in_place) for _ in range(2))
    given = choose(memory)
    copies = {name: x.copy() for name, x in choose(its_memory).items()}
    kept = {name: memory[name].copy() for name in ("an earlier o", "the last o")}
    rest = feed(SQUARE.draw()[0][2])
    for _ in range(2):
        expected = other.step(**rest | copies)
        assert expected.any() and np.array_equal(one.step(**rest | given), expected)
        assert np.array_equal(one.state[STATE], other.state[STATE])
        # Look at what was given: it shows what its memory holds now.
        copies = {name: x.copy() for name, x in given.items()}
    assert all(np.array_equal(memory[name], x) for name, x in kept.items())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("in_place", [True, False])
def test_an_input_may_lie_in_any_buffer_of_the_session(in_place: bool, way: str) -> None:
    for name in INPUTS:
        for held in (*HELD, *([] if in_place else ["the state, turn 1"])):
            assert_read_first(
                in_place,
                lambda memory, name=name, held=held: {  # type: ignore[misc]
                    name: WAYS[way](sized(memory[held], name))
                },
            )


@pytest.mark.parametrize("way", WAYS)
def test_all_inputs_may_lie_in_each_others_buffers(way: str) -> None:
    for turn in range(1, len(HELD)):
        held = dict(zip(INPUTS, HELD[turn:] + HELD[:turn], strict=False))
        assert_read_first(
            True,
            lambda memory, held=held: {  # type: ignore[misc]
                name: WAYS[way](sized(memory[x], name)) for name, x in held.items()
            },
        )


def test_an_input_may_lie_across_two_buffers() -> None:
    def across(memory: dict[str, Array]) -> dict[str, Array]:
        q, k = memory["q"].ctypes.data, memory["k"].ctypes.data
        middle = np.lib.stride_tricks.as_strided(memory["q"], (2, 4, 1), (k - q, 4, 4))
        assert np.shares_memory(middle, memory["q"]) and np.shares_memory(middle, memory["k"])
        return {"q": memory["k"], "k": middle, "v": middle[::-1]}

    assert_read_first(True, across)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("in_place", [True, False])
def test_a_state_may_be_set_from_any_buffer_of_the_session(in_place: bool, way: str) -> None:
    token = feed(SQUARE.draw()[0][2])
    for held in (*HELD, *([] if in_place else ["the state, turn 1"])):
        session, memory = written_session(in_place)
        given = WAYS[way](memory[held].reshape(2, 4, 1, 1))
        expected = given.copy()
        session.state = given
        assert np.array_equal(session.state[STATE], expected)
        other = SQUARE.session(in_place=in_place)
        other.state = {STATE: expected}
        assert np.array_equal(session.step(**token), other.step(**token))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("in_place", [True, False])
def test_states_may_be_set_from_each_others_buffers(in_place: bool, way: str) -> None:
    model = SQUARE.model("standard")
    second, new_second = recurrent_names(1)
    for values, name in ((model.graph.input, second), (model.graph.output, new_second)):
        values.add().CopyFrom(next(x for x in model.graph.input if x.name == STATE))
        values[-1].name = name
    model.graph.node.append(onnx.helper.make_node("Identity", [second], [new_second]))
    write_states(model, states_of(model) | {second: new_second})
    session = export.DecodeSession(model, batch=2, body="standard", in_place=in_place)
    _, state = SQUARE.draw()
    session.state = {STATE: state.numpy(), second: 2 * state.numpy() + 1}
    arrays = {name: buffers[0].array for name, buffers in session._states.items()}
    given = {STATE: WAYS[way](arrays[second]), second: WAYS[way](arrays[STATE])}
    expected = {name: x.copy() for name, x in given.items()}
    session.state = given
    assert all(np.array_equal(session.state[name], x) for name, x in expected.items())


@pytest.mark.parametrize("in_place", [True, False])
def test_a_reset_changes_nothing_that_lies_in_other_memory(in_place: bool) -> None:
    session, memory = written_session(in_place)
    others = {name: memory[name] for name in HELD[:-1]}
    values = {name: x.copy() for name, x in others.items()}
    session.reset()
    assert all(np.array_equal(others[name], x) for name, x in values.items())
    token = {name: sized(memory[held], name) for name, held in zip(INPUTS, HELD[3:], strict=False)}
    new, copies = SQUARE.session(in_place=in_place), {name: x.copy() for name, x in token.items()}
    assert np.array_equal(session.step(**token), new.step(**copies))
    assert np.array_equal(session.state[STATE], new.state[STATE])


@pytest.mark.parametrize("in_place", [True, False])
def test_a_reset_session_is_a_new_one(in_place: bool) -> None:
    tokens, _ = Step(tokens=3).draw()
    session = Step().session(in_place=in_place)
    first = [session.step(**feed(token)) for token in tokens]
    assert session.state[STATE].any()
    session.reset()
    assert not session.state[STATE].any()
    again = [session.step(**feed(token)) for token in tokens]
    assert all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))


def test_inputs_go_by_position_or_by_name_and_need_not_be_contiguous() -> None:
    ((token,), _) = Step(tokens=1).draw()

    def o(*args: Any, **kwargs: Any) -> Any:
        return Step().session().step(*args, **kwargs)

    values = feed(token)
    expected = o(*values.values())
    assert expected.any()
    assert np.array_equal(o(**dict(reversed(values.items()))), expected)
    strided = [np.repeat(x, 2, -1)[..., ::2] for x in values.values()]
    assert not strided[0].flags.c_contiguous
    assert np.array_equal(o(*strided), expected)
    first, *rest = values.values()
    assert np.array_equal(o(first, **dict(zip(list(values)[1:], rest, strict=True))), expected)


def test_the_buffers_of_a_session_are_aligned_to_cache_lines() -> None:
    session = Step(K=5, V=7).session()
    for buffers in (session._inputs, session._new_results().buffers):
        assert all(buffer.array.ctypes.data % 64 == 0 for buffer in buffers.values())


def test_a_session_prints_what_it_is() -> None:
    session = Step().session(body="standard")
    assert repr(session) == (
        "DecodeSession(q, k, v, log_alpha, beta -> o; 1 states, batch=2, body='standard')"
    )
