"""Decoding computes the definition at every level, with gates as a layer projects them too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from gdn_ops.backends.cpp import calls, library
from gdn_ops.backends.cpp.calls import RawGates
from gdn_ops.nn.gates import gate
from gdn_ops.spec.language import Sizes
from gdn_ops.spec.ops import RULES
from gdn_ops.spec.rules import Widths

if library.missing() is not None:
    pytest.skip(f"backend 'cpp': {library.missing()}", allow_module_level=True)

NARROW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Set the threads of torch back."""
    before = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def draw(B: int, H: int, HV: int, K: int, V: int, T: int | None = None) -> dict[str, Tensor]:
    """Return the arguments of a step, or of `steps` with T tokens, one gate of them closed."""
    random = torch.Generator().manual_seed(B * V + K)
    token = (B,) if T is None else (B, T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    x = {"q": normal(*token, H, K), "k": normal(*token, H, K) / K**0.5, "v": normal(*token, HV, V)}
    x |= {"log_alpha": -normal(*token, HV).abs(), "beta": torch.sigmoid(normal(*token, HV))}
    x["log_alpha"].view(-1)[0] = -math.inf
    return x | {"state": normal(B, HV, K, V)}


def assert_near(computed: Tensor, expected: Tensor, limit: float = 1e-6) -> None:
    error = (computed.double() - expected).abs().max() / expected.abs().max()
    assert error <= limit, f"off by {error:.1e}"


def step(**arguments: Any) -> tuple[Tensor, Tensor]:
    return gdn_ops.gated_delta_step(**arguments, backend="cpp")


# Gates as a layer projects them.


def raw_step(x: dict[str, Tensor], raw: RawGates, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run a step whose gates a and b are raw, as a layer does; return o and the new state."""
    B, H, K = x["q"].shape
    HV, V = x["v"].shape[1:]
    call: Any = SimpleNamespace(
        sizes=Sizes(B, 1, H, HV, K, V, B),
        tokens=SimpleNamespace(alpha=None),
        widths=Widths("scalar", "scalar", "scalar", False, False),
        rule=RULES[0],
        qk_l2norm=True,
        scale=0.3,
    )
    o, new_state = torch.empty_like(x["v"]), torch.empty_like(state)
    tokens = (x["q"], x["k"], x["v"], x["a"], x["b"], None, None, o)
    arrays = tuple(calls.token(y) for y in tokens)
    packed = calls.pack_steps(call, arrays, state, new_state, None, None, 1, raw)
    assert library.library().gdn_decode(packed) == 0
    return o, new_state


def raw_inputs(HV: int) -> dict[str, Tensor]:
    """Return q, k, v and gates a and b of which some are as large and as small as can be."""
    x = draw(2, HV // 2, HV, 24, 40)
    a, b = (3 * torch.randn(2, HV, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    extreme = torch.tensor([-math.inf, -104.0, -17.0, 0.0, 19.9, 20.1, 90.0, math.inf])
    a[0, :8], b[1, :8] = extreme, extreme
    return {name: x[name] for name in ("q", "k", "v", "state")} | {"a": a, "b": b}


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_raw_gates_give_what_the_layers_formulas_give(
    level: str, dtype: torch.dtype, has_bias: bool, factor: float
) -> None:
    x = raw_inputs(HV=12)
    x |= {name: x[name].to(dtype).float() for name in ("a", "b")}
    A_log, dt_bias = torch.linspace(-6, 2.7, 12), torch.linspace(-4, 1, 12) if has_bias else None
    given = x | {name: x[name].to(dtype) for name in ("a", "b")}
    o, new_state = raw_step(given, RawGates(A_log, dt_bias, factor, has_decay=True), x["state"])
    bias = None if dt_bias is None else dt_bias.double()
    expected_o, expected = gdn_ops.gated_delta_step(
        *(x[name].double() for name in ("q", "k", "v")),
        log_alpha=gate(x["a"].double(), A_log.double(), bias),
        beta=factor * torch.sigmoid(x["b"].double()),
        state=x["state"].double(),
        scale=0.3,
        qk_l2norm=True,
        backend="naive",
    )
    assert (expected[0, 7] != 0).any() and torch.isfinite(expected).all()
    assert_near(new_state, expected)
    assert_near(o, expected_o)


def test_one_of_the_gates_may_be_raw(level: str) -> None:
    x = raw_inputs(HV=12)
    A_log, beta = torch.linspace(-6, 2.7, 12), torch.sigmoid(x["b"])
    both = raw_step(x, RawGates(A_log, None, 1.0, has_decay=True), x["state"])
    decay = gate(x["a"], A_log)
    for one, other in (
        (raw_step(x | {"b": beta}, RawGates(A_log, has_decay=True), x["state"]), both),
        (raw_step(x | {"a": decay}, RawGates(beta_factor=1.0), x["state"]), both),
    ):
        for computed, expected in zip(one, other, strict=True):
            assert_near(computed, expected.double())


# The order of what is computed.


@pytest.mark.parametrize("V", [1, 31, 64, 96, 130, 200])
def test_every_width_agrees_with_naive(level: str, V: int) -> None:
    x = draw(2, 2, 6, 19, V)
    o, state = step(**x)
    double = {name: y.double() for name, y in x.items()}
    expected_o, expected = gdn_ops.gated_delta_step(**double, backend="naive")
    assert_near(o, expected_o)
    assert_near(state, expected)


@pytest.mark.parametrize("state_dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("V", [128, 72])
def test_neither_threads_nor_the_place_of_the_state_change_a_bit(
    level: str, V: int, state_dtype: torch.dtype
) -> None:
    x = draw(3, 4, 16, 128, V)
    x["state"] = x["state"].to(state_dtype)
    torch.set_num_threads(1)
    o, state = step(**x)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for inplace in (False, True):
            again, new = step(**x | {"state": x["state"].clone()}, inplace=inplace)
            assert torch.equal(o, again) and torch.equal(state, new)


@pytest.mark.parametrize("keeps", [False, True])
def test_steps_are_one_step_after_another_bit_for_bit(level: str, keeps: bool) -> None:
    x = draw(2, 2, 4, 40, 136, T=3)
    start = x.pop("state")
    o, state, *states = gdn_ops.gated_delta_steps(
        **x, state=start, return_states=keeps, backend="cpp"
    )
    for t in range(3):
        alone, start = step(**{name: y[:, t] for name, y in x.items()}, state=start)
        assert torch.equal(o[:, t], alone)
        if keeps:
            assert torch.equal(states[0][:, t], start)
    assert torch.equal(state, start)


@pytest.mark.parametrize("state_dtype", [torch.float32, *NARROW])
def test_rows_that_are_skipped_leave_the_others_as_they_are(
    level: str, state_dtype: torch.dtype
) -> None:
    x = draw(5, 1, 2, 32, 128)
    pool = torch.randn(7, 2, 32, 128).to(state_dtype)
    slots = torch.tensor([6, -1, 0, -1, 3])
    before = pool.clone()
    del x["state"]
    o, _ = step(**x, state=pool, state_indices=slots, inplace=True)
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            assert not o[row].any()
            continue
        one = {name: y[row : row + 1] for name, y in x.items()}
        alone, state = step(**one, state=before[slot : slot + 1])
        assert torch.equal(o[row : row + 1], alone)
        assert torch.equal(pool[slot : slot + 1], state)
    for slot in (1, 2, 4, 5):
        assert torch.equal(pool[slot], before[slot])


@pytest.mark.parametrize("state_dtype", NARROW)
@pytest.mark.parametrize("V", [256, 200])
def test_a_16_bit_state_is_rounded_to_nearest_even(
    level: str, V: int, state_dtype: torch.dtype
) -> None:
    # Every number of 16 bits, ties between them, and numbers that none of them is near.
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(state_dtype).float()
    between = torch.nextafter(every, torch.full_like(every, math.inf))
    half = 0x8000 if state_dtype == torch.bfloat16 else 0x1000
    ties = (every.view(torch.int32) + half).view(torch.float32)
    v = torch.cat([every, between, ties])
    v = v[: v.numel() // V * V].view(1, -1, V)
    one = torch.ones(1, v.shape[1], 1)
    state = torch.zeros(1, v.shape[1], 1, V, dtype=state_dtype)
    _, new = step(q=one, k=one, v=v, beta=one[..., 0], state=state, rule="linear", scale=1.0)
    expected = v.to(state_dtype)
    torch.testing.assert_close(new[:, :, 0], expected, rtol=0, atol=0, equal_nan=True)
