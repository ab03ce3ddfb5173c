"""Compare the walks of the kernels with whole calls."""

from __future__ import annotations

from dataclasses import replace

import torch

from gdn_ops import GATED_DELTA
from gdn_ops.backends.cpp.backend import Cpp
from gdn_ops.call.bind import Arguments, Call, Tokens, bind
from gdn_ops.testing import Example


def call_of(example: Example) -> Call:
    """Return the bound call of an example."""
    given = {**example.arguments()}
    tokens = Tokens(*(given.pop(name, None) for name in Tokens._fields))  # type: ignore[arg-type]
    state, cuts = given.pop("initial_state", None), given.pop("cu_seqlens", None)
    given.pop("return_state", None)
    return bind(GATED_DELTA, Arguments(tokens, state, cuts, return_state=True, **given))


def check_walks(example: Example) -> None:
    """Check that the state and its gradient have the bits of whole calls."""
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
