"""Devices that do not exist, autocast of the other narrow dtype, logits that are no numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from errors import message_of, refusal
from gdn_ops import SpecError, SpecTypeError
from gdn_ops.nn import (
    DecayGate,
    GatedDeltaNet,
    GatedRMSNorm,
    HybridLM,
    ShortConvolution,
    SlidingWindowAttention,
)

NARROW = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("given", [{}, {"lengths": [2, 5]}, {"cu_seqlens": [0, 2, 5]}])
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
@pytest.mark.parametrize("low", NARROW)
def test_a_convolution_is_the_same_under_autocast(
    low: torch.dtype, dtype: torch.dtype, has_state: bool, given: dict[str, list[int]]
) -> None:
    torch.manual_seed(0)
    layer = ShortConvolution(8, bias=True)
    x = torch.randn(1 if "cu_seqlens" in given else 2, 5, 8).to(dtype)
    state = torch.randn(2, 8, 3).to(dtype) if has_state else None
    options = {name: torch.tensor(values) for name, values in given.items()}
    expected = layer(x, state, **options)
    with torch.autocast("cpu", low):
        results = layer(x, state, **options)
    for result, other in zip(results, expected, strict=True):
        assert result.dtype == other.dtype and torch.equal(result, other)


MODULES: dict[str, Callable[..., Any]] = {
    "DecayGate": lambda **made: DecayGate(4, **made),
    "GatedDeltaNet": lambda **made: GatedDeltaNet(64, 2, **made),
    "GatedRMSNorm": lambda **made: GatedRMSNorm(8, **made),
    "HybridLM": lambda **made: HybridLM("GA", 16, 64, num_heads=2, **made),
    "ShortConvolution": lambda **made: ShortConvolution(8, **made),
    "SlidingWindowAttention": lambda **made: SlidingWindowAttention(64, 2, 8, **made),
}
SHOULD = "should be one that torch has here, such as 'cpu' or 'cuda:0'"


@pytest.mark.parametrize("owner", MODULES)
def test_a_device_that_torch_does_not_have_is_refused(owner: str) -> None:
    make = MODULES[owner]
    for device in ("gpu", "cpu:-1", "cuda:4711", torch.device("cuda:99")):
        message = message_of(SpecError, make, device=device)
        start = f"{owner}: device is {str(device)!r}, {SHOULD}: "
        assert message.startswith(start) and len(message) > len(start) and "\n" not in message
    for value, kind in ((3.5, "float"), (True, "bool"), (["cpu"], "list")):
        assert message_of(SpecTypeError, make, device=value) == (
            f"{owner}: device has type {kind}, {SHOULD}"
        )
    for device in ("cpu", "meta", torch.device("meta")):
        assert {x.device for x in make(device=device).parameters()} == {torch.device(device)}


@pytest.mark.parametrize("owner", ["GatedDeltaNet", "ShortConvolution", "SlidingWindowAttention"])
def test_a_layer_behind_a_layer_in_a_sequential_is_told_what_to_do(owner: str) -> None:
    layer = MODULES[owner]()
    x = torch.randn(1, 5, 8 if owner == "ShortConvolution" else 64)
    assert message_of(SpecTypeError, torch.nn.Sequential(layer, layer), x) == (
        f"{owner}: x has type tuple, should be a torch.Tensor; layers return (y, state): pass y on"
    )
    y, _ = torch.nn.DataParallel(layer)(x)
    assert torch.equal(y, layer(x)[0])


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(
    ("value", "shown"),
    [(float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf")],
)
def test_logits_that_are_no_numbers_are_refused(
    value: float, shown: str, temperature: float
) -> None:
    lm = HybridLM("G", 16, 64, num_heads=2)
    with torch.no_grad():
        lm.logits = lambda x: torch.zeros(*x.shape[:-1], 16).index_fill_(  # type: ignore[method-assign]
            0, torch.tensor([1]), value
        )
    tokens = torch.zeros(3, 2, dtype=torch.int64)
    assert refusal(lm.generate, tokens, 2, temperature=temperature) == (
        f"HybridLM.generate: the logits of row 1 have the maximum {shown}, should have a finite "
        "one: look for NaN and infinity in the parameters, and whether float32 holds what the "
        "layers compute"
    )


def test_parameters_that_are_no_numbers_are_found_by_generate() -> None:
    lm = HybridLM("GA", 16, 64, num_heads=2, dtype=torch.bfloat16)
    torch.nn.init.constant_(lm.norm.weight, float("nan"))
    message = refusal(lm.generate, torch.zeros(1, 2, dtype=torch.int64), 1)
    assert message.startswith("HybridLM.generate: the logits of row 0 have the maximum nan, ")
    assert message.endswith("whether bfloat16 holds what the layers compute")


def test_logits_that_exclude_tokens_are_drawn_from() -> None:
    lm = HybridLM("G", 16, 64, num_heads=2)
    excluded = torch.full((16,), -float("inf")).index_fill_(0, torch.tensor([7]), 0.0)
    lm.logits = lambda x: excluded.expand(*x.shape[:-1], 16)  # type: ignore[method-assign]
    drawn = lm.generate(torch.zeros(2, 1, dtype=torch.int64), 3)
    assert torch.equal(drawn[:, 1:], torch.full((2, 3), 7))
