"""A walk forms the state that a whole call forms, and its gradient, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from gdn_ops import GATED_DELTA
from gdn_ops.backends.cpp import library
from gdn_ops.backends.cpp.backend import Cpp
from gdn_ops.call.bind import Arguments, Call, Tokens, bind
from gdn_ops.testing import Example
from gdn_ops.testing.strategies import calls

if library.missing() is not None:
    pytest.skip(f"backend 'cpp': {library.missing()}", allow_module_level=True)

LONG = [
    Example(T=333, H=2, R=2, K=80, V=40, dtype="float32", initial_state=True, gate="slow"),
    Example(T=333, H=1, R=3, K=64, V=130, dtype="bfloat16", initial_state=True, gate="slow"),
    Example(T=300, lengths=(0, 170, 130), K=16, V=7, dtype="float16", rule="delta"),
    Example(T=300, lengths=(40, 260), K=128, V=128, rule="gated", initial_state=True),
    Example(T=0, K=8, V=8, initial_state=True),
]


def call_of(example: Example) -> Call:
    given = {**example.arguments()}
    tokens = Tokens(*(given.pop(name, None) for name in Tokens._fields))  # type: ignore[arg-type]
    state, cuts = given.pop("initial_state", None), given.pop("cu_seqlens", None)
    given.pop("return_state", None)
    return bind(GATED_DELTA, Arguments(tokens, state, cuts, return_state=True, **given))


def check(example: Example) -> None:
    call = replace(call_of(example), needs_grad=True)
    backend = Cpp()
    out = backend.forward(call)
    assert torch.equal(backend.walk(call), out.final_state)
    d_o, d_state = example.cotangents()
    d_state = d_state.to(out.final_state.dtype)
    # A state to take the gradient of.
    started = replace(call, state=torch.zeros_like(d_state) if call.state is None else call.state)
    found = backend.walk_back(call, d_o, d_state)
    right = backend.backward(started, None, d_o, d_state).state
    assert right is not None and torch.equal(found.to(right.dtype), right)


@pytest.mark.parametrize("example", LONG)
@pytest.mark.parametrize("threads", [1, 2])
def test_walks_of_long_calls(example: Example, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(example)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(calls(GATED_DELTA, Cpp.limits, max_tokens=150))
def test_walks_of_drawn_calls(example: Example) -> None:
    check(example)


def test_a_walk_reads_no_queries() -> None:
    example = LONG[0]
    call = call_of(example)
    other = call.tokens._replace(q=torch.full_like(call.tokens.q, 3.0))
    backend = Cpp()
    assert torch.equal(backend.walk(call), backend.walk(call.with_tensors(other, call.state)))
