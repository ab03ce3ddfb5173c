"""A step whose gates are raw is one call of the kernels, and gives what gates made before give."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import gdn_ops
from errors import message_of
from gdn_ops import gates
from gdn_ops.backends.cpp import library
from gdn_ops.gates import BoundedGate, SoftplusGate, raw_gated_delta_step
from layer_kernels import assert_close, normal

if library.missing() is not None:
    pytest.skip(f"backend 'cpp': {library.missing()}", allow_module_level=True)

B, H, HV, K, V = 2, 2, 4, 24, 40
EXTREME = torch.tensor([-math.inf, -104.0, -88.0, -17.0, 0.0, 19.9, 88.0, math.inf])


def given(of_channels: bool, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a step with raw gates, some of them as small and as large as can be."""
    g, b = 3 * normal(B, HV, K, seed=1), 3 * normal(B, HV, seed=2)
    g[0, 1, :8] = EXTREME
    b[0] = torch.tensor([-math.inf, -90.0, 20.0, math.inf])
    call = {
        "q": normal(B, H, K, seed=3),
        "k": normal(B, H, K, seed=4),
        "v": normal(B, HV, V, seed=5),
    }
    call |= {"g": g if of_channels else g[..., 0].clone(), "b": b}
    call = {name: x.to(dtype) for name, x in call.items()}
    return (
        call | {"state": normal(B, HV, K, V, seed=6), "qk_l2norm": True, "backend": "cpp"} | changes
    )


def gate_of(kind: str, of_channels: bool, has_bias: bool = True) -> Any:
    A_log = torch.linspace(-5, 2.5, HV)
    dt_bias = normal(HV * K if of_channels else HV, seed=7) if has_bias else None
    if kind == "softplus":
        return SoftplusGate(A_log, dt_bias)
    return BoundedGate(None if kind == "no rate" else A_log, dt_bias, -4.5)


def exact(call: dict[str, Any], gate: Any) -> tuple[Tensor, ...]:
    """Return the results of the definition in float64."""
    wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
            for n, x in call.items()}  # fmt: skip
    parameters = {"A_log": gate.A_log, "dt_bias": gate.dt_bias}
    doubled = {n: None if x is None else x.double() for n, x in parameters.items()}
    if isinstance(gate, BoundedGate):
        doubled["lower_bound"] = gate.lower_bound
    return raw_gated_delta_step(**wide | {"gate": type(gate)(**doubled), "backend": "naive"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_channels", [False, True])
@pytest.mark.parametrize("kind", ["softplus", "bounded", "no rate"])
def test_the_kernels_make_the_gates(
    level: str, kind: str, of_channels: bool, dtype: torch.dtype
) -> None:
    gate = gate_of(kind, of_channels)
    for options in ({}, {"allow_neg_eigval": True, "inplace": True}):
        call = given(of_channels, dtype=dtype)
        wanted = exact(call | options, gate)
        with mock.patch.object(gates, "gated_delta_step") as made_before:
            found = raw_gated_delta_step(**call, **options, gate=gate)
        assert not made_before.called
        assert_close("o state", [*found], [*wanted])
        assert (found[1] is call["state"]) == bool(options)


def test_rows_of_a_pool_are_skipped_and_parameters_may_change() -> None:
    gate = gate_of("softplus", True, has_bias=False)
    for _ in range(2):
        pool = normal(5, HV, K, V, seed=8)
        call = given(True, state=pool, inplace=True, state_indices=torch.tensor([3, -1]))
        before = pool.clone()
        wanted = exact(call, gate)
        found = raw_gated_delta_step(**call, gate=gate)
        assert_close("o state", [*found], [*wanted])
        assert not found[0][1].any() and torch.equal(pool[0], before[0])
        gate.A_log.add_(0.5)


def test_a_function_of_the_raw_gates_is_differentiated() -> None:
    gate = gate_of("bounded", True)
    call = given(True)
    call["g"].requires_grad_()
    o, _ = raw_gated_delta_step(**call, gate=gate)
    (found,) = torch.autograd.grad(o.sum(), call["g"])
    assert found.any()
    rate = torch.nn.Parameter(gate.A_log)
    o, _ = raw_gated_delta_step(**given(True), gate=BoundedGate(rate, gate.dt_bias))
    assert o.requires_grad


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"b": torch.zeros(B, HV + 1)}, "beta has shape (2, 5), should be (B, HV) = (2, 4)"),
        ({"g": torch.zeros(B, HV, K + 1)}, "dt_bias has shape (96,), should be (HV, K) = (4, 25)"),
        ({"k": torch.zeros(B, H, K + 2)}, "k has shape (2, 2, 26), should be (B, H, K)"),
        (
            {"state_indices": torch.tensor([0, 7])},
            "state_indices has values in [0, 7], should be in [-1, 1]",
        ),
    ],
)
def test_what_is_wrong_is_told_as_ever(changes: dict[str, Any], text: str) -> None:
    call = given(True) | changes
    message = message_of(
        gdn_ops.SpecError, lambda: raw_gated_delta_step(**call, gate=gate_of("softplus", True))
    )
    assert text in message


def test_another_backend_is_given_gates_that_are_made() -> None:
    call = given(True, backend="torch")
    gate = gate_of("softplus", True)
    assert_close("o state", [*raw_gated_delta_step(**call, gate=gate)], [*exact(call, gate)])
