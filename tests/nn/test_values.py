"""An option or an input of the wrong kind is refused by name, in layers, their parts and models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from errors import message_of
from gdn_ops import SpecError
from gdn_ops.nn import (
    GatedDeltaNet,
    GatedRMSNorm,
    HybridLM,
    KeyValueRing,
    ShortConvolution,
    SlidingWindowAttention,
    State,
    gate,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, WINDOW = 16, 4
FLOATS = "torch.float64, torch.float32, torch.bfloat16, torch.float16"
NUMBER = "a finite number of at least 0"
ROWS = "a layer here with attention takes whole rows of one length, without padding"


def layer(**options: Any) -> GatedDeltaNet:
    torch.manual_seed(0)
    return GatedDeltaNet(WIDTH, **{"num_heads": 2, "head_dim": 4, **options})


def attention(**options: Any) -> SlidingWindowAttention:
    torch.manual_seed(0)
    return SlidingWindowAttention(WIDTH, **{"num_heads": 2, "window": WINDOW, **options})


def model(pattern: Any = "GA", **options: Any) -> HybridLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_heads": 2, "head_dim": 4, "window": WINDOW}
    return HybridLM(pattern, 20, WIDTH, **{**sizes, **options})


def inputs(tokens: int = 6) -> Tensor:
    return torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(1))


def words(*values: int) -> Tensor:
    return torch.tensor([values], dtype=torch.int64)


MADE: dict[str, Callable[[], Any]] = {
    "GatedDeltaNet: num_heads is 0, should be a positive integer": lambda: layer(num_heads=0),
    "GatedDeltaNet: num_heads is 2.0, should be a positive integer": lambda: layer(num_heads=2.0),
    "GatedDeltaNet: num_heads is '2', should be a positive integer": lambda: layer(num_heads="2"),
    "GatedDeltaNet: head_dim is True, should be a positive integer": lambda: layer(head_dim=True),
    "GatedDeltaNet: num_value_heads is -2, should be a positive integer": (
        lambda: layer(num_value_heads=-2)
    ),
    # FLA's use_short_conv=True; True would be a kernel of size 1.
    "GatedDeltaNet: short_conv is True, should be an integer of at least 0": (
        lambda: layer(short_conv=True)
    ),
    "GatedDeltaNet: short_conv is -1, should be an integer of at least 0": (
        lambda: layer(short_conv=-1)
    ),
    f"GatedDeltaNet: expand_v is nan, should be {NUMBER}": lambda: layer(expand_v=float("nan")),
    f"GatedDeltaNet: norm_eps is -1, should be {NUMBER}": lambda: layer(norm_eps=-1),
    f"GatedDeltaNet: norm_eps is '1e-5', should be {NUMBER}": lambda: layer(norm_eps="1e-5"),
    "GatedDeltaNet: allow_neg_eigval is 'no', should be True or False": (
        lambda: layer(allow_neg_eigval="no")
    ),
    f"GatedDeltaNet: dtype is torch.int64, should be one of {FLOATS}": (
        lambda: layer(dtype=torch.int64)
    ),
    f"GatedDeltaNet: dtype is 'float32', should be one of {FLOATS}": (
        lambda: layer(dtype="float32")
    ),
    "ShortConvolution: kernel_size is 0, should be a positive integer": (
        lambda: ShortConvolution(4, 0)
    ),
    f"GatedRMSNorm: eps is nan, should be {NUMBER}": lambda: GatedRMSNorm(4, float("nan")),
    "SlidingWindowAttention: window is 4.0, should be an integer of at least 0": (
        lambda: attention(window=4.0)
    ),
    "SlidingWindowAttention: rope_base is 0, should be above 0": lambda: attention(rope_base=0),
    "SlidingWindowAttention: got an unknown argument 'config', should be hidden_size, num_heads, "
    "...; gdn_ops.nn.from_transformers converts a layer": lambda: attention(config=None),
    "HybridLM: num_layers is True, should be a positive integer": lambda: model(num_layers=True),
    "HybridLM: num_layers is 2.0, should be a positive integer": lambda: model(num_layers=2.0),
    "HybridLM: mlp_size is -3, should be an integer of at least 0": lambda: model(mlp_size=-3),
    "HybridLM: pattern is ['G', 'A'], should be a string of letters": lambda: model(["G", "A"]),
    "HybridLM: got an unknown argument 'intermediate_size', should be mlp_size": (
        lambda: model(intermediate_size=3)
    ),
    # Also where no layer takes the option.
    "HybridLM: got an unknown argument 'num_v_heads', should be num_value_heads": (
        lambda: model("A", num_v_heads=3)
    ),
    "HybridLM: rule is 'nope', should be one of gated_delta, delta, gated, linear": (
        lambda: model("MA", rule="nope")
    ),
    "HybridLM: window is -3, should be a positive integer": lambda: model("G", window=-3),
}


@pytest.mark.parametrize(("message", "action"), MADE.items())
def test_an_option_of_a_wrong_value_is_refused(message: str, action: Callable[[], Any]) -> None:
    assert message_of(SpecError, action) == message


START = State(torch.zeros(1, 32, 3), torch.zeros(1, 2, 4, 8))
RING = KeyValueRing(*torch.zeros(2, 1, 2, WINDOW, 8), torch.tensor(3))
LATER = "that an earlier call returned"

GIVEN: dict[str, Callable[[], Any]] = {
    "GatedDeltaNet: x has type list, should be a torch.Tensor": lambda: layer()([[1.0]]),
    "GatedDeltaNet: x has dtype int64, should be a float": lambda: layer()(inputs().long()),
    f"GatedDeltaNet: state has type tuple, should be the gdn_ops.nn.State {LATER}; State(conv, "
    "memory) makes one": lambda: layer()(inputs(), tuple(START)),
    f"GatedDeltaNet: state has type Tensor, should be the gdn_ops.nn.State {LATER}; State(conv, "
    "memory) makes one": lambda: layer()(inputs(), START.memory),
    f"GatedDeltaNet: state has type KeyValueRing, should be the gdn_ops.nn.State {LATER}; "
    "State(conv, memory) makes one": lambda: layer()(inputs(), RING),
    "GatedDeltaNet: state.memory has type NoneType, should be a torch.Tensor": (
        lambda: layer()(inputs(), State(START.conv, None))
    ),
    "GatedDeltaNet: state.memory has dtype int64, should be a float": (
        lambda: layer()(inputs(), State(START.conv, START.memory.long()))
    ),
    "GatedDeltaNet: state.conv has dtype int64, should be a float": (
        lambda: layer()(inputs(), State(START.conv.long(), START.memory))
    ),
    "GatedDeltaNet: state.conv is on meta, should be on cpu, the device of x": (
        lambda: layer()(inputs(), State(START.conv.to("meta"), START.memory))
    ),
    "GatedDeltaNet: state.memory is on meta, should be on cpu, the device of x": (
        lambda: layer()(inputs(), State(START.conv, START.memory.to("meta")))
    ),
    "GatedDeltaNet: state.conv has shape (1, 32, 3), should be None: the layer has no "
    "convolution": (lambda: layer(short_conv=0)(inputs(), START)),
    "ShortConvolution: x has dtype int64, should be a float": (
        lambda: ShortConvolution(WIDTH)(inputs().long())
    ),
    "ShortConvolution: state has type list, should be a torch.Tensor": (
        lambda: ShortConvolution(WIDTH)(inputs(), [1])
    ),
    "ShortConvolution: state is on meta, should be on cpu, the device of x": (
        lambda: ShortConvolution(WIDTH)(inputs(), torch.zeros(1, WIDTH, 3, device="meta"))
    ),
    "GatedRMSNorm: x has shape (1, 6, 1), should be (..., width) with width = 16": (
        lambda: GatedRMSNorm(WIDTH)(inputs()[..., :1])
    ),
    "GatedRMSNorm: z has shape (1, 6, 1), should be (..., width) with width = 16": (
        lambda: GatedRMSNorm(WIDTH)(inputs(), inputs()[..., :1])
    ),
    "GatedRMSNorm: x has dtype int64, should be a float": (
        lambda: GatedRMSNorm(WIDTH)(inputs().long())
    ),
    "gate: A_log has shape (1,), should be (HV,) = (4,)": (
        lambda: gate(torch.zeros(2, 3, 4), torch.zeros(1))
    ),
    "gate: dt_bias has shape (3, 4), should be (HV,) = (4,)": (
        lambda: gate(torch.zeros(2, 3, 4), torch.zeros(4), torch.zeros(3, 4))
    ),
    "gate: A_log has type list, should be a torch.Tensor": (
        lambda: gate(torch.zeros(2, 3, 4), [0.0])  # type: ignore[arg-type]
    ),
    "SlidingWindowAttention: state has type tuple, should be the gdn_ops.nn.KeyValueRing "
    f"{LATER}": (lambda: attention()(inputs(), tuple(RING))),
    "SlidingWindowAttention: state.values has shape (1, 2, 4, 2), should be (B, heads, window, D) "
    "= (1, 2, 4, 8)": (lambda: attention()(inputs(), RING._replace(values=RING.values[..., :2]))),
    "SlidingWindowAttention: state.keys is on meta, should be on cpu, the device of x": (
        lambda: attention()(inputs(), RING._replace(keys=RING.keys.to("meta")))
    ),
    "SlidingWindowAttention: state.tokens has type int, should be a torch.Tensor": (
        lambda: attention()(inputs(), RING._replace(tokens=3))
    ),
    "SlidingWindowAttention: state.tokens is int64 of shape (1,) on cpu, should be int64 of shape "
    "() on cpu": lambda: attention()(inputs(), RING._replace(tokens=RING.tokens[None])),
    f"SlidingWindowAttention: got an unknown argument 'mask', should be left out: {ROWS}": (
        lambda: attention()(inputs(), mask=None)
    ),
    "HybridLM: tokens has type list, should be a torch.Tensor": lambda: model()([[1]]),
    "HybridLM: tokens has dtype float32, should be int64 or int32": (
        lambda: model()(words(1, 2).float())
    ),
    "HybridLM: tokens has values in [1, 20], should be in [0, vocab_size - 1] = [0, 19]": (
        lambda: model()(words(1, 20))
    ),
    "HybridLM: tokens has values in [-1, 3], should be in [0, vocab_size - 1] = [0, 19]": (
        lambda: model().generate(words(-1, 3), 1)
    ),
    "HybridLM: state has type generator, should be the tuple that an earlier call returned": (
        lambda: model()(words(1), (x for x in ()))
    ),
    f"HybridLM: got an unknown argument 'attention_mask', should be left out: {ROWS}": (
        lambda: model()(words(1), attention_mask=words(1))
    ),
    "HybridLM: got an unknown argument 'input_ids', should be tokens": (
        lambda: model()(words(1), input_ids=words(1))
    ),
    "HybridLM.generate: got an unknown argument 'max_new_tokens', should be count": (
        lambda: model().generate(words(1), 1, max_new_tokens=3)
    ),
    "HybridLM.generate: count is -1, should be an integer of at least 0": (
        lambda: model().generate(words(1), -1)
    ),
    f"HybridLM.generate: temperature is -1.0, should be {NUMBER}": (
        lambda: model().generate(words(1), 1, temperature=-1.0)
    ),
    f"HybridLM.generate: temperature is nan, should be {NUMBER}": (
        lambda: model().generate(words(1), 1, temperature=float("nan"))
    ),
    "HybridLM: tokens has shape (1, 0), should be (B, T) with T > 0": (
        lambda: model().generate(words(), 1)
    ),
}


@pytest.mark.parametrize(("message", "action"), GIVEN.items())
def test_an_input_of_the_wrong_kind_is_refused(message: str, action: Callable[[], Any]) -> None:
    assert message_of(SpecError, action) == message


def test_no_tokens_behind_a_ring_leave_it_as_it_is() -> None:
    _, ring = attention()(inputs())
    y, after = attention()(inputs(0), ring)
    assert y.shape == (1, 0, WIDTH)
    for x, kept in zip(after, ring, strict=True):
        assert torch.equal(x, kept)


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_any_low_temperature_draws_the_most_likely_token(temperature: float) -> None:
    prompt = words(1, 2, 3)
    likely = model().generate(prompt, 4, temperature=0)
    assert torch.equal(model().generate(prompt, 4, temperature=temperature), likely)
