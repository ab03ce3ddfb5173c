"""A decay of every key channel gives what the definition gives, at every level."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from cpp_walks import check_walks
from gdn_ops.backends.cpp import library
from gdn_ops.testing import Example
from gdn_ops.testing.oracle import judge
from layer_kernels import normal
from repeated_calls import HV, DecodeCase, K, given

if library.missing() is not None:
    pytest.skip(f"backend 'cpp': {library.missing()}", allow_module_level=True)

SHAPES = (
    Example(B=2, T=37, H=2, R=2, K=20, V=36, channels=True, initial_state=True),
    Example(T=135, R=3, K=16, V=16, channels=True, gate="extreme", beta="wide", log_gate=True),
    Example(T=33, K=7, V=5, channels=True, gate="zero", qk_l2norm=True),
    Example(T=74, H=2, K=32, V=33, channels=True, lengths=(0, 5, 64, 0, 5), strided=True),
    Example(T=50, K=130, V=70, channels=True, gate="strong", rule="gated", initial_state=True),
)
"""Whole and cut chunks and blocks, exact zeros, empty sequences, decays that leave nothing."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_results_and_gradients_are_those_of_the_definition(
    level: str, shape: int, dtype: str
) -> None:
    verdict = judge(replace(SHAPES[shape], dtype=dtype), "cpp")
    assert verdict.passed, verdict


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_faint_decay_acts_on_a_large_state(dtype: str) -> None:
    example = Example(
        T=150, K=1, V=1, dtype=dtype, channels=True, magnitude="faint", lengths=(0, 150, 0),
        initial_state=True,
    )  # fmt: skip
    verdict = judge(example, "cpp")
    assert verdict.passed, verdict


def drawn(T: int, K: int, V: int, log_alpha: Tensor) -> dict[str, Tensor]:
    """Return a call of two value heads that ask for gradients."""
    x = {"q": normal(1, T, 1, K, seed=1), "k": normal(1, T, 1, K, seed=2) / K**0.5}
    x |= {"v": normal(1, T, 2, V, seed=3), "beta": normal(1, T, 2, seed=4).sigmoid()}
    x |= {"log_alpha": log_alpha, "initial_state": normal(1, 2, K, V, seed=5)}
    return {name: y.detach().requires_grad_() for name, y in x.items()}


