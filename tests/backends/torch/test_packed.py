"""Packed sequences on the torch backend: they run side by side, whatever their lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import gdn_ops
from gdn_ops.backends.torch import Torch, segments
from gdn_ops.backends.torch.chunk_forward import forward_segment
from gdn_ops.backends.torch.segments import SegmentPlan

LENGTHS = {
    "ones": [1] * 40,
    "with empty ones": [1, 0, 3, 0, 0, 1, 1],
    "one long beside short ones": [1, 2, 1, 150, 1, 1, 2, 1],
    "ragged": [33, 1, 70, 16, 17, 140, 7, 31, 32, 5, 100, 2],
    "equal": [12] * 9,
    "long and equal": [64] * 5,
    "none": [],
}


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)])


def operands(tokens: int, sequences: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Draw q, k, v, alpha, beta and an initial state of 2 key heads and 4 value heads."""
    draw = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=dtype)

    alpha = torch.sigmoid(normal(1, tokens, 4) + 2)
    alpha[normal(1, tokens, 4) > 1.5] = 0
    return {
        "q": normal(1, tokens, 2, 8),
        "k": torch.nn.functional.normalize(normal(1, tokens, 2, 8), dim=-1),
        "v": normal(1, tokens, 4, 5),
        "alpha": alpha,
        "beta": torch.sigmoid(normal(1, tokens, 4)),
        "initial_state": normal(sequences, 4, 8, 5),
    }


def run(backend: str, x: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Return o, the states and the gradients of all operands."""
    leaves = {name: y.clone().requires_grad_() for name, y in x.items()}
    o, state = gdn_ops.gated_delta(**leaves, return_state=True, backend=backend, **options)
    loss = (o * o.detach().cos()).sum() + (state * state.detach().sin()).sum()
    return [o, state, *torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)]


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("cohort_bytes", [1, 20_000, segments.COHORT_BYTES])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_sequences_equal_the_definition(
    lengths: list[int], cohort_bytes: int, chunk_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "COHORT_BYTES", cohort_bytes)
    monkeypatch.setattr(segments, "MOST_STATES", 2)
    x, cu_seqlens = operands(sum(lengths), len(lengths)), boundaries(lengths)
    got = run("torch", x, cu_seqlens=cu_seqlens, chunk_size=chunk_size)
    for one, right in zip(got, run("naive", x, cu_seqlens=cu_seqlens), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("lengths", [[3, 1, 0, 20], [2] * 5], ids=str)
def test_packed_sequences_have_second_derivatives(lengths: list[int]) -> None:
    x, cu_seqlens = operands(sum(lengths), len(lengths)), boundaries(lengths)
    x["alpha"] = x["alpha"].clamp(min=0.1)

    def second(backend: str) -> tuple[Tensor, ...]:
        leaves = {name: y.clone().requires_grad_() for name, y in x.items()}
        o, state = gdn_ops.gated_delta(
            **leaves, cu_seqlens=cu_seqlens, return_state=True, backend=backend
        )
        wanted = list(leaves.values())
        loss = o.pow(2).sum() + state.pow(3).sum()
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        return torch.autograd.grad(sum(y.pow(2).sum() for y in first), wanted)

    for one, right in zip(second("torch"), second("naive"), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-8, atol=1e-9)


def count_segments(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> int:
    """Return how many segments the torch backend runs."""
    count = 0

    def forward(*arguments: Any) -> Tensor:
        nonlocal count
        count += 1
        return forward_segment(*arguments)

    plan = Torch.plan

    def counted(self: Torch, asked: Any) -> SegmentPlan:
        return replace(plan(self, asked), forward=forward)

    with monkeypatch.context() as patch:
        patch.setattr(Torch, "plan", counted)
        call()
    return count


def test_no_segment_is_run_per_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    def segments_of(lengths: list[int]) -> int:
        x = operands(sum(lengths), len(lengths), torch.float32)
        cu_seqlens = boundaries(lengths)
        return count_segments(
            monkeypatch, lambda: gdn_ops.gated_delta(**x, cu_seqlens=cu_seqlens, backend="torch")
        )

    assert segments_of([1] * 4096) == 1
    assert segments_of([1, 2, 3, 4] * 1024) <= 8
    alone, beside = segments_of([2048]), segments_of([1] * 2000 + [2048] + [1] * 2000)
    assert beside == alone + 1


def test_seventy_thousand_sequences_of_a_token_equal_a_step_of_as_many_rows() -> None:
    count = 70_000
    x = operands(count, 0, torch.float32)
    del x["initial_state"]
    o, state = gdn_ops.gated_delta(
        **x, cu_seqlens=torch.arange(count + 1), return_state=True, backend="torch"
    )
    one, new = gdn_ops.gated_delta_step(**{name: y[0] for name, y in x.items()}, backend="naive")
    torch.testing.assert_close(o[0], one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, new, rtol=1e-5, atol=1e-6)


def test_a_chunk_depends_on_the_length_of_its_own_sequence() -> None:
    plan = SegmentPlan(chunk_size=24, chunks=4)
    lengths = numpy.array([0, 1, 2, 3, 5, 16, 17, 24, 1000])
    assert plan.chunk_of(lengths).tolist() == [1, 1, 2, 4, 8, 16, 24, 24, 24]


@pytest.mark.parametrize("lengths", [[0], [128], [129], [400, 1, 1, 0, 257, 128] * 3], ids=str)
def test_kept_states_fit_their_bound(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "COHORT_BYTES", 20_000)
    x, cu_seqlens = operands(sum(lengths), len(lengths), torch.float32), boundaries(lengths)
    bound = sum(lengths) // (32 * 4)
    kept: list[Tensor] = []
    forward = Torch.forward

    def watched(self: Torch, call: Any) -> Any:
        result = forward(self, call)
        kept.extend(result.saved)
        assert self.saved_like(call)[0].shape == result.saved[0].shape
        return result

    monkeypatch.setattr(Torch, "forward", watched)
    leaves = {n: y.requires_grad_() for n, y in x.items()}
    gdn_ops.gated_delta(**leaves, cu_seqlens=cu_seqlens, backend="torch")
    assert kept[0].shape == (bound, 2, 8, 10)
    used = sum(max(0, -(-length // 128) - 1) for length in lengths)
    assert used <= bound
    assert (kept[0][:used].flatten(1).abs().amax(1) > 0).all()
    assert (kept[0][used:] == 0).all()
