"""A session is used by one thread at a time, in its process, and is neither copied nor pickled."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from errors import refusal
from gdn_ops import SpecError
from gdn_ops.export.runtime.exclusive import Exclusive
from onnx_steps import STATE, Step, feed

TWO_THREADS = (
    "DecodeSession: is used by two threads at once, should be by one: it has one state per row; "
    "make one for each thread, or one with more rows"
)


def test_two_threads_never_get_each_others_answers() -> None:
    tokens, state = Step(tokens=2).draw()
    shared, alone = Step().session(), Step().session()
    first, second = (feed(token) for token in tokens)
    right = []
    for token in (first, second):
        alone.state = state.numpy()
        right.append(alone.step(**token).copy())
    wrong, refused = [], []
    lock = threading.Lock()

    def conversation(own: int) -> None:
        for _ in range(300):
            try:
                # A conversation's own lock: between its two calls no other may come.
                with lock:
                    shared.state = state.numpy()
                    o = shared.step(**(first, second)[own])
                if not np.array_equal(o, right[own]):
                    wrong.append(own)
            except SpecError as error:
                refused.append(str(error))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(conversation, (0, 1)))
    assert not wrong and not refused


@pytest.mark.parametrize("use", ["step", "state", "set", "reset"])
def test_a_second_thread_is_refused_while_one_is_inside(use: str) -> None:
    tokens, state = Step(tokens=1).draw()
    session = Step().session()
    uses: dict[str, Callable[[], Any]] = {
        "step": lambda: session.step(**feed(tokens[0])),
        "state": lambda: session.state,
        "set": lambda: setattr(session, "state", state.numpy()),
        "reset": session.reset,
    }
    with session._exclusive, ThreadPoolExecutor(1) as pool:
        assert pool.submit(refusal, uses[use]).result() == TWO_THREADS
    uses[use]()


def test_one_thread_after_the_other_may_use_a_session() -> None:
    tokens, state = Step(tokens=2).draw()
    session, other = Step().session(), Step().session()
    session.state = other.state = state.numpy()
    for token in tokens:
        with ThreadPoolExecutor(1) as pool:
            o = pool.submit(lambda token=token: session.step(**feed(token))).result()
        assert np.array_equal(o, other.step(**feed(token)))
    assert np.array_equal(session.state[STATE], other.state[STATE])


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_of_a_session_are_refused(how: Callable[[Any], Any]) -> None:
    assert refusal(how, Step().session()) == (
        "DecodeSession: is copied or pickled, should be made anew from its model: its states are "
        "memory that onnxruntime writes; session.state has copies of them"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_is_told_to_make_its_own() -> None:
    exclusive = Exclusive("DecodeSession")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with exclusive:
                os.write(writer, b"nothing was refused")
        except SpecError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1000).decode() == (
        "DecodeSession: is used in a forked process, should be made there: the threads of "
        "onnxruntime stay behind"
    )
    with exclusive:
        pass
