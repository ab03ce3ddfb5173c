"""What a layer is told of padding and of packed sequences is checked as the op's arguments are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from errors import message_of
from gdn_ops import SpecError
from gdn_ops.nn import GatedDeltaNet, ShortConvolution

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, TOKENS = 16, 9


def make(**options: Any) -> GatedDeltaNet:
    torch.manual_seed(0)
    return GatedDeltaNet(WIDTH, 2, head_dim=4, **options)


def inputs(rows: int = 1) -> Tensor:
    return torch.randn(rows, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


BOUNDARIES: dict[str, tuple[int, Any]] = {
    "cu_seqlens ends with 7, should end with T = 9": (1, ints(0, 4, 7)),
    "cu_seqlens starts with 4, should start with 0; lengths become boundaries as 0 and their "
    "running sums": (1, ints(4, 5)),
    "cu_seqlens starts with 1, should start with 0": (1, ints(1, 9)),
    "cu_seqlens decreases at index 2 (5 to 4), should be non-decreasing": (1, ints(0, 5, 4, 9)),
    "cu_seqlens ends with 12, should end with T = 9": (1, ints(0, 12)),
    "cu_seqlens has type list, should be a torch.Tensor": (1, [0, 4, 9]),
    "cu_seqlens has dtype float32, should be one of int64, int32": (1, torch.tensor([0.0, 9.0])),
    "cu_seqlens has shape (1, 3), should be (N+1,): 1 dimension, not 2": (1, ints(0, 4, 9)[None]),
    "cu_seqlens is empty, should be 0, ..., T": (1, ints()),
    "x has B=2 rows, should be 1 when cu_seqlens is given": (2, ints(0, 4, 9)),
    "cu_seqlens is on meta, should be on cpu, the device of x": (1, ints(0, 9).to("meta")),
}


@pytest.mark.parametrize("short_conv", [4, 0])
@pytest.mark.parametrize(("message", "call"), BOUNDARIES.items())
def test_wrong_boundaries_are_refused(message: str, call: tuple[int, Any], short_conv: int) -> None:
    rows, cuts = call
    text = message_of(SpecError, make(short_conv=short_conv), inputs(rows), cu_seqlens=cuts)
    assert text == f"GatedDeltaNet: {message}"


@pytest.mark.parametrize(("message", "call"), BOUNDARIES.items())
def test_a_convolution_refuses_wrong_boundaries(message: str, call: tuple[int, Any]) -> None:
    rows, cuts = call
    text = message_of(SpecError, ShortConvolution(WIDTH), inputs(rows), cu_seqlens=cuts)
    assert text == f"ShortConvolution: {message}"


MASKS: dict[str, Any] = {
    "mask has the value 2, should have 1 for a token and 0 for padding": torch.full((1, 9), 2),
    "mask has the value -10000, should have 1 for a token and 0 for padding": torch.tensor(
        [[0.0] * 8 + [-1e4]]
    ),
    "mask has the value -inf, should have 1 for a token and 0 for padding": torch.tensor(
        [[0.0] * 8 + [-torch.inf]]
    ),
    "mask has the value nan, should have 1 for a token and 0 for padding": torch.tensor(
        [[torch.nan] + [1.0] * 8]
    ),
    "mask has shape (9,), should be (B, T) = (1, 9), 0 where a token is padding": torch.ones(9),
    "mask has shape (1, 1, 9), should be (B, T) = (1, 9), 0 where a token is padding": torch.ones(
        1, 1, 9
    ),
    "mask has shape (1, 8), should be (B, T) = (1, 9), 0 where a token is padding": torch.ones(
        1, 8
    ),
    "mask has type list, should be a torch.Tensor": [[1] * 9],
    "mask is on meta, should be on cpu, the device of x": torch.ones(1, 9, device="meta"),
}


@pytest.mark.parametrize(("message", "mask"), MASKS.items())
def test_a_wrong_mask_is_refused(message: str, mask: Any) -> None:
    assert message_of(SpecError, make(), inputs(), mask=mask) == f"GatedDeltaNet: {message}"


def test_a_mask_and_boundaries_are_refused_together() -> None:
    options = {"mask": torch.ones(1, TOKENS), "cu_seqlens": ints(0, TOKENS)}
    assert message_of(SpecError, make(), inputs(), **options) == (
        "GatedDeltaNet: mask and cu_seqlens are both given, should be one of them: packing has no "
        "padding"
    )


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16]
)
@pytest.mark.parametrize("short_conv", [4, 0])
def test_a_mask_of_any_dtype_keeps_rows_as_they_are_alone(
    dtype: torch.dtype, short_conv: int
) -> None:
    layer, x = make(short_conv=short_conv), inputs(3)
    mask = torch.ones(3, TOKENS)
    mask[0, 2:5] = 0
    mask[1] = 0
    start = layer(inputs(3).flip(1))[1]
    with torch.no_grad():
        y, state = layer(x, start, mask=mask.to(dtype))
        kept = mask[0] != 0
        row = type(start)(*(None if part is None else part[:1] for part in start))
        alone, own = layer(x[:1, kept], row)
    torch.testing.assert_close(y[:1, kept], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.memory[:1], own.memory, rtol=1e-5, atol=1e-5)
    # A row without tokens is 0, and its state stays.
    assert y[1].eq(0).all()
    assert y[0, ~kept].eq(0).all()
    for before, after in zip(start, state, strict=True):
        assert before is None or torch.equal(before[1], after[1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_boundaries_of_either_dtype_keep_sequences_apart(dtype: torch.dtype) -> None:
    layer, x = make(), inputs()
    with torch.no_grad():
        y, state = layer(x, cu_seqlens=ints(0, 4, 4, 9, dtype=dtype))
        parts = [layer(x[:, :4]), layer(x[:, 4:])]
    torch.testing.assert_close(y, torch.cat([part[0] for part in parts], 1), rtol=1e-5, atol=1e-5)
    memory = torch.cat([part[1].memory for part in parts])
    torch.testing.assert_close(state.memory[[0, 2]], memory, rtol=1e-5, atol=1e-5)
    assert state.memory[1].eq(0).all()


CONVOLVED: dict[str, dict[str, Any]] = {
    "x has shape (1, 9, 3), should be (B, T, channels) with channels = 16": {
        "x": torch.zeros(1, 9, 3)
    },
    "lengths has values in [4, 12], should be in [0, T] = [0, 9]": {
        "x": torch.zeros(2, 9, 16),
        "lengths": ints(4, 12),
    },
    "lengths has shape (3,), should be (B,) = (1,)": {"lengths": ints(1, 2, 3)},
    "lengths has dtype float32, should be int64 or int32": {"lengths": torch.ones(1)},
    "lengths has type list, should be a torch.Tensor": {"lengths": [9]},
    "lengths and cu_seqlens are both given, should be one of them: packing has no padding": {
        "lengths": ints(9),
        "cu_seqlens": ints(0, 9),
    },
    "state has shape (1, 16, 3), should be (N, channels, kernel_size - 1) = (2, 16, 3)": {
        "state": torch.zeros(1, 16, 3),
        "cu_seqlens": ints(0, 4, 9),
    },
}


@pytest.mark.parametrize(("message", "call"), CONVOLVED.items())
def test_a_convolution_refuses_inputs_that_do_not_fit(message: str, call: dict[str, Any]) -> None:
    arguments = {"x": inputs(), **call}
    assert message_of(SpecError, ShortConvolution(WIDTH), **arguments) == (
        f"ShortConvolution: {message}"
    )


NAMES: dict[str, Any] = {
    "got an unknown argument 'num_v_heads', should be num_value_heads": lambda: make(num_v_heads=4),
    "got an unknown argument 'use_short_conv', should be short_conv, the kernel size; 0 for none": (
        lambda: make(use_short_conv=True)
    ),
    "got an unknown argument 'linear_key_head_dim', should be head_dim": (
        lambda: make(linear_key_head_dim=4)
    ),
    "got an unknown argument 'kda_lower_bound', should be lower_bound": (
        lambda: make(kda_lower_bound=-5.0)
    ),
    "got an unknown argument 'safe_gate', should be lower_bound, a number in [-5, 0) for the "
    "bounded gate; None for softplus": lambda: make(safe_gate=True),
    "got an unknown argument 'd_conv', should be short_conv": lambda: make(d_conv=4),
    "got an unknown argument 'num_head', should be 'num_heads'?": lambda: make(num_head=4),
    "got an unknown argument 'attention_mask', should be mask, (B, T), 0 where a token is "
    "padding": (lambda: make()(inputs(), attention_mask=torch.ones(1, TOKENS))),
    "got an unknown argument 'past_key_values', should be state": (
        lambda: make()(inputs(), past_key_values=None)
    ),
    "got an unknown argument 'position_ids', should be cu_seqlens, the boundaries of sequences "
    "packed along T: 0, ..., T": lambda: make()(inputs(), position_ids=ints(0, 1, 0)),
    "got an unknown argument 'cu_seqlen', should be 'cu_seqlens'?": (
        lambda: make()(inputs(), cu_seqlen=ints(0, 9))
    ),
}


@pytest.mark.parametrize(("message", "action"), NAMES.items())
def test_a_name_of_another_library_is_told_the_one_here(message: str, action: Any) -> None:
    assert message_of(SpecError, action) == f"GatedDeltaNet: {message}"
