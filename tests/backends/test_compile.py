"""What the compile backend compiles, and how often."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gdn_ops
from gdn_ops.backends import compile as compile_backend


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace with torch.compile, but skip its C++ compiler, which takes seconds per shape."""
    monkeypatch.setattr(compile_backend.Compile, "compiler", "eager")
    monkeypatch.setattr(compile_backend, "_functions", {})


def run(backend: str, B: int, T: int, *, grad: bool, strided: bool = False) -> list[Tensor]:
    """Run a call of 2 key heads and 4 value heads; return o and, if asked for, gradients."""
    draw = torch.Generator().manual_seed(T)
    q, k, v = torch.randn(3, B, T, 4, 8, generator=draw)
    q, k = q[:, :, :2], torch.nn.functional.normalize(k[:, :, :2], dim=-1)
    if strided:
        v = torch.randn(B, T, 4, 20, generator=draw)[..., :8]
    gates = torch.rand(2, B, T, 4, generator=draw).unbind()
    x = [y.detach().requires_grad_(grad) for y in (q, k, v, *gates)]
    o = gdn_ops.gated_delta(*x[:3], alpha=x[3], beta=x[4], backend=backend)
    return [o, *torch.autograd.grad(o.square().sum(), x)] if grad else [o]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("grad", [False, True])
def test_a_new_length_does_not_compile_again(grad: bool, B: int, strided: bool) -> None:
    run("compile", B, 40, grad=grad, strided=strided)
    before = len(compile_backend._functions)
    assert before == (2 if grad else 1)
    for T in (1, 7, 31, 32, 1000, 1024, 2049):
        got = run("compile", B, T, grad=grad, strided=strided)
        for one, right in zip(got, run("torch", B, T, grad=grad, strided=strided), strict=True):
            torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-4)
        assert len(compile_backend._functions) == before, T


def test_a_new_number_of_rows_compiles_once() -> None:
    for B in (1, 2, 3, 2, 1, 3):
        run("compile", B, 33, grad=False)
    assert len(compile_backend._functions) == 3


@pytest.mark.parametrize(("T", "functions"), [(1, 0), (16, 0), (17, 2)])
def test_a_batch_whose_rows_fill_half_a_chunk_compiles_nothing(T: int, functions: int) -> None:
    got = run("compile", 3, T, grad=True)
    assert len(compile_backend._functions) == functions
    for one, right in zip(got, run("torch", 3, T, grad=True), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-4)


def test_packed_sequences_that_share_segments_compile_nothing() -> None:
    x = {
        "q": torch.randn(1, 60, 1, 4),
        "k": torch.randn(1, 60, 1, 4),
        "v": torch.randn(1, 60, 1, 4),
    }
    cu_seqlens = torch.tensor([0, 1, 3, 10, 10, 60])
    o = gdn_ops.gated_delta(**x, rule="linear", cu_seqlens=cu_seqlens, backend="compile")
    right = gdn_ops.gated_delta(**x, rule="linear", cu_seqlens=cu_seqlens, backend="naive")
    torch.testing.assert_close(o, right, rtol=1e-4, atol=1e-4)
    # The one of 50 tokens, and the one of 7, have a chunk of their own size to themselves.
    assert len(compile_backend._functions) == 1
