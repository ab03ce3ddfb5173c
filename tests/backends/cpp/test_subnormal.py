"""Subnormal numbers are zero in the kernels where nothing that counts is lost, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from gdn_ops.backends.cpp import library
from gdn_ops.testing import Example
from gdn_ops.testing.oracle import judge

if library.missing() is not None:
    pytest.skip(f"backend 'cpp': {library.missing()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

K = V = 16
FAINT = (2.0**-120, 2.0**-126, 2.0**-128, 2.0**-140)


def arguments(T: int, **changed: Tensor) -> dict[str, Any]:
    """Return a call of one head with ordinary operands in float32, some of them changed."""
    generator = torch.Generator().manual_seed(T)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)

    drawn = {
        "q": draw(1, T, 1, K),
        "k": torch.nn.functional.normalize(draw(1, T, 1, K), dim=-1),
        "v": draw(1, T, 1, V),
        "beta": torch.full((1, T, 1), 0.5, device="cpu", dtype=torch.float32),
        "initial_state": draw(1, 1, K, V),
    }
    return drawn | changed


def gates(*values: float) -> Tensor:
    """Return gates (1, T, 1) in float32."""
    return torch.tensor(values, device="cpu", dtype=torch.float32).reshape(1, -1, 1)


def outputs(backend: str, call: dict[str, Any]) -> list[Tensor]:
    return list(gdn_ops.gated_delta(**call, return_state=True, backend=backend))


def gradients(backend: str, call: dict[str, Any], d_o: Tensor) -> dict[str, Tensor]:
    """Return the gradients of everything for a gradient of the outputs alone."""
    given = {name: x.clone().requires_grad_() for name, x in call.items()}
    o = gdn_ops.gated_delta(**given, backend=backend)
    (o * d_o).sum().backward()
    return {name: x.grad for name, x in given.items() if x.grad is not None}


def wide(call: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() for name, x in call.items()}


def error(x: Tensor, reference: Tensor) -> float:
    size = float(reference.norm())
    assert size > 0
    return float((x.double() - reference).norm()) / size


@pytest.mark.parametrize("in_logarithm", [False, True])
@pytest.mark.parametrize("decay", FAINT)
@pytest.mark.parametrize("state", [1.0, 2.0**66])
def test_a_faint_decay_acts_where_nothing_else_is_left(
    state: float, decay: float, in_logarithm: bool
) -> None:
    gate = gates(decay)
    name = "log_alpha" if in_logarithm else "alpha"
    call = arguments(
        1,
        beta=gates(0.0),
        initial_state=torch.full((1, 1, K, V), state, device="cpu", dtype=torch.float32),
        **{name: gate.double().log().float() if in_logarithm else gate},
    )
    left = outputs("cpp", call)[1]
    torch.testing.assert_close(left, torch.full_like(left, decay * state), rtol=0.01, atol=0)


@pytest.mark.parametrize("T", [2, 20, 45])
@pytest.mark.parametrize("decay", [2.0**-126, 2.0**-132, 2.0**-140])
def test_what_is_left_of_a_large_state_counts_beside_a_write(decay: float, T: int) -> None:
    alpha = torch.ones(1, T, 1, device="cpu", dtype=torch.float32)
    alpha[:, T // 2] = decay
    call = arguments(T, alpha=alpha)
    call["initial_state"] *= 2.0**100
    for x, y in zip(outputs("cpp", call), outputs("naive", wide(call)), strict=True):
        assert error(x, y) < 1e-5


def test_what_is_left_of_a_large_value_counts_beside_a_write() -> None:
    T = 40
    for each in (2.0**-13, 2.0**-16):
        call = arguments(T, alpha=gates(*[each] * T))
        call["v"][:, 23] *= 2.0**126 / call["v"][:, 23].abs().max()
        # Of the end of the first chunk.
        call = {name: x[:, :32] if x.shape[1] == T else x for name, x in call.items()}
        for x, y in zip(outputs("cpp", call), outputs("naive", wide(call)), strict=True):
            assert error(x, y) < 1e-5


def tail(T: int, each: float, written: int) -> dict[str, Any]:
    """Return a call whose tokens from `written` on write nothing, with the same decay in all."""
    call = arguments(T, alpha=gates(*[each] * T))
    call["beta"][:, written:] = 0.0
    return call


@pytest.mark.parametrize("T", [31, 40, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_fades_behind_the_last_write_stays_right(T: int, dtype: torch.dtype) -> None:
    for bits in (118, 124, 130, 134):
        call = tail(T, 2.0 ** (-bits / (T - 10)), 10)
        call |= {name: call[name].to(dtype) for name in ("q", "k", "v")}
        state, reference = outputs("cpp", call)[1], outputs("naive", wide(call))[1]
        assert 2.0 ** (-bits - 6) < float(reference.abs().max()) < 2.0 ** (4 - bits)
        assert error(state, reference) < (2e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("decay", [2.0**-119, 2.0**-124, 2.0**-128, 2.0**-130])
def test_the_gradient_of_a_state_through_a_faint_decay_stays_right(decay: float) -> None:
    T = 40
    rest = [*[0.9] * 6, *[2.0**-30] * (T - 7)]
    alpha = torch.cat([gates(0.9, *rest), gates(decay, *rest)])
    call = {name: torch.cat([x, x]) for name, x in arguments(T).items()} | {"alpha": alpha}
    d_o = torch.ones(2, T, 1, V, device="cpu", dtype=torch.float32)
    own, right = (gradients(name, x, d_o) for name, x in (("cpp", call), ("naive", wide(call))))
    assert float(right["initial_state"][1].norm()) < 2.0**-110
    for name, x in own.items():
        for row in range(2):
            assert error(x[row], right[name][row]) < 1e-4, (name, row)


@pytest.mark.parametrize("given", ["state", "no state"])
@pytest.mark.parametrize("last", [0.0, 0.5])
@pytest.mark.parametrize("read", [6, 38])
def test_gradients_of_one_output_that_reads_a_faint_trace_stay_right(
    read: int, last: float, given: str
) -> None:
    T = 40
    for bits in (60, 100, 118, 124):
        call = tail(T, 2.0 ** -(bits / 6), read - 5)
        call["beta"][:, [31, 39]] = last
        if given == "no state":
            del call["initial_state"]
        d_o = torch.zeros(1, T, 1, V, device="cpu", dtype=torch.float32)
        d_o[:, read] = 1.0
        own, right = (gradients(x, y, d_o) for x, y in (("cpp", call), ("naive", wide(call))))
        for name, x in own.items():
            size = float(right[name].norm())
            off = float((x.double() - right[name]).norm())
            # Flushing loses 2^-126.
            assert off <= 1e-3 * size + 2.0**-140, (bits, name)


@pytest.mark.parametrize("changed", ["q", "k", "v", "initial_state", "d_o", "nothing"])
@pytest.mark.parametrize("factor", [2.0**-114, 2.0**-100, 2.0**-60, 2.0**40])
def test_operands_of_another_size_are_computed_as_they_are(changed: str, factor: float) -> None:
    T = 40
    for each in (2.0**-4, 2.0**-20):
        call = arguments(T, alpha=gates(*[each] * T))
        d_o = torch.ones(1, T, 1, V, device="cpu", dtype=torch.float32)
        if changed == "d_o":
            d_o *= factor
            del call["initial_state"]
        elif changed != "nothing":
            call[changed] *= factor if changed != "k" else min(factor, 1.0)
        own, right = (gradients(x, y, d_o) for x, y in (("cpp", call), ("naive", wide(call))))
        for name, x in own.items():
            # Nothing is promised below the smallest normal number.
            if float(right[name].abs().max()) > 2.0**-120:
                assert error(x, right[name]) < 1e-4, (each, name)
        for x, y in zip(outputs("cpp", call), outputs("naive", wide(call)), strict=True):
            assert error(x, y) < 1e-4


def test_what_is_nothing_beside_a_write_is_zero() -> None:
    T = 32
    call = arguments(T, alpha=gates(*[2.0**-4] * T))
    call["k"][..., 1:] = 0.0
    # Rows that no key reaches fall by 2^-128.
    state = outputs("cpp", call)[1]
    assert bool((state[..., 1:, :] == 0).all())
    assert bool((state[..., 0, :] != 0).all())
    call["beta"].zero_()
    assert bool((outputs("naive", wide(call))[1][..., 1:, :] != 0).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("gate", ["strong", "extreme", "slow", "zero"])
def test_decays_of_every_kind_compute_the_definition(gate: str, dtype: str) -> None:
    for magnitude in ("unit", "faint", "tiny_keys", "large_gradients"):
        example = Example(
            T=70, H=2, R=2, K=16, V=16, lengths=(4, 0, 66), gate=gate, dtype=dtype,
            magnitude=magnitude, initial_state=True, log_gate=True,
        )  # fmt: skip
        verdict = judge(example, "cpp")
        assert verdict.passed, (example, verdict)


def halved() -> float:
    """Return half of a subnormal number, as this thread computes it."""
    tiny = torch.tensor([2.0**-127], device="cpu", dtype=torch.float32)
    return float((tiny * 0.5).double())


def calls() -> list[Callable[[], object]]:
    call = arguments(40, alpha=gates(*[2.0**-4] * 40))
    d_o = torch.ones(1, 40, 1, V, device="cpu", dtype=torch.float32)
    return [lambda: outputs("cpp", call), lambda: gradients("cpp", call, d_o)]


def test_a_thread_computes_as_before_after_a_call() -> None:
    for run in calls():
        run()
        assert halved() == 2.0**-128
        try:
            if not torch.set_flush_denormal(True):
                pytest.skip("this processor cannot flush")
            run()
            assert halved() == 0
        finally:
            torch.set_flush_denormal(False)


@pytest.mark.parametrize("channels", [False, True])
def test_small_half_numbers_are_read_as_they_are(level: str, channels: bool) -> None:
    # Gradients below 2^-14 are subnormal in float16 alone, beside decays that are flushed.
    example = Example(
        T=127, H=2, R=4, K=32, V=32, dtype="float16", gate="strong", beta="none", seed=197,
        keys="repeated", magnitude="tiny_keys", log_gate=True, channels=channels,
        initial_state=True, qk_l2norm=True, scale=0.3,
    )  # fmt: skip
    verdict = judge(example, "cpp")
    assert verdict.passed, verdict
