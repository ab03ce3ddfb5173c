"""A layer with the weights of transformers' or FLA's layer computes what that layer computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compat_models import FAMILIES, model
from errors import message_of
from gdn_ops import SpecError, gated_delta
from gdn_ops.nn import GatedDeltaNet, from_fla, from_transformers

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, TOKENS = 32, 21


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_of_transformers_keeps_its_function(family: str) -> None:
    theirs = model(family).model.layers[0].linear_attn
    ours = from_transformers(theirs)
    torch.manual_seed(0)
    x = torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        expected = theirs(x)
        y, state = ours(x[:, :-1])
        last, _ = ours(x[:, -1:], state)
    torch.testing.assert_close(torch.cat([y, last], 1), expected, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    with torch.no_grad():
        # Copies: what happens to one does not happen to the other.
        ours.A_log.add_(1)
        assert torch.equal(theirs(x), expected)


class FlaLayer(nn.Module):
    """The attributes and the function of FLA's layer (fla-core 0.6.0), which needs a GPU."""

    def __init__(self, *, use_gate: bool, bias: bool, activation: str, negative: bool) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.num_v_heads = WIDTH, 2, 4
        self.head_k_dim, self.head_v_dim = 8, 12
        self.use_gate, self.use_short_conv, self.allow_neg_eigval = use_gate, True, negative
        sizes = {"q": 16, "k": 16, "v": 48, "a": 4, "b": 4}
        sizes |= {"g": 48} if use_gate else {}
        for name, size in sizes.items():
            self.add_module(f"{name}_proj", nn.Linear(WIDTH, size, bias=False))
        for name in "qkv":
            size = sizes[name]
            conv = nn.Conv1d(size, size, 4, groups=size, bias=bias, padding=3)
            self.add_module(f"{name}_conv1d", conv)
        self.A_log = nn.Parameter(torch.randn(4))
        self.dt_bias = nn.Parameter(torch.randn(4))
        self.o_norm = nn.RMSNorm(12, eps=1e-5)
        nn.init.normal_(self.o_norm.weight)
        if use_gate:
            self.o_norm.activation = activation  # type: ignore[assignment]
        self.o_proj = nn.Linear(48, WIDTH, bias=False)

    def heads(self, x: Tensor, name: str) -> Tensor:
        y = getattr(self, f"{name}_proj")(x)
        y = getattr(self, f"{name}_conv1d")(y.mT)[..., : x.shape[1]].mT
        return functional.silu(y).unflatten(-1, (4 if name == "v" else 2, -1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(x, name) for name in "qkv")
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        beta = self.b_proj(x).sigmoid() * (2 if self.allow_neg_eigval else 1)
        alpha = torch.exp(-self.A_log.exp() * functional.softplus(self.a_proj(x) + self.dt_bias))
        o = self.o_norm(gated_delta(q, k, v, alpha, beta, backend="naive"))
        if self.use_gate:
            activate = torch.sigmoid if self.o_norm.activation == "sigmoid" else functional.silu
            o = o * activate(self.g_proj(x).unflatten(-1, (4, 12)))
        return self.o_proj(o.flatten(-2))


@pytest.mark.parametrize(
    "options",
    [
        {"use_gate": True, "bias": False, "activation": "swish", "negative": False},
        {"use_gate": True, "bias": True, "activation": "sigmoid", "negative": True},
        {"use_gate": False, "bias": False, "activation": "swish", "negative": False},
    ],
    ids=["default", "biased, sigmoid, negative eigenvalues", "no gate"],
)
def test_a_layer_of_fla_keeps_its_function(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theirs, x = FlaLayer(**options), torch.randn(2, TOKENS, WIDTH)
    ours = from_fla(theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], theirs(x), rtol=1e-5, atol=1e-5)
    marked = {n for n, p in ours.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"decay.A_log", "decay.dt_bias"}
    assert all(p.requires_grad for p in ours.parameters())


def test_an_fla_layer_without_convolution_keeps_its_shape() -> None:
    torch.manual_seed(0)
    theirs = FlaLayer(use_gate=True, bias=False, activation="swish", negative=False)
    theirs.use_short_conv = False
    for name in "qkv":
        delattr(theirs, f"{name}_conv1d")
    ours = from_fla(theirs)
    assert ours.conv is None
    assert ours(torch.randn(1, 3, WIDTH))[1].conv is None


KNOWN = "should be the linear-attention layer of"
OF_TRANSFORMERS = (
    f"{KNOWN} Qwen3-Next, Qwen3.5, OLMo-Hybrid, Kimi Linear, GLM-5.3-Flash or Ling-3.0"
)


def layer_with(activation: str) -> Any:
    return SimpleNamespace(conv1d=0, num_k_heads=0, activation=activation)


@pytest.mark.parametrize(
    ("convert", "layer", "message"),
    [
        (from_transformers, nn.Linear(2, 2), f"layer is a Linear, {OF_TRANSFORMERS}"),
        (from_transformers, layer_with("silu"), f"layer is a SimpleNamespace, {OF_TRANSFORMERS}"),
        (
            from_transformers,
            layer_with("gelu"),
            "the layer's activation is 'gelu', should be 'silu'",
        ),
        (
            from_fla,
            GatedDeltaNet(16, 2, head_dim=4),
            f"layer is a GatedDeltaNet, {KNOWN} fla.layers.GatedDeltaNet, KimiDeltaAttention or "
            f"GatedDeltaNet2",
        ),
    ],
)
def test_another_layer_is_refused(convert: Any, layer: Any, message: str) -> None:
    assert message_of(SpecError, convert, layer) == f"{convert.__name__}: {message}"
