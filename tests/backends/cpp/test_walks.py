"""A walk forms the state that a whole call forms, and its gradient, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

import gdn_ops
from cpp_walks import call_of, check_walks
from gdn_ops import GATED_DELTA
from gdn_ops.backends.cpp import library
from gdn_ops.backends.cpp.backend import Cpp
from gdn_ops.call.bind import Call
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


@pytest.mark.parametrize("example", LONG)
@pytest.mark.parametrize("threads", [1, 2])
def test_walks_of_long_calls(example: Example, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_walks(example)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(calls(GATED_DELTA, Cpp.limits, max_tokens=150))
def test_walks_of_drawn_calls(example: Example) -> None:
    check_walks(example)


def test_a_walk_reads_no_queries() -> None:
    example = LONG[0]
    call = call_of(example)
    other = call.tokens._replace(q=torch.full_like(call.tokens.q, 3.0))
    backend = Cpp()
    assert torch.equal(backend.walk(call), backend.walk(call.with_tensors(other, call.state)))


def faint(T: int, *, written_from: int, dtype: str) -> Call:
    """Return a call whose state fades below all numbers in its first tokens, which write nothing.

    A column of values stays of ordinary size from one token on, the other ones are zero.
    """
    example = Example(T=T, K=16, V=48, dtype=dtype, initial_state=True, rule="gated_delta")
    call = call_of(example)
    alpha = torch.full((1, T, 1), 0.7, device="cpu", dtype=torch.float32)
    v = torch.zeros_like(call.tokens.v)
    v[:, written_from:, :, 40] = 1.0
    tokens = call.tokens._replace(v=v, alpha=alpha, log_alpha=None)
    return replace(call, tokens=tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("T", [100, 200, 240, 270, 600])
@pytest.mark.parametrize("written_from", [90, 600])
def test_a_walk_scales_what_fades(T: int, written_from: int, dtype: str) -> None:
    call = faint(T, written_from=min(written_from, T), dtype=dtype)
    exact = call.tokens.map(torch.Tensor.double)
    assert call.state is not None
    _o, right = gdn_ops.gated_delta(
        exact.q, exact.k, exact.v, exact.alpha, exact.beta,
        initial_state=call.state.double(), return_state=True, backend="naive",
    )  # fmt: skip
    found = Cpp().walk(call).double()
    size = right.abs().amax((-2, -1), keepdim=True)
    # The least number of float32 is all that rounding may add.
    relative = 1e-4 if dtype == "float32" else 3e-2
    assert bool(((found - right).abs() <= relative * size + 2.0**-149).all())
    faded = right[..., :32].abs().max().item()
    assert (faded < 2.0**-126) == (T >= 240)
