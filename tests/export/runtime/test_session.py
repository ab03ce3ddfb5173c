"""A session keeps its states, updates them in place, and gives what it returns away."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gdn_ops import export
from gdn_ops.export.runtime.comparison import relative_error
from onnx_needs import BODIES
from onnx_steps import STATE, Step, assert_right, feed, in_session

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


def test_a_buffer_that_is_given_for_another_input_is_read_before_it_is_written() -> None:
    tokens, _ = Step(tokens=1).draw()
    arrays = feed(tokens[0])
    swapped = arrays | {"q": arrays["k"], "k": arrays["q"]}
    session, other = (Step().session() for _ in range(2))
    expected = other.step(**swapped)
    buffers = session.buffers
    for name, x in arrays.items():
        buffers[name][...] = x
    given = buffers | {"q": buffers["k"][:], "k": buffers["q"]}
    assert np.array_equal(session.step(**given), expected)


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
