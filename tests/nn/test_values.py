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
    DecayGate,
    GatedDeltaNet,
    GatedRMSNorm,
    HybridLM,
    KeyValueRing,
    ShortConvolution,
    SlidingWindowAttention,
    State,
    gate,
    optimizer_groups,
    parameters_without_weight_decay,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, WINDOW = 16, 4
FLOATS = "torch.float64, torch.float32, torch.bfloat16, torch.float16"
KNOWN = FLOATS.replace("torch.", "")
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
    "DecayGate: heads is -1, should be a positive integer": lambda: DecayGate(-1),
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
    "SlidingWindowAttention: state.tokens is int64 of shape (2,) on cpu, should be int64 of shape "
    "() or (B,) = (1,) on cpu": lambda: attention()(
        inputs(), RING._replace(tokens=RING.tokens.expand(2))
    ),
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
    f"HybridLM.generate: temperature is {10**400}, should be {NUMBER}": (
        lambda: model().generate(words(1), 1, temperature=10**400)
    ),
    "HybridLM.generate: generator has type int, should be a torch.Generator": (
        lambda: model().generate(words(1), 0, generator=7)
    ),
    "HybridLM: generator is on cpu, should be on meta, the device of the logits": (
        lambda: model(device="meta").generate(words(1).to("meta"), 1, generator=torch.Generator())
    ),
    "HybridLM: is_last_only is 'no', should be True or False": (
        lambda: model()(words(1), is_last_only="no")
    ),
    "HybridLM: tokens is on cpu, should be on meta, the device of embedding.weight": (
        lambda: model(device="meta")(words(1))
    ),
    "HybridLM: tokens has layout sparse_coo, should be strided": (
        lambda: model()(words(1).to_sparse())
    ),
    "HybridLM.logits: x has type NoneType, should be a torch.Tensor": lambda: model().logits(None),
    "HybridLM: x has shape (1, 6, 1), should be (..., hidden_size) with hidden_size = 16": (
        lambda: model().logits(inputs()[..., :1])
    ),
    "GatedDeltaNet: x has layout sparse_coo, should be strided": (
        lambda: layer()(inputs().to_sparse())
    ),
    "GatedDeltaNet: mask has layout sparse_coo, should be strided": (
        lambda: layer()(inputs(), mask=torch.ones(1, 6).to_sparse())
    ),
    "GatedDeltaNet: state.conv has layout sparse_coo, should be strided": (
        lambda: layer()(inputs(), START._replace(conv=START.conv.to_sparse()))
    ),
    f"ShortConvolution: x has dtype float8_e5m2, should be one of {KNOWN}": (
        lambda: ShortConvolution(WIDTH)(inputs().to(torch.float8_e5m2))
    ),
    "ShortConvolution: x is on meta, should be on cpu, the device of weight": (
        lambda: ShortConvolution(WIDTH)(inputs().to("meta"))
    ),
    "GatedRMSNorm: z is on meta, should be on cpu, the device of weight": (
        lambda: GatedRMSNorm(WIDTH)(inputs(), inputs().to("meta"))
    ),
    "GatedRMSNorm: z has shape (1, 1, 16), should be that of x, (1, 6, 16)": (
        lambda: GatedRMSNorm(WIDTH)(inputs(), inputs(1))
    ),
    "gate: A_log has dtype complex64, should be a float": (
        lambda: gate(torch.zeros(2, 4), torch.zeros(4, dtype=torch.complex64))
    ),
    "gate: dt_bias is on meta, should be on cpu, the device of a": (
        lambda: gate(torch.zeros(2, 4), torch.zeros(4), torch.zeros(4, device="meta"))
    ),
    "gate: a has type NoneType, should be a torch.Tensor": lambda: DecayGate(4)(None),
    "optimizer_groups: model has type list, should be a torch.nn.Module": (
        lambda: optimizer_groups([*layer().parameters()], 0.1)  # type: ignore[arg-type]
    ),
    "parameters_without_weight_decay: model has type NoneType, should be a torch.nn.Module": (
        lambda: parameters_without_weight_decay(None)  # type: ignore[arg-type]
    ),
    f"optimizer_groups: weight_decay is '0.1', should be {NUMBER}": (
        lambda: model().parameter_groups("0.1")  # type: ignore[arg-type]
    ),
    f"optimizer_groups: weight_decay is -1, should be {NUMBER}": (
        lambda: optimizer_groups(layer(), -1)
    ),
}


