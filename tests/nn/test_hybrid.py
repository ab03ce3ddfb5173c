"""Attention in a window and hybrid models: the definition, decode, counts, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from errors import message_of
from gdn_ops import SpecError
from gdn_ops.nn import PAPER, GatedDeltaNet, HybridLM, SlidingWindowAttention
from gdn_ops.nn.attention import rotate

PATTERNS = ("G", "GA", "MGA", "A", "KKEA")
VOCABULARY, WINDOW = 19, 5

pytestmark = pytest.mark.usefixtures("one_thread")


def make(pattern: str, **options: Any) -> HybridLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_heads": 2, "head_dim": 8, "window": WINDOW, "mlp_size": 24}
    return HybridLM(pattern, VOCABULARY, 16, **{**sizes, **options}).double()


def tokens_of(rows: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def attention_by_definition(layer: SlidingWindowAttention, x: Tensor) -> Tensor:
    """One query at a time, from complex numbers and a softmax over a list of tokens."""
    rows, length, _ = x.shape
    q, k, v = (
        p(x).view(rows, length, layer.num_heads, layer.head_dim)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    half = layer.head_dim // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    turn = torch.polar(
        torch.ones(length, half, dtype=x.dtype),
        torch.arange(length, dtype=x.dtype)[:, None] * frequency,
    )
    q, k = (torch.complex(y[..., :half], y[..., half:]) * turn[None, :, None] for y in (q, k))
    out = torch.empty_like(v)
    for t in range(length):
        seen = slice(max(0, t - layer.window + 1), t + 1)
        score = torch.einsum("bhd,bjhd->bhj", q[:, t], k[:, seen].conj()).real
        chance = (score / math.sqrt(layer.head_dim)).softmax(-1)
        out[:, t] = torch.einsum("bhj,bjhd->bhd", chance, v[:, seen])
    return layer.o_proj(out.flatten(-2))


# Attention in a window.


@pytest.mark.parametrize(
    ("window", "length"),
    [(1, 7), (5, 5), (5, 23), (64, 40), (7, 300), (150, 400), (257, 700), (512, 900), (600, 2700)],
)
def test_attention_is_a_softmax_over_the_tokens_of_the_window(window: int, length: int) -> None:
    torch.manual_seed(0)
    layer = SlidingWindowAttention(12, 2, window).double()
    x = torch.randn(2, length, 12, dtype=torch.float64)
    expected = attention_by_definition(layer, x)
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-12)
    for cut in (3, length // 2, length - 2):
        y, state = layer(x[:, :cut])
        later, _ = layer(x[:, cut:], state)
        torch.testing.assert_close(torch.cat([y, later], 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("window", "length"), [(140, 300), (300, 620)])
def test_gradients_pass_through_every_block_of_queries(window: int, length: int) -> None:
    torch.manual_seed(0)
    layer = SlidingWindowAttention(8, 2, window).double()
    x = torch.randn(1, length, 8, dtype=torch.float64, requires_grad=True)
    d_y = torch.randn(1, length, 8, dtype=torch.float64)
    parts = [layer(x[:, :50])]
    parts.append(layer(x[:, 50:], parts[0][1]))
    in_two = torch.cat([y for y, _ in parts], 1)
    (expected,) = torch.autograd.grad(attention_by_definition(layer, x), x, d_y)
    for y in (layer(x)[0], in_two):
        (d_x,) = torch.autograd.grad(y, x, d_y)
        torch.testing.assert_close(d_x, expected, rtol=0, atol=1e-11)


def test_the_ring_holds_the_last_tokens_each_in_its_slot() -> None:
    torch.manual_seed(0)
    layer = SlidingWindowAttention(8, 2, 4).double()
    x = torch.randn(1, 11, 8, dtype=torch.float64)
    _, ring = layer(x)
    assert int(ring.tokens) == 11
    assert tuple(ring.keys.shape) == (1, 2, 4, 4)
    values = layer.v_proj(x)[0].view(11, 2, 4)
    for token in range(7, 11):
        torch.testing.assert_close(ring.values[0, :, token % 4], values[token])
    keys = layer.k_proj(x)[0].view(11, 2, 4).transpose(0, 1)[None]
    rotated = rotate(keys, torch.arange(11))
    torch.testing.assert_close(ring.keys[:, :, 10 % 4], rotated[:, :, 10])


def test_a_call_leaves_the_given_ring_as_it_was() -> None:
    layer = SlidingWindowAttention(8, 2, 4)
    _, ring = layer(torch.randn(1, 6, 8))
    before = [x.clone() for x in ring]
    one, _ = layer(torch.ones(1, 1, 8), ring)
    again, _ = layer(torch.ones(1, 1, 8), ring)
    assert torch.equal(one, again)
    assert all(torch.equal(a, b) for a, b in zip(ring, before, strict=True))


def test_rotation_makes_products_depend_on_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 6, dtype=torch.float64)
    products = [
        (rotate(q, torch.tensor([t + 3])) * rotate(k, torch.tensor([t]))).sum()
        for t in (0, 1, 1000)
    ]
    torch.testing.assert_close(products[1], products[0])
    torch.testing.assert_close(products[2], products[0])
    assert abs(float(products[0] - (q * k).sum())) > 1e-3


def test_gradients_of_attention_reach_the_past_through_the_ring() -> None:
    torch.manual_seed(0)
    layer = SlidingWindowAttention(4, 1, 3).double()
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)

    def in_two(y: Tensor) -> Tensor:
        first, ring = layer(y[:, :4])
        return torch.cat([first, layer(y[:, 4:], ring)[0]], 1)

    assert torch.autograd.gradcheck(in_two, (x,))


# Models.


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("cuts", [(1,) * 17, (6, 1, 1, 4, 5), (2, 15)], ids=str)
def test_decode_equals_prefill_also_beyond_the_window(pattern: str, cuts: tuple[int, ...]) -> None:
    model, tokens = make(pattern), tokens_of(2, 17)
    assert tokens.shape[1] > 3 * WINDOW
    whole, _ = model(tokens)
    state, parts = None, []
    for part in tokens.split(cuts, 1):
        logits, state = model(part, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_token_sees_the_future(pattern: str) -> None:
    model, tokens = make(pattern), tokens_of(1, 12)
    other = tokens.clone()
    other[:, 8:] = (other[:, 8:] + 1) % VOCABULARY
    before, after = model(tokens)[0], model(other)[0]
    torch.testing.assert_close(before[:, :8], after[:, :8], rtol=0, atol=1e-12)
    assert bool((before[:, 8:] - after[:, 8:]).abs().amax(-1).gt(1e-4).all())


def test_attention_alone_forgets_what_left_the_window_and_a_hybrid_does_not() -> None:
    tokens = tokens_of(1, 12)
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % VOCABULARY
    for pattern, forgets in (("A", True), ("GA", False)):
        model = make(pattern)
        change = float((model(tokens)[0] - model(other)[0])[:, WINDOW:].detach().abs().max())
        assert (change < 1e-12) == forgets, (pattern, change)


def test_a_pattern_names_the_layers_from_the_bottom_and_repeats() -> None:
    model = make("MGA", num_layers=5, rule="delta")
    assert model.pattern == "MGAMG"
    kinds = [
        block.mixer.rule if isinstance(block.mixer, GatedDeltaNet) else block.mixer.window
        for block in model.blocks
    ]
    assert kinds == ["gated", "delta", WINDOW, "gated", "delta"]


def test_a_block_is_pre_norm_mixer_then_pre_norm_swiglu() -> None:
    model = make("A")
    block = model.blocks[0]
    x = torch.randn(1, 4, 16, dtype=torch.float64)

    def rms(y: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    middle = x + block.mixer(rms(x))[0]
    z, mlp = rms(middle), block.mlp
    inner = functional.silu(z @ mlp.gate_proj.weight.T) * (z @ mlp.up_proj.weight.T)
    torch.testing.assert_close(block(x)[0], middle + inner @ mlp.down_proj.weight.T)
    tokens = tokens_of(1, 4)
    last = rms(block(model.embedding.weight[tokens])[0])
    torch.testing.assert_close(model(tokens)[0], last @ model.embedding.weight.T)


@pytest.mark.parametrize(
    ("name", "beside_embedding", "embedding"),
    [
        ("GDN 0.4B", 467.7, 49.2),
        ("GDN-H1 0.4B", 481.6, 49.2),
        ("GDN 1.3B", 1232.5, 76.8),
        ("GDN-H1 1.3B", 1242.9, 73.7),
    ],
)
def test_published_configurations_have_the_published_size(
    name: str, beside_embedding: float, embedding: float
) -> None:
    model = HybridLM(**PAPER[name], device="meta")
    millions = {n: p.numel() / 1e6 for n, p in model.named_parameters()}
    assert round(millions.pop("embedding.weight"), 1) == embedding
    assert round(sum(millions.values()), 1) == beside_embedding


def test_weights_start_as_documented() -> None:
    torch.manual_seed(0)
    model = HybridLM("GA", 64, 128, num_heads=4, head_dim=32)
    std = math.sqrt(2 / (5 * 128))
    named = dict(model.named_modules())
    for name in ("embedding", "blocks.0.mixer.q_proj", "blocks.1.mlp.up_proj"):
        assert abs(float(named[name].weight.detach().std()) / std - 1) < 0.05
    for name in ("blocks.0.mixer.o_proj", "blocks.1.mixer.o_proj", "blocks.1.mlp.down_proj"):
        assert abs(float(named[name].weight.detach().std()) / (std / 2) - 1) < 0.05


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = make("MGA")
    decayed, kept = model.parameter_groups(0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    shown = [[names[id(p)] for p in group["params"]] for group in (decayed, kept)]
    assert sorted(shown[0] + shown[1]) == sorted(names.values())
    assert "blocks.0.mixer.q_proj.weight" in shown[0]
    gates = {"blocks.0.mixer.decay.A_log", "blocks.1.mixer.decay.dt_bias"}
    assert {"embedding.weight", "norm.weight", *gates} <= set(shown[1])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_most_likely_continuation_is_that_of_prefill(pattern: str) -> None:
    model, prompt = make(pattern), tokens_of(2, 4)
    tokens = model.generate(prompt, 9, temperature=0)
    assert torch.equal(tokens[:, :4], prompt)
    assert torch.equal(model(tokens[:, :-1])[0].argmax(-1)[:, 3:], tokens[:, 4:])


def test_draws_follow_the_temperature_and_the_generator() -> None:
    model, prompt = make("GA"), tokens_of(1, 4).expand(1000, -1)

    def drawn(seed: int, temperature: float) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        return model.generate(prompt, 1, temperature=temperature, generator=random)[:, -1]

    assert torch.equal(drawn(0, 1.0), drawn(0, 1.0))
    assert not torch.equal(drawn(0, 1.0), drawn(1, 1.0))
    for temperature in (0.3, 1.0):
        chances = (model(prompt[:1])[0][0, -1] / temperature).softmax(-1)
        share = torch.bincount(drawn(0, temperature), minlength=VOCABULARY) / 1000
        # Four standard deviations of a share of 1000.
        slack = 4 * (chances * (1 - chances) / 1000).sqrt() + 1e-3
        assert bool(((share - chances).abs() < slack).all())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_little_training_lowers_the_loss_of_every_pattern(pattern: str) -> None:
    model = make(pattern, mlp_size=None).float()
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-2)
    tokens = torch.arange(21).remainder(7).expand(4, -1)
    losses = []
    for _ in range(25):
        logits, _ = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] > 1.5
    assert losses[-1] < 0.5


def test_a_decode_step_exports_and_compiles_as_one_graph() -> None:
    model, tokens = make("MGA").float().eval(), tokens_of(2, 9)
    with torch.no_grad():
        _, state = model(tokens[:, :8])
        expected = model(tokens[:, 8:], state)[0]
        exported = torch.export.export(model, (tokens[:, 8:], state)).module()
        torch.testing.assert_close(exported(tokens[:, 8:], state)[0], expected)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens[:, 8:], state)[0], expected)


def test_low_precision_stays_close_to_float32() -> None:
    model, tokens = make("GA").float(), tokens_of(1, 12)
    wide, _ = model(tokens)
    narrow, state = make("GA").bfloat16()(tokens)
    assert narrow.dtype == torch.bfloat16
    assert float((narrow.float() - wide).detach().norm() / wide.detach().norm()) < 0.05
    assert state[0].memory.dtype == torch.float32


# Refusals.

LETTERS = (
    "G (GatedDeltaNet with the rule that is asked for), M (GatedDeltaNet with the decay-only "
    "rule `gated`, in the place of Mamba2), K (KimiDeltaAttention), E (KimiDeltaAttention with "
    "erase and write gates, as Gated DeltaNet-2), A (SlidingWindowAttention)"
)


REFUSED: dict[str, Callable[[], Any]] = {
    f"HybridLM: pattern 'GXA' has the letter 'X', should have only {LETTERS}": lambda: make("GXA"),
    f"HybridLM: pattern 'ga' has the letter 'g', should have only {LETTERS}": lambda: make("ga"),
    f"HybridLM: pattern is empty, should be letters of {LETTERS}": lambda: make(""),
    "HybridLM: num_layers is 0, should be at least 1": lambda: make("G", num_layers=0),
    "HybridLM: rule is 'mamba', should be one of gated_delta, delta, gated, linear": (
        lambda: make("G", rule="mamba")
    ),
    "HybridLM: tokens has shape (3,), should be (B, T)": (
        lambda: make("G")(torch.zeros(3, dtype=torch.int64))
    ),
    "HybridLM: state is of 1 layers, should be of 2": (
        lambda: make("GA")(tokens_of(1, 2), make("A")(tokens_of(1, 2))[1])
    ),
    "SlidingWindowAttention: num_heads is 4, should divide hidden_size = 12 into heads of "
    "an even width": lambda: SlidingWindowAttention(12, 4),
    "SlidingWindowAttention: window is 0, should be at least 1, the token itself": (
        lambda: SlidingWindowAttention(12, 2, 0)
    ),
    "SlidingWindowAttention: x has shape (1, 2, 8), should be (B, T, hidden_size) with "
    "hidden_size = 12": lambda: SlidingWindowAttention(12, 2)(torch.zeros(1, 2, 8)),
    "SlidingWindowAttention: state.keys has shape (1, 2, 5, 6), should be (B, heads, "
    "window, D) = (1, 2, 4, 6)": lambda: SlidingWindowAttention(12, 2, 4)(
        torch.zeros(1, 1, 12), SlidingWindowAttention(12, 2, 5).zero_state(1)
    ),
}


@pytest.mark.parametrize(("message", "action"), REFUSED.items())
def test_what_does_not_fit_is_refused(message: str, action: Callable[[], Any]) -> None:
    assert message_of(SpecError, action) == message
