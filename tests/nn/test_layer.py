"""The layer: prefill is decode, padding is nothing, every option trains, sizes are the paper's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from errors import message_of
from gdn_ops import SpecError
from gdn_ops.nn import GatedDeltaNet, GatedRMSNorm, ShortConvolution, State, gate
from nn_layers import OPTIONS, WIDTH, make

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 37
RULES = ("gated_delta", "delta", "gated", "linear")


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def state_of(n: int, state: State | None) -> State | None:
    """Return the state of one sequence."""
    return None if state is None else State(*(s[n : n + 1] for s in state))


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        *(pytest.param(options, [1] * TOKENS, id=name) for name, options in OPTIONS.items()),
        *(({"num_value_heads": 4}, [cut, TOKENS - cut]) for cut in (1, 2, 20, TOKENS - 1)),
    ],
)
def test_a_sequence_starts_from_zero_and_may_be_cut_anywhere(
    options: dict[str, Any], lengths: list[int]
) -> None:
    layer, x = make(**options), torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        y, final = layer(x)
        state, parts = layer.zero_state(2), []
        for part in x.split(lengths, 1):
            y_part, state = layer(part, state)
            parts.append(y_part)
    close(torch.cat(parts, 1), y)
    close(state, final)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("where", ["left", "right", "anywhere"])
def test_padding_changes_nothing_wherever_it_is(where: str, with_state: bool) -> None:
    layer, lengths = make(num_value_heads=4), (TOKENS, 20, 1, 0)
    x = torch.randn(len(lengths), TOKENS, WIDTH)
    mask = torch.zeros(len(lengths), TOKENS, dtype=torch.bool)
    for row, length in enumerate(lengths):
        places = {"left": torch.arange(TOKENS - length, TOKENS), "right": torch.arange(length)}
        places["anywhere"] = torch.randperm(TOKENS)[:length].sort().values
        mask[row, places[where]] = True
    x[~mask] = torch.nan
    with torch.no_grad():
        state = layer(torch.randn(len(lengths), 5, WIDTH))[1] if with_state else None
        y, final = layer(x, state, mask=mask)
        for row in range(len(lengths)):
            expected, last = layer(x[row : row + 1, mask[row]], state_of(row, state))
            close(y[row : row + 1, mask[row]], expected)
            close(state_of(row, final), last)
    assert not bool(y[~mask].any())


@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences_equal_separate_calls(with_state: bool) -> None:
    layer, x = make(), torch.randn(1, TOKENS, WIDTH)
    cuts = torch.tensor([0, 2, 2, 20, TOKENS])
    with torch.no_grad():
        state = layer(torch.randn(4, 5, WIDTH))[1] if with_state else None
        y, final = layer(x, state, cu_seqlens=cuts)
        for n in range(4):
            expected, last = layer(x[:, cuts[n] : cuts[n + 1]], state_of(n, state))
            close(y[:, cuts[n] : cuts[n + 1]], expected)
            close(state_of(n, final), last)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_trains(options: dict[str, Any]) -> None:
    layer = make(**options)
    x, target = torch.randn(4, 12, WIDTH), torch.randn(4, 12, WIDTH)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-2)
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    losses = []
    for _ in range(40):
        loss = functional.mse_loss(layer(x)[0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0], losses[:: len(losses) - 1]
    for name, parameter in layer.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} was never updated"


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_has_the_parameters_it_needs(rule: str) -> None:
    names = {name.partition(".")[0] for name, _ in make(rule=rule).named_parameters()}
    has_decay = rule in ("gated_delta", "gated")
    of_the_decay = {"a_proj", "decay"}
    assert of_the_decay & names == (of_the_decay if has_decay else set())
    assert "b_proj" in names


def test_the_layer_compiles_whole() -> None:
    layer, x = make(), torch.randn(2, TOKENS, WIDTH)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        y, state = layer(x)
        of_graph, state_of_graph = compiled(x)
        close(of_graph, y)
        close(compiled(x[:, :1], state_of_graph)[0], layer(x[:, :1], state)[0])
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gates_and_memory_are_at_least_float32(dtype: torch.dtype) -> None:
    layer = make(dtype=dtype)
    assert layer.A_log.dtype == layer.dt_bias.dtype == torch.float32
    y, state = layer(torch.randn(1, 5, WIDTH, dtype=dtype))
    wide = torch.promote_types(dtype, torch.float32)
    assert (y.dtype, state.memory.dtype) == (dtype, wide)
    zero = layer.zero_state(1)
    assert [x.dtype for x in zero] == [x.dtype for x in state]


# Sizes and initialisation.


@pytest.mark.parametrize(
    ("width", "key_width", "value_width", "floats"),
    [(1536, 128, 256, 294_912), (2400, 200, 400, 720_000)],
    ids=["GDN 0.4B", "GDN 1.3B"],
)
def test_parameters_and_state_are_those_of_the_paper(
    width: int, key_width: int, value_width: int, floats: int
) -> None:
    layer = GatedDeltaNet(width, 9, device="meta")
    assert (layer.head_dim, layer.value_dim) == (key_width, value_width)
    projections = sum(
        p.numel() for n, p in layer.named_parameters() if n[0] in "qkvgo" and p.dim() == 2
    )
    assert projections == 6 * width**2
    assert sum(p.numel() for p in layer.parameters()) < 1.01 * 6 * width**2
    assert layer.zero_state(1).memory.numel() == floats


def test_the_gate_starts_as_published() -> None:
    torch.manual_seed(0)
    layer = GatedDeltaNet(64, 4096, head_dim=1, expand_v=1)
    A, step = layer.A_log.detach().exp(), functional.softplus(layer.dt_bias.detach())
    # A ~ U(0, 16): mean 8, standard deviation 16 / sqrt(12).
    assert abs(float(A.mean()) - 8) < 4 * 16 / 12**0.5 / 64
    assert 0 < float(A.min()) < 0.1
    assert 15.9 < float(A.max()) <= 16
    # log dt ~ U(log 1e-3, log 0.1).
    logs = step.log10()
    assert -3.001 < float(logs.min()) < -2.98
    assert -1.02 < float(logs.max()) < -0.999
    assert abs(float(logs.mean()) + 2) < 4 * 2 / 12**0.5 / 64
    # Median of α 0.941, 1 % below 0.31: measured for the published scheme.
    alpha = gate(torch.zeros(4096), layer.A_log, layer.dt_bias).detach().exp()
    assert abs(float(alpha.quantile(0.5)) - 0.941) < 0.005
    assert abs(float(alpha.quantile(0.01)) - 0.31) < 0.05
    marked = {n for n, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"decay.A_log", "decay.dt_bias"}


# The parts.


def test_the_gate_is_exact_where_alpha_is_close_to_one() -> None:
    a = torch.tensor([-20.0, 0.0, 30.0], dtype=torch.bfloat16)
    log_alpha = gate(a, torch.zeros(3), torch.zeros(3))
    assert log_alpha.dtype == torch.float32
    expected = -functional.softplus(a.double())
    torch.testing.assert_close(log_alpha.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_the_norm_is_rms_then_weight_then_gate(activation: str) -> None:
    torch.manual_seed(0)
    norm = GatedRMSNorm(6, 1e-3, activation)
    nn.init.normal_(norm.weight)
    x, z = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    plain = functional.rms_norm(x, (6,), norm.weight, 1e-3)
    close(norm(x), plain)
    close(norm(x, z), plain * getattr(functional, activation)(z))


@pytest.mark.parametrize(("kernel", "bias", "activation"), [(4, False, "silu"), (1, True, None)])
def test_the_convolution_is_a_causal_depthwise_one(
    kernel: int, bias: bool, activation: str | None
) -> None:
    torch.manual_seed(0)
    conv = ShortConvolution(5, kernel, bias=bias, activation=activation)
    x, state = torch.randn(2, 7, 5), torch.randn(2, 5, kernel - 1)
    window = torch.cat([state, x.mT], 2)
    expected = functional.conv1d(window, conv.weight[:, None], conv.bias, groups=5).mT
    y, last = conv(x, state)
    close(y, functional.silu(expected) if activation else expected)
    assert torch.equal(last, window[:, :, 7:])
    assert torch.equal(conv.zero_state(2), torch.zeros(2, 5, kernel - 1))


# Refusals.


REFUSED_OPTIONS: dict[str, dict[str, Any]] = {
    "rule is 'mamba', should be one of gated_delta, delta, gated, linear": {"rule": "mamba"},
    "feature_map is 'exp', should be one of silu, relu, elu, none": {"feature_map": "exp"},
    "qk_norm is 'l3', should be one of l2, l1, None": {"qk_norm": "l3"},
    "output_gate is 'tanh', should be one of silu, sigmoid, None": {"output_gate": "tanh"},
    "num_value_heads is 3, should be a multiple of num_heads = 2": {"num_value_heads": 3},
    "expand_v is 1.1, should make expand_v * head_dim = 4.4 an integer": {"expand_v": 1.1},
}


@pytest.mark.parametrize(("message", "options"), REFUSED_OPTIONS.items())
def test_an_option_that_does_not_fit_is_refused(message: str, options: dict[str, Any]) -> None:
    assert message_of(SpecError, make, **options) == f"GatedDeltaNet: {message}"


START = make().zero_state(2)

REFUSED_INPUTS: dict[str, dict[str, Any]] = {
    "x has shape (2, 5, 7), should be (B, T, hidden_size) with hidden_size = 16": {
        "x": torch.zeros(2, 5, 7)
    },
    "mask has shape (2, 4), should be (B, T) = (2, 5), 0 where a token is padding": {
        "mask": torch.ones(2, 4)
    },
    "mask and cu_seqlens are both given, should be one of them: packing has no padding": {
        "mask": torch.ones(2, 5),
        "cu_seqlens": torch.tensor([0, 5]),
    },
    "state.memory has shape (2, 2, 6, 4), should be (N, HV, K, V) = (2, 2, 4, 6); "
    "gdn_ops.compat.states.state_from('fla_v_first', memory) turns a V-first state": {
        "state": START._replace(memory=torch.zeros(2, 2, 6, 4))
    },
    "state.memory has shape (1, 2, 4, 6), should be (N, HV, K, V) = (2, 2, 4, 6)": {
        "state": START._replace(memory=torch.zeros(1, 2, 4, 6))
    },
    "state.conv is None, should be (N, channels, kernel_size - 1) = (2, 28, 3)": {
        "state": START._replace(conv=None)
    },
    "state.conv has shape (2, 28, 4), should be (N, channels, kernel_size - 1) = (2, 28, 3)": {
        "state": START._replace(conv=torch.zeros(2, 28, 4))
    },
}


@pytest.mark.parametrize(("message", "inputs"), REFUSED_INPUTS.items())
def test_an_input_that_does_not_fit_is_refused(message: str, inputs: dict[str, Any]) -> None:
    call = {"x": torch.zeros(2, 5, WIDTH), **inputs}
    assert message_of(SpecError, make(), **call) == f"GatedDeltaNet: {message}"


@pytest.mark.parametrize(
    ("message", "action"),
    {
        "GatedDeltaNet: head_dim is not given and 0.75 hidden_size / num_heads = 5.33333 is no "
        "integer; pass head_dim=": lambda: GatedDeltaNet(64, 9),
        "ShortConvolution: activation is 'gelu', should be 'silu' or None": (
            lambda: ShortConvolution(2, activation="gelu")
        ),
        "GatedRMSNorm: activation is 'gelu', should be one of silu, sigmoid": (
            lambda: GatedRMSNorm(2, activation="gelu")
        ),
    }.items(),
)
def test_a_part_that_cannot_be_built_is_refused(message: str, action: Any) -> None:
    assert message_of(SpecError, action) == message
