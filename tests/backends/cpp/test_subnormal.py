"""Subnormal numbers are zero in the kernels, but for a faint decay of a large state."""

from __future__ import annotations

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


def final_state(state: float, decay: float, **options: bool) -> Tensor:
    """Return what is left of a state of equal numbers behind one token that writes nothing."""
    x = torch.ones(1, 1, 1, 16)
    gates = {"beta": torch.zeros(1, 1, 1)}
    if options.get("in_logarithm"):
        gates["log_alpha"] = torch.full((1, 1, 1), decay).double().log().float()
    else:
        gates["alpha"] = torch.full((1, 1, 1), decay)
    initial = torch.full((1, 1, 16, 16), state)
    _, final = gdn_ops.gated_delta(
        x, x, x, **gates, initial_state=initial, return_state=True, backend="cpp"
    )
    return final


@pytest.mark.parametrize("in_logarithm", [False, True])
@pytest.mark.parametrize("decay", [2.0**-120, 2.0**-126, 2.0**-128, 2.0**-132])
def test_a_faint_decay_of_a_large_state_acts(decay: float, in_logarithm: bool) -> None:
    left = final_state(2.0**66, decay, in_logarithm=in_logarithm)
    torch.testing.assert_close(left, torch.full_like(left, decay * 2.0**66), rtol=0.1, atol=0)


def test_a_faint_decay_of_another_state_leaves_nothing_or_what_it_should() -> None:
    assert bool((final_state(1.0, 2.0**-128) == 0).all())
    assert bool((final_state(1.0, 2.0**-120) == 2.0**-120).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("gate", ["strong", "extreme", "slow", "zero"])
def test_decays_of_every_kind_compute_the_definition(gate: str, dtype: str) -> None:
    for magnitude in ("unit", "faint"):
        example = Example(
            T=70, H=2, R=2, K=16, V=16, lengths=(4, 0, 66), gate=gate, dtype=dtype,
            magnitude=magnitude, initial_state=True, log_gate=True,
        )  # fmt: skip
        verdict = judge(example, "cpp")
        assert verdict.passed, (example, verdict)


def test_the_thread_computes_as_before_after_a_call() -> None:
    final_state(1.0, 2.0**-128)
    tiny = torch.tensor([2.0**-127])
    assert float((tiny * torch.tensor([0.5])).double()) == 2.0**-128
    try:
        torch.set_flush_denormal(True)
        final_state(2.0**66, 2.0**-128)
        assert float((tiny * torch.tensor([0.5])).double()) == 0
    finally:
        torch.set_flush_denormal(False)
