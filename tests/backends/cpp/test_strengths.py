"""Erase and write in place of beta give what the definition gives, at every level."""

from __future__ import annotations

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
from repeated_calls import HV, B, DecodeCase, K

if library.missing() is not None:
    pytest.skip(f"backend 'cpp': {library.missing()}", allow_module_level=True)

SHAPES = (
    Example(B=2, T=37, H=2, R=2, K=20, V=36, channels=True, apart="channels", initial_state=True),
    Example(T=135, R=3, K=16, V=16, apart="channels", gate="extreme", beta="wide", log_gate=True),
    Example(T=33, K=7, V=5, channels=True, gate="zero", apart="erase", qk_l2norm=True),
    Example(T=74, H=2, K=32, V=33, apart="write", lengths=(0, 5, 64, 0, 5), strided=True),
    Example(T=50, K=130, V=300, apart="scalars", gate="strong", initial_state=True),
    Example(T=70, K=300, V=48, apart="channels", rule="delta", beta="binary"),
)
"""Decays of channels, of heads and none; strengths of both kinds, and 1 in the place of one."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_results_and_gradients_are_those_of_the_definition(
    level: str, shape: int, dtype: str
) -> None:
    verdict = judge(replace(SHAPES[shape], dtype=dtype), "cpp")
    assert verdict.passed, verdict


def test_threads_change_no_bit(level: str) -> None:
    x = {"q": normal(1, 290, 1, 20, seed=1), "k": normal(1, 290, 1, 20, seed=2) / 20**0.5}
    x |= {"v": normal(1, 290, 3, 70, seed=3), "alpha": normal(1, 290, 3, seed=4).sigmoid()}
    x |= {"erase": normal(1, 290, 3, 20, seed=5).sigmoid()}
    x |= {"write": normal(1, 290, 3, seed=6).sigmoid()}
    x = {name: y.requires_grad_() for name, y in x.items()}

    def results() -> list[Tensor]:
        o = gdn_ops.gated_delta(**x, backend="cpp")
        return [o.detach(), *torch.autograd.grad(o.square().sum(), [*x.values()])]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(2)
        assert all(map(torch.equal, alone, results()))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("strength", [1e-30, 1e-20, 1.0])
def test_faint_writes_beside_strong_decays_are_there(level: str, strength: float) -> None:
    # Each chunk keeps less than any number of what was before it, and writes little itself.
    log_alpha = torch.full((1, 96, 1, 16), -3.0)
    log_alpha[:, 40:, :, ::2] = -80.0
    x = {"q": normal(1, 96, 1, 16, seed=1), "k": normal(1, 96, 1, 16, seed=2) / 4}
    x |= {"v": normal(1, 96, 1, 16, seed=3), "log_alpha": log_alpha}
    x |= {"erase": normal(1, 96, 1, 16, seed=4).sigmoid()}
    x["write"] = torch.full((1, 96, 1, 16), strength)
    o, state = gdn_ops.gated_delta(**x, return_state=True, backend="cpp")
    wide = {name: y.double() for name, y in x.items()}
    wanted = gdn_ops.gated_delta(**wide, return_state=True, backend="naive")
    for got, right in zip((o, state), wanted, strict=True):
        assert float((got.double() - right).norm() / right.norm()) < 1e-6


WALKS = (
    Example(T=333, H=2, R=2, K=80, V=40, channels=True, apart="channels", initial_state=True),
    Example(T=90, lengths=(0, 17, 73), K=16, V=7, apart="scalars", dtype="bfloat16"),
)


@pytest.mark.parametrize("walk", range(len(WALKS)))
def test_walks_have_the_bits_of_whole_calls(level: str, walk: int) -> None:
    check_walks(WALKS[walk])


def strengths(*shape: int, V: int = 139) -> dict[str, Tensor | None]:
    """Return strengths of channels in place of beta, some of them 0."""
    erase, write = normal(*shape, HV, K, seed=8).sigmoid(), normal(*shape, HV, V, seed=9).sigmoid()
    erase[..., 3] = write[..., 5] = 0.0
    return {"beta": None, "erase": erase, "write": write}


DECODED: tuple[DecodeCase, ...] = (
    DecodeCase(gdn_ops.gated_delta_step, strengths(B)),
    DecodeCase(gdn_ops.gated_delta_step, strengths(B) | {"erase": None, "inplace": False}),
    DecodeCase(
        gdn_ops.gated_delta_step,
        strengths(B)
        | {"state_indices": torch.tensor([-1, 2]), "alpha": normal(B, HV, K).sigmoid()},
    ),
    DecodeCase(gdn_ops.gated_delta_steps, strengths(B, 3) | {"inplace": False}),
    DecodeCase(gdn_ops.gated_delta_steps, strengths(B, 3) | {"write": None, "return_states": True}),
    DecodeCase(gdn_ops.gated_delta, strengths(B, 3) | {"alpha": None, "rule": "delta"}),
)


@pytest.mark.parametrize("case", range(len(DECODED)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_are_decoded(level: str, case: int, dtype: torch.dtype) -> None:
    one: Any = DECODED[case]._replace(dtype=dtype)
    one.check()
    if one.op is not gdn_ops.gated_delta:
        one._replace(state_dtype=torch.bfloat16).check()
