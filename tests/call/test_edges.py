"""What is at the edge of what is legal has the value that docs/math.md §6 gives it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_ops import BackendUnsupportedError, gated_delta, gated_delta_step
from gdn_ops.dispatch.registry import Backend, get_backend, known_backends
from good_calls import HV, B, K, T, V, ints, packed, sequence, token, zeros

BACKENDS = ("naive", "torch", "cpp")

INSTALLED = [name for name in known_backends() if isinstance(get_backend(name), Backend)]

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


EDGES: dict[str, dict[str, Any]] = {
    "no tokens": sequence(t=0, v=zeros(B, 0, HV, 16), initial_state=zeros(B, HV, K, 16)),
    "no rows": sequence(b=0, v=zeros(0, T, HV, 16), initial_state=zeros(0, HV, K, 16)),
    "no sequences": packed(ints(0), t=0, v=zeros(1, 0, HV, 16), initial_state=zeros(0, HV, K, 16)),
    "empty sequences": packed(
        ints(0, 0, 0), t=0, v=zeros(1, 0, HV, 16), initial_state=zeros(2, HV, K, 16)
    ),
}
"""Calls without tokens, of a V that every backend has."""


def results_and_inputs(
    arguments: dict[str, Any], needed: str, **options: Any
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Return (o, state) of a call whose inputs, or one of them, require a gradient, and these."""
    inputs = {
        name: x.clone().requires_grad_(needed in (name, "every input"))
        for name, x in arguments.items()
        if x.is_floating_point()
    }
    if "state" in arguments:
        results = gated_delta_step(**arguments | inputs | options)
    else:
        results = gated_delta(**arguments | inputs | options, return_state=True)
    return results, [x for x in inputs.values() if x.requires_grad]


NEEDED = ("q", "k", "v", "alpha", "beta", "initial_state", "every input")


@pytest.mark.filterwarnings("ignore:backend '.*' emulates its kernels")
@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("edge", EDGES)
def test_without_tokens_both_results_have_a_graph_and_gradients(backend: str, edge: str) -> None:
    for needed in NEEDED:
        results, inputs = results_and_inputs(EDGES[edge], needed, backend=backend)
        for result in results:
            gradients = torch.autograd.grad(result.sum(), inputs, retain_graph=True)
            for x, gradient in zip(inputs, gradients, strict=True):
                is_carried = result is results[1] and x.dim() == 4 and x.shape == result.shape
                assert torch.equal(gradient, torch.full_like(x, float(is_carried)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["gated_delta", "linear"])
@pytest.mark.parametrize("op", ["sequence", "step"])
def test_an_input_without_influence_has_a_gradient_of_zeros(
    backend: str, rule: str, op: str
) -> None:
    arguments = sequence(initial_state=ones_like_memory(B)) if op == "sequence" else token()
    if rule == "linear":
        arguments = {name: x for name, x in arguments.items() if name != "alpha"}
    for needed in ("q", "every input"):
        results, inputs = results_and_inputs(arguments, needed, rule=rule, backend=backend)
        assert all(result.requires_grad for result in results)
        of_q, *others = torch.autograd.grad(results[1].sum(), inputs)
        assert not of_q.any() and all(bool(gradient.any()) for gradient in others)


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
