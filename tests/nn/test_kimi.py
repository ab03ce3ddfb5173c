"""Kimi Delta Attention and Gated DeltaNet-2 are options of the layer: the definition, the start."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from errors import message_of
from gdn_ops import SpecError
from gdn_ops.nn import (
    DecayGate,
    GatedDeltaNet,
    HybridLM,
    KimiDeltaAttention,
    State,
    optimizer_groups,
)
from gdn_ops.parallel import tensor_plan

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, TOKENS = 24, 19

MEMBERS: dict[str, dict[str, Any]] = {
    "Kimi Linear": {},
    "GLM-5.3-Flash": {"lower_bound": -5.0},
    "Ling-3.0": {"lower_bound": -5.0, "gate_rank": None},
    "grouped values": {"num_value_heads": 6, "expand_v": 0.5, "allow_neg_eigval": True},
    "Gated DeltaNet-2": {"erase_write": True},
    "Gated DeltaNet-2, grouped values": {
        **{"erase_write": True, "num_value_heads": 6, "expand_v": 1.5},
        **{"allow_neg_eigval": True},
    },
    "Gated DeltaNet-2, a decay of heads": {"erase_write": True, "channel_decay": False},
}


def make(**options: Any) -> KimiDeltaAttention:
    torch.manual_seed(0)
    return KimiDeltaAttention(WIDTH, 3, **options)


def heads(layer: GatedDeltaNet, x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width))


def by_definition(layer: GatedDeltaNet, x: Tensor) -> tuple[Tensor, Tensor]:
    """One token at a time, with a state per value head, from the equations of the papers."""
    conv = layer.conv
    assert conv is not None and layer.decay is not None
    joined = torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], -1)
    window = functional.pad(joined.mT, (conv.kernel_size - 1, 0))
    joined = functional.silu(functional.conv1d(window, conv.weight[:, None], groups=conv.channels))
    keys = layer.num_heads * layer.head_dim
    q, k, v = joined.mT.split([keys, keys, joined.shape[1] - 2 * keys], -1)
    K, V, HV = layer.head_dim, layer.value_dim, layer.num_value_heads
    q, k = (heads(layer, y, K) for y in (q, k))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    q, k = (y.repeat_interleave(HV // layer.num_heads, 2) for y in (q, k))
    v, a, b = heads(layer, v, V), layer.a_proj(x), layer.b_proj(x).sigmoid()
    step = (a + layer.dt_bias).unflatten(-1, (HV, -1))
    A = layer.A_log.exp()[:, None]
    decay = -A * functional.softplus(step)
    if layer.lower_bound is not None:
        decay = layer.lower_bound * (A * step).sigmoid()
    b = 2 * b if layer.allow_neg_eigval else b
    erase, write = b.unflatten(-1, (HV, -1)), b.unflatten(-1, (HV, -1))
    if layer.erase_write:
        write = heads(layer, layer.w_proj(x).sigmoid(), V)
    state, out = x.new_zeros(len(x), HV, K, V), []
    for t in range(x.shape[1]):
        state = state * decay[:, t, :, :, None].exp()
        wrong = write[:, t] * v[:, t] - torch.einsum("bhk,bhkv->bhv", erase[:, t] * k[:, t], state)
        state = state + k[:, t, :, :, None] * wrong[:, :, None]
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) / K**0.5)
    o = torch.stack(out, 1)
    o = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * layer.o_norm.weight
    o = o * heads(layer, layer.g_proj(x).sigmoid(), V)
    return layer.o_proj(o.flatten(2)), state


@pytest.mark.parametrize("name", MEMBERS)
def test_results_and_gradients_are_those_of_the_definition(name: str) -> None:
    layer = make(**MEMBERS[name]).double()
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    y, state = layer(x)
    expected, memory = by_definition(layer, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(state.memory, memory, rtol=0, atol=1e-11)
    leaves, d_y = [x, *layer.parameters()], torch.randn_like(y)
    found = torch.autograd.grad((y * d_y).sum() + state.memory.sum(), leaves)
    wanted = torch.autograd.grad((expected * d_y).sum() + memory.sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", MEMBERS)
def test_padding_packing_and_tokens_are_what_they_are_alone(name: str) -> None:
    layer, x = make(**MEMBERS[name]), torch.randn(2, TOKENS, WIDTH)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, 3:9] = False
    with torch.no_grad():
        whole, _ = layer(x[:1])
        alone, last = layer(x[1:, mask[1]])
        y, final = layer(x.masked_fill(~mask[..., None], torch.nan), mask=mask)
        packed = torch.cat([x[:1], x[1:, mask[1]]], 1)
        y_packed, finals = layer(packed, cu_seqlens=torch.tensor([0, TOKENS, packed.shape[1]]))
        state, parts = layer.zero_state(1), []
        for token in x[:1].split(1, 1):
            part, state = layer(token, state)
            parts.append(part)
    for found, expected in (
        (y[:1], whole),
        (y[1:, mask[1]], alone),
        (final.memory[1:], last.memory),
        (final.conv[1:], last.conv),
        (y_packed, torch.cat([whole, alone], 1)),
        (finals.memory[1:], last.memory),
        (torch.cat(parts, 1), whole),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not bool(y[~mask].any())


@pytest.mark.parametrize("name", ["Kimi Linear", "GLM-5.3-Flash", "Gated DeltaNet-2"])
def test_the_layer_compiles_whole_and_is_copied(name: str) -> None:
    layer, x = make(**MEMBERS[name]), torch.randn(1, TOKENS, WIDTH)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        y, state = layer(x)
        torch.testing.assert_close(compiled(x)[0], y, rtol=1e-5, atol=1e-5)
        twin = copy.deepcopy(layer)
        assert torch.equal(twin(x)[0], y)
        _, states = layer(x[:, :4], return_states=True)
        after, rest = states.after(2), x[:, 2:]
        torch.testing.assert_close(layer(rest, after)[1].memory, state.memory, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()
    marked = {n for n, p in twin.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"decay.A_log", "decay.dt_bias"}
    assert set(layer.parameters_without_weight_decay()) == {*marked, "o_norm.weight"}
    groups = optimizer_groups(layer, 0.1)
    assert sum(p.numel() for p in groups[1]["params"]) == 3 + 3 * 8 + 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gates_are_at_least_float32(dtype: torch.dtype) -> None:
    layer = make(dtype=dtype)
    assert layer.A_log.dtype == layer.dt_bias.dtype == torch.float32
    y, state = layer(torch.randn(1, 5, WIDTH, dtype=dtype))
    wide = torch.promote_types(dtype, torch.float32)
    assert (y.dtype, state.memory.dtype) == (dtype, wide)
    assert layer.decay is not None
    a = torch.tensor([-20.0], dtype=dtype).expand(1, 1, 24)
    with torch.no_grad():
        log_alpha = layer.decay(a)
    # α is so close to 1 that a narrow dtype would make it 1.
    assert bool((log_alpha < 0).all())
    assert log_alpha.dtype == wide


def test_gates_start_as_published() -> None:
    torch.manual_seed(0)
    gate = DecayGate(4096, channels=2)
    A, step = gate.A_log.detach().exp(), functional.softplus(gate.dt_bias.detach())
    # A ~ U(1, 16) and log dt ~ U(log 1e-3, log 0.1).
    assert abs(float(A.mean()) - 8.5) < 4 * 15 / 12**0.5 / 64
    assert 1.0 <= float(A.min()) < 1.1
    assert tuple(step.shape) == (8192,)
    assert abs(float(step.log10().mean()) + 2) < 4 * 2 / 12**0.5 / 90
    assert not bool(DecayGate(5, channels=2, lower_bound=-5.0).A_log.any())


def test_erase_and_write_of_one_number_are_beta() -> None:
    one, apart = make(), make(erase_write=True)
    weights = one.state_dict()
    for name, width in (("b_proj", 8), ("w_proj", 8)):
        rows = weights["b_proj.weight"] if name == "b_proj" else one.b_proj.weight.detach()
        weights[f"{name}.weight"] = rows.repeat_interleave(width, 0)
    apart.load_state_dict(weights)
    x = torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(apart(x), one(x), rtol=1e-5, atol=1e-5)


def test_a_constant_vector_of_decays_is_one_decay() -> None:
    options: dict[str, Any] = {"head_dim": 8, "expand_v": 1.0, "output_gate": "sigmoid"}
    torch.manual_seed(0)
    scalar = GatedDeltaNet(WIDTH, 3, **options)
    channels = GatedDeltaNet(WIDTH, 3, channel_decay=True, **options)
    weights = scalar.state_dict()
    for name in ("a_proj.weight", "decay.dt_bias"):
        weights[name] = weights[name].repeat_interleave(8, 0)
    channels.load_state_dict(weights)
    x = torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(channels(x), scalar(x), rtol=1e-5, atol=1e-5)


# Language models.


@pytest.mark.parametrize("pattern", ["KKKA", "EA", "GKE"])
def test_a_model_generates_with_its_states_as_without(pattern: str) -> None:
    torch.manual_seed(0)
    model = HybridLM(pattern, 29, 16, num_heads=2, window=8, mlp_size=24, head_dim=8).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    prompt = torch.randint(29, (2, 7))
    text = prompt
    with torch.no_grad():
        for _ in range(12):
            text = torch.cat([text, model(text)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(prompt, 12, temperature=0), text)
    assert torch.equal(model.generate(prompt, 12, temperature=0, draft_tokens=3), text)
    assert len(text[:, 7:].unique()) > 3
    assert all(isinstance(s, State) for s in model(prompt)[1][:1])


def test_letters_are_layers_with_the_options_of_the_model() -> None:
    model = HybridLM("KEG", 29, 16, num_heads=2, lower_bound=-4.0, device="meta")
    kda, apart, plain = (block.mixer for block in model.blocks)
    assert isinstance(kda, KimiDeltaAttention) and isinstance(apart, KimiDeltaAttention)
    assert (kda.channel_decay, kda.erase_write, kda.gate_rank) == (True, False, 8)
    assert (apart.channel_decay, apart.erase_write) == (True, True)
    assert (plain.channel_decay, plain.gate_rank) == (False, None)
    assert [m.lower_bound for m in (kda, apart, plain)] == [-4.0] * 3
    assert "channel_decay=True, lower_bound=-4.0, erase_write=True, gate_rank=8" in repr(apart)


# Refusals.

REFUSED: dict[str, dict[str, Any]] = {
    "channel_decay is 1, should be True or False": {"channel_decay": 1},
    "erase_write is None, should be True or False": {"erase_write": None},
    "gate_rank is 0, should be a positive integer": {"gate_rank": 0},
    "lower_bound is -6.0, should be a number in [-5, 0): log α of the bounded gate lies between "
    "it and 0": {"lower_bound": -6.0},
    "lower_bound is 'none', should be a number in [-5, 0)": {"lower_bound": "none"},
    "channel_decay is True, should be False: rule 'delta' has no decay": {"rule": "delta"},
    "lower_bound is -5.0, should be None: rule 'linear' has no decay": {
        **{"rule": "linear", "channel_decay": False, "lower_bound": -5.0}
    },
    "erase_write is True, should be False: rule 'gated' has no error term, and β is its write "
    "strength": {"rule": "gated", "erase_write": True},
}


@pytest.mark.parametrize(("message", "options"), REFUSED.items())
def test_an_option_that_does_not_fit_is_refused(message: str, options: dict[str, Any]) -> None:
    assert message_of(SpecError, make, **options) == f"GatedDeltaNet: {message}"


def test_a_width_that_heads_do_not_share_is_refused() -> None:
    assert message_of(SpecError, KimiDeltaAttention, 16, 3) == (
        "KimiDeltaAttention: head_dim is not given and hidden_size / num_heads = 5.33333 is no "
        "integer; pass head_dim="
    )


def test_a_plan_splits_the_second_matrix_of_a_projection() -> None:
    plan = tensor_plan(make(erase_write=True))
    names = {name: type(style).__name__ for name, style in plan.items()}
    assert names["a_proj.0"] == names["g_proj.0"] == "Copies"
    assert names["a_proj.1"] == names["w_proj"] == "ColwiseParallel"
    assert "a_proj" not in names
