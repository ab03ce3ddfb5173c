"""A decay acts as itself, however small, in the form alpha and in the form log_alpha."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_ops import gated_delta, gated_delta_step, gated_delta_steps
from gdn_ops.dispatch.registry import Backend, get_backend, known_backends

pytestmark = pytest.mark.filterwarnings("ignore:backend '.*' emulates its kernels")

INSTALLED = [name for name in known_backends() if isinstance(get_backend(name), Backend)]
PLAIN = ("naive", "torch", "compile")

WIDTH = 16


def one_write(
    gates: list[float], value: float, *, is_log: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Return a call whose first token writes `value` along the first axis, and no other writes."""
    T = len(gates)
    k, v = torch.zeros(1, T, 1, WIDTH, dtype=dtype), torch.zeros(1, T, 1, WIDTH, dtype=dtype)
    k[..., 0], v[:, 0] = 1, value
    beta = torch.zeros(1, T, 1, dtype=dtype)
    beta[:, 0] = 1
    gate = torch.tensor(gates, dtype=dtype).view(1, T, 1)
    arguments = {"q": k, "k": k, "v": v, "beta": beta, "scale": 1.0}
    return arguments | {"log_alpha" if is_log else "alpha": gate}


CASES: dict[str, tuple[dict[str, Any], float]] = {
    "1e-38": (one_write([1, 1e-38], 1e18), 1e-20),
    "1e-40": (one_write([1, 1e-40], 1e20), 1e-20),
    "log -87.5": (one_write([0, -87.5], 1e18, is_log=True), math.exp(-87.5) * 1e18),
    "log -95": (one_write([0, -95], 1e20, is_log=True), math.exp(-95) * 1e20),
    "three of 1e-13": (one_write([1, 1e-13, 1e-13, 1e-13], 1e18), 1e-21),
    "after a zero": (one_write([0, 1e-39], 1e18), 1e-21),
}


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("case", CASES)
def test_what_is_left_of_a_large_write_is_right_and_so_are_gradients(
    backend: str, case: str
) -> None:
    arguments, left = CASES[case]
    name = "log_alpha" if "log_alpha" in arguments else "alpha"
    gate = arguments[name].clone().requires_grad_()
    call = arguments | {name: gate, "return_state": True, "backend": backend}
    _, state = gated_delta(**call)
    # exp(-95) is a subnormal float32: right to half of 2**-149.
    assert state[0, 0, 0, 0].item() == pytest.approx(left, rel=2e-4)
    (gradient,) = torch.autograd.grad(state[0, 0, 0, 0], gate)
    wide = {n: x.double() if isinstance(x, Tensor) else x for n, x in arguments.items()}
    exact = arguments[name].double().requires_grad_()
    _, reference = gated_delta(**wide | {name: exact}, return_state=True, backend="naive")
    (expected,) = torch.autograd.grad(reference[0, 0, 0, 0], exact)
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-4, atol=0.0)


@pytest.mark.parametrize("backend", PLAIN)
def test_a_decay_of_float64_reaches_down_as_far(backend: str) -> None:
    for alpha, value in ((1e-308, 1e200), (1e-310, 1e200)):
        arguments = one_write([1, alpha], value, dtype=torch.float64)
        gate = arguments["alpha"].requires_grad_()
        _, state = gated_delta(**arguments, return_state=True, backend=backend)
        assert state[0, 0, 0, 0].item() == pytest.approx(alpha * value, rel=1e-9)
        (gradient,) = torch.autograd.grad(state[0, 0, 0, 0], gate)
        assert gradient[0, 1, 0].item() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("alpha", [2e-38, 1e-38, 1e-40, 1e-44])
def test_the_gradient_of_a_tiny_decay_is_of_the_size_of_what_it_decays(
    backend: str, alpha: float
) -> None:
    for value in (1e18, 1.0, 1e-6):
        arguments = one_write([1, 0.5, alpha, 0.5], value)
        gate = arguments["alpha"].requires_grad_()
        _, state = gated_delta(**arguments, return_state=True, backend=backend)
        (gradient,) = torch.autograd.grad(state[0, 0, 0, 0], gate)
        assert gradient[0, 2, 0].item() == pytest.approx(value / 4, rel=1e-4)


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("case", CASES)
def test_a_few_steps_decay_as_a_sequence_does(backend: str, case: str) -> None:
    arguments, left = CASES[case]
    _, state = gated_delta_steps(**arguments, backend=backend)
    assert state[0, 0, 0, 0].item() == pytest.approx(left, rel=2e-4)
    state = torch.zeros(1, 1, WIDTH, WIDTH)
    for t in range(arguments["q"].shape[1]):
        one = {n: x[:, t] if isinstance(x, Tensor) else x for n, x in arguments.items()}
        _, state = gated_delta_step(**one, state=state, backend=backend)
    assert state[0, 0, 0, 0].item() == pytest.approx(left, rel=2e-4)


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("log_alpha", [-math.inf, -1e30, -1e4, -120.0])
def test_a_logarithm_below_the_range_of_exp_is_an_exact_zero(
    backend: str, log_alpha: float
) -> None:
    arguments = one_write([0, log_alpha, 0], 1e18, is_log=True)
    gate = arguments["log_alpha"].requires_grad_()
    o, state = gated_delta(**arguments, return_state=True, backend=backend)
    (gradient,) = torch.autograd.grad(o.sum() + state.sum(), gate)
    assert not state.any() and not o[:, 1:].any()
    assert not gradient[:, 1:].any() and gradient.isfinite().all()


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("is_log", [False, True])
def test_nan_in_a_gate_is_nan_in_the_state_after_it(backend: str, is_log: bool) -> None:
    arguments = one_write([float(not is_log), math.nan], 1.0, is_log=is_log)
    name = "log_alpha" if is_log else "alpha"
    for needs_grad in (False, True):
        gate = arguments[name].clone().requires_grad_(needs_grad)
        call = arguments | {name: gate, "return_state": True, "backend": backend}
        o, state = gated_delta(**call)
        assert state[0, 0, 0, 0].isnan() and o[0, 1].isnan().any()
