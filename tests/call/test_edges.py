"""What is at the edge of what is legal has the value that docs/math.md §6 gives it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_ops import BackendUnsupportedError, gated_delta, gated_delta_step
from good_calls import HV, B, K, T, V, ints, packed, sequence, token, zeros

BACKENDS = ("naive", "torch")

# NaN in, NaN out.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["q", "k", "v", "alpha", "beta", "log_alpha", "initial_state"])
def test_nan_in_gives_nan_out(backend: str, name: str) -> None:
    arguments = sequence(t=40, initial_state=zeros(B, HV, K, V), backend=backend)
    if name == "log_alpha":
        arguments["log_alpha"] = arguments.pop("alpha").log()
    arguments[name] = arguments[name].clone()
    arguments[name][(0, 0, 0) if name == "initial_state" else (0, 3, 0)] = math.nan
    o = gated_delta(**arguments)
    assert o[0, 3, 0].isnan().any(), "the poisoned head says so"
    assert o[1].isfinite().all(), "the other row is not poisoned"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["q", "k", "v", "alpha", "beta", "state"])
def test_nan_in_gives_nan_out_of_a_step(backend: str, name: str) -> None:
    arguments = token(backend=backend)
    arguments[name] = arguments[name].clone()
    arguments[name][0, 0] = math.nan
    o, _ = gated_delta_step(**arguments)
    assert o[0, 0].isnan().any()
    assert o[1].isfinite().all()


# Legal edges: docs/math.md §6 and the recurrence say what they return.


def ones_like_memory(n: int) -> Tensor:
    return torch.arange(n * HV * K * V, dtype=torch.float32).view(n, HV, K, V)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_return_the_initial_state_as_a_copy(backend: str) -> None:
    start = ones_like_memory(B)
    o, state = gated_delta(**sequence(t=0, initial_state=start, return_state=True, backend=backend))
    assert o.shape == (B, 0, HV, V)
    assert torch.equal(state, start)
    assert state.data_ptr() != start.data_ptr()
    _, state = gated_delta(**sequence(t=0, return_state=True, backend=backend))
    assert torch.equal(state, zeros(B, HV, K, V))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("arguments", "shape"),
    [(sequence(b=0), (0, T, HV, V)), (packed(ints(0), t=0), (1, 0, HV, V))],
    ids=["rows", "sequences"],
)
def test_no_rows_and_no_sequences_return_no_states(
    backend: str, arguments: dict[str, Any], shape: tuple[int, ...]
) -> None:
    o, state = gated_delta(**arguments, return_state=True, backend=backend)
    assert o.shape == shape
    assert state.shape == (0, HV, K, V)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_sequence_returns_its_initial_state(backend: str) -> None:
    start, boundaries = ones_like_memory(4), ints(0, 0, 5, 5, T)
    arguments = packed(boundaries, initial_state=start, return_state=True, backend=backend)
    o, state = gated_delta(**arguments)
    assert torch.equal(state[0], start[0]) and torch.equal(state[2], start[2])
    # The conformance kit compares the others with separate calls, always with int64.
    of_int32 = gated_delta(**{**arguments, "cu_seqlens": boundaries.int()})
    assert torch.equal(of_int32[0], o) and torch.equal(of_int32[1], state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("edge", [{"t": 0}, {"b": 0}])
def test_empty_axes_have_empty_or_zero_gradients(backend: str, edge: dict[str, int]) -> None:
    arguments = sequence(**edge)
    inputs = [x.requires_grad_() for x in arguments.values()]
    o, state = gated_delta(**arguments, return_state=True, backend=backend)
    gradients = torch.autograd.grad(
        o.sum() + state.sum(), inputs, allow_unused=True, materialize_grads=True
    )
    for x, gradient in zip(inputs, gradients, strict=True):
        assert gradient.shape == x.shape
        assert not gradient.any()


def test_a_chunk_too_long_for_the_torch_backend_is_a_reason() -> None:
    with pytest.raises(BackendUnsupportedError, match=r"chunk_size=257 \(supported: 1 to 256\)"):
        gated_delta(**sequence(backend="torch"), chunk_size=257)


def test_inplace_updates_the_state_and_returns_it() -> None:
    arguments = token(state=ones_like_memory(B) / 1000)
    before = arguments["state"].clone()
    expected_o, expected = gated_delta_step(**arguments)
    assert torch.equal(arguments["state"], before), "not in place: the state is kept"
    o, state = gated_delta_step(**arguments, inplace=True)
    assert state is arguments["state"]
    torch.testing.assert_close((o, state), (expected_o, expected))