def results(x: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Return the output, the state and all gradients of a call."""
    o, state = gdn_ops.gated_delta(**x, return_state=True, backend="cpp", **options)
    grads = torch.autograd.grad((o.sum() + state.square().sum()), [*x.values()])
    return [o.detach(), state.detach(), *grads]


def test_long_strong_decays_leave_numbers(level: str) -> None:
    log_alpha = torch.full((1, 300, 2, 24), -60.0)
    log_alpha[..., ::3], log_alpha[..., 1] = -1e-4, -math.inf
    log_alpha[:, 200:, :, 2] = -87.5
    for x in results(drawn(300, 24, 24, log_alpha)):
        assert bool(torch.isfinite(x).all()) and bool(x.any())


def test_threads_and_parts_of_a_head_change_no_bit(level: str) -> None:
    # Two value heads and two panels of columns are parts of their own, of runs of four chunks.
    x = drawn(290, 20, 70, -normal(1, 290, 2, 20, seed=6).abs())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(x)
        torch.set_num_threads(2)
        assert all(map(torch.equal, alone, results(x)))
    finally:
        torch.set_num_threads(before)
    exact = {name: y.detach().double().requires_grad_() for name, y in x.items()}
    o, state = gdn_ops.gated_delta(**exact, return_state=True, backend="torch")
    wanted = torch.autograd.grad(o.sum() + state.square().sum(), [*exact.values()])
    for got, right in zip(alone, (o.detach(), state.detach(), *wanted), strict=True):
        assert float((got.double() - right).norm() / right.norm()) < 2e-6


def test_a_decay_of_zero_has_its_gradient(level: str) -> None:
    alpha = normal(1, 40, 2, 8, seed=7).sigmoid()
    alpha[:, ::7, :, ::2] = 0.0
    x = drawn(40, 8, 8, torch.zeros(()))
    del x["log_alpha"]
    found = {}
    for backend, dtype in (("cpp", torch.float32), ("naive", torch.float64)):
        gate = alpha.to(dtype).requires_grad_()
        own = {name: y.detach().to(dtype) for name, y in x.items()}
        o = gdn_ops.gated_delta(**own, alpha=gate, backend=backend)
        (found[backend],) = torch.autograd.grad(o.square().sum(), gate)
    at_zero = alpha == 0
    assert bool(found["naive"][at_zero].any())
    error = (found["cpp"].double() - found["naive"]).abs()
    assert float(error[at_zero].max()) < 1e-5 * float(found["naive"][at_zero].abs().max())
    assert float(error.max()) < 1e-5 * float(found["naive"].abs().max())


WALKS = (
    Example(T=333, H=2, R=2, K=80, V=40, channels=True, initial_state=True, gate="slow"),
    Example(T=140, K=64, V=130, channels=True, dtype="bfloat16", gate="extreme"),
    Example(T=90, lengths=(0, 17, 73), K=16, V=7, channels=True, rule="gated"),
)


@pytest.mark.parametrize("walk", range(len(WALKS)))
def test_walks_have_the_bits_of_whole_calls(level: str, walk: int) -> None:
    check_walks(WALKS[walk])


# Decoding.


def rows(*shape: int) -> Tensor:
    """Return decays of channels, one of them 0."""
    decays = normal(*shape, HV, K, seed=8).sigmoid()
    decays[..., 3] = 0.0
    return decays


DECODED = (
    DecodeCase(gdn_ops.gated_delta_step, {"alpha": rows(2)}),
    DecodeCase(gdn_ops.gated_delta_step, {"alpha": rows(2), "inplace": False}),
    DecodeCase(
        gdn_ops.gated_delta_step, {"alpha": rows(2), "state_indices": torch.tensor([-1, 2])}
    ),
    DecodeCase(gdn_ops.gated_delta_steps, {"alpha": rows(2, 3)}),
    DecodeCase(
        gdn_ops.gated_delta_steps,
        {"alpha": None, "log_alpha": rows(2, 3).log(), "inplace": False, "return_states": True},
    ),
    DecodeCase(gdn_ops.gated_delta, {"alpha": rows(2, 3), "rule": "gated"}),
)


@pytest.mark.parametrize("case", range(len(DECODED)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_are_decoded_one_after_another(level: str, case: int, dtype: torch.dtype) -> None:
    DECODED[case]._replace(dtype=dtype).check()
    if DECODED[case].op is not gdn_ops.gated_delta:
        DECODED[case]._replace(state_dtype=dtype).check()


def test_steps_are_one_step_after_another_bit_for_bit(level: str) -> None:
    x = {"q": normal(2, 3, 2, 40, seed=1), "k": normal(2, 3, 2, 40, seed=2) / 7}
    x |= {"v": normal(2, 3, 4, 136, seed=3), "beta": normal(2, 3, 4, seed=4).sigmoid()}
    x["log_alpha"] = -normal(2, 3, 4, 40, seed=5).abs()
    start = normal(2, 4, 40, 136, seed=6)
    o, state = gdn_ops.gated_delta_steps(**x, state=start, backend="cpp")
    for t in range(3):
        token = {name: y[:, t] for name, y in x.items()}
        alone, start = gdn_ops.gated_delta_step(**token, state=start, backend="cpp")
        assert torch.equal(o[:, t], alone)
    assert torch.equal(state, start)


def test_a_decay_out_of_its_domain_changes_no_state() -> None:
    arguments = given(gdn_ops.gated_delta_step, backend="cpp", alpha=rows(2))
    gdn_ops.gated_delta_step(**arguments)
    before = arguments["state"].clone()
    arguments["alpha"][-1, -1, -1] = 1.5
    text = r"^gated_delta_step: alpha has values in \[0, 1.5\], should be in \[0, 1\]$"
    with pytest.raises(gdn_ops.SpecError, match=text):
        gdn_ops.gated_delta_step(**arguments)
    assert torch.equal(arguments["state"], before)


def test_gaps_between_decays_are_passed_over() -> None:
    wide = torch.zeros(2, HV, 2 * K + 1)
    view = wide[..., 1::2]
    view.copy_(rows(2))
    x = given(gdn_ops.gated_delta_step, backend="cpp", inplace=False)
    found = gdn_ops.gated_delta_step(**x | {"alpha": view})
    same = gdn_ops.gated_delta_step(**x | {"alpha": view.contiguous()})
    assert not view.is_contiguous() and all(map(torch.equal, found, same))