@pytest.mark.parametrize(("message", "action"), GIVEN.items())
def test_an_input_of_the_wrong_kind_is_refused(message: str, action: Callable[[], Any]) -> None:
    assert message_of(SpecError, action) == message


STATEFUL: dict[str, Callable[[], Any]] = {
    "GatedDeltaNet": layer,
    "SlidingWindowAttention": attention,
    "ShortConvolution": lambda: ShortConvolution(WIDTH),
}


@pytest.mark.parametrize("owner", STATEFUL)
@pytest.mark.parametrize("rows", [-1, 1.0, True, "2", None])
def test_a_state_of_a_wrong_number_of_rows_is_refused(owner: str, rows: Any) -> None:
    message = message_of(SpecError, STATEFUL[owner]().zero_state, rows)
    assert message == f"{owner}.zero_state: rows is {rows!r}, should be an integer of at least 0"


@pytest.mark.parametrize("owner", STATEFUL)
def test_no_rows_have_a_state(owner: str) -> None:
    made = STATEFUL[owner]()
    y, _ = made(inputs()[:0], made.zero_state(0))
    assert y.shape == (0, 6, WIDTH)


@pytest.mark.parametrize("owner", ["GatedDeltaNet", "SlidingWindowAttention"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_an_input_of_another_dtype_than_the_weights_is_refused(
    owner: str, dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    call, wide = STATEFUL[owner](), STATEFUL[owner]().to(dtype)
    text = "the dtype of q_proj.weight: bring both to one dtype, for example with .to"
    assert message_of(SpecError, call, inputs().to(dtype)) == (
        f"{owner}: x has dtype {name}, should be float32, {text}(torch.float32)"
    )
    assert message_of(SpecError, wide, inputs()) == (
        f"{owner}: x has dtype float32, should be {name}, {text}({dtype})"
    )
    wide.to(torch.float32).o_proj.to(dtype)
    text = text.replace("q_proj", "o_proj")
    assert message_of(SpecError, wide, inputs()) == (
        f"{owner}: o has dtype float32, should be {name}, {text}({dtype})"
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if dtype == torch.float64:
            message_of(SpecError, call, inputs().to(dtype))
        else:
            assert torch.isfinite(call(inputs().to(dtype))[0]).all()


def test_an_input_on_another_device_than_the_weights_is_refused() -> None:
    for owner in ("GatedDeltaNet", "SlidingWindowAttention"):
        assert message_of(SpecError, STATEFUL[owner](), inputs().to("meta")) == (
            f"{owner}: x is on meta, should be on cpu, the device of q_proj.weight"
        )


def test_a_model_of_several_dtypes_is_refused_by_name() -> None:
    text = "bring both to one dtype, for example with .to(torch.bfloat16)"
    for part, message in {
        "blocks.0.mlp": f"SwiGLU: x has dtype float32, should be bfloat16, the dtype of "
        f"gate_proj.weight: {text}",
        "blocks.0.mlp.down_proj": f"SwiGLU: the product has dtype float32, should be bfloat16, "
        f"the dtype of down_proj.weight: {text}",
        "blocks.0.mixer.a_proj": "GatedDeltaNet: x has dtype float32, should be bfloat16, the "
        f"dtype of a_proj.weight: {text}",
    }.items():
        mixed = model()
        mixed.get_submodule(part).bfloat16()
        assert message_of(SpecError, mixed, words(1, 2)) == message
    logits = model(dtype=torch.bfloat16).logits
    assert message_of(SpecError, logits, inputs()) == (
        "HybridLM.logits: x has dtype float32, should be bfloat16, the dtype of "
        f"embedding.weight: {text}"
    )


class Widening(torch.nn.Linear):
    """A linear layer that converts what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def test_a_projection_that_converts_its_input_is_given_any_dtype() -> None:
    hooked, own = layer(), layer()
    for name, child in hooked.named_children():
        if name.endswith("_proj"):
            child.register_forward_pre_hook(lambda module, given: (given[0].float(),))
            mine = Widening(child.in_features, child.out_features, bias=False)
            mine.load_state_dict(child.state_dict())
            own.register_module(name, mine)
    expected = layer()(inputs().bfloat16().float())[0]
    for made in (hooked, own):
        y, _ = made(inputs().bfloat16())
        torch.testing.assert_close(y, expected)


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
