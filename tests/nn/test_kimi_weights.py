"""A layer with the weights of another library's KDA or GDN-2 computes what that layer computes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from errors import message_of
from gdn_ops import SpecError
from gdn_ops.nn import KimiDeltaAttention, State, from_fla, from_transformers

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, TOKENS = 32, 21

COMMON = {"hidden_size": WIDTH, "num_hidden_layers": 2}
COMMON |= {"num_attention_heads": 2, "num_key_value_heads": 2}
KIMI = {**COMMON, "linear_head_dim": 8, "linear_num_heads": 3}
FAMILIES = {
    # module: configuration, class of the layer
    "kimi_linear": ("KimiLinearConfig", "KimiLinearDeltaAttention"),
    "glm5_next": ("Glm5NextTextConfig", "Glm5NextTextLinearAttention"),
    "bailing_hybrid": ("BailingHybridConfig", "BailingHybridDeltaAttention"),
}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    # name: module, arguments of the configuration
    "Kimi Linear": ("kimi_linear", KIMI),
    "GLM-5.3-Flash": ("glm5_next", KIMI),
    "GLM-5.3-Flash, not bounded": ("glm5_next", {**KIMI, "linear_lower_bound": None}),
    "Ling-3.0": ("bailing_hybrid", {**COMMON, "head_dim": 8, "kda_lower_bound": -3.0}),
    "Ling-3.0, not bounded": (
        *("bailing_hybrid", {**COMMON, "head_dim": 8, "kda_safe_gate": False}),
    ),
}


def of_transformers(name: str) -> tuple[Any, Any]:
    """Return a random layer of transformers and its configuration, or skip where it has none."""
    family, options = THEIRS[name]
    path = f"transformers.models.{family}"
    module = pytest.importorskip(
        f"{path}.modeling_{family}", reason=f"transformers has no {family}"
    )
    of_config, of_layer = FAMILIES[family]
    made = importlib.import_module(f"{path}.configuration_{family}")
    config = getattr(made, of_config)(**options)
    torch.manual_seed(0)
    layer = getattr(module, of_layer)(config, 0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.eval(), config


@pytest.mark.parametrize("name", THEIRS)
def test_a_layer_of_transformers_keeps_its_function(name: str) -> None:
    theirs, _ = of_transformers(name)
    ours = from_transformers(theirs)
    assert isinstance(ours, KimiDeltaAttention)
    assert (ours.lower_bound is not None) == ("not bounded" not in name and name != "Kimi Linear")
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
    assert set(ours.parameters_without_weight_decay()) == {
        *("decay.A_log", "decay.dt_bias", "o_norm.weight")
    }


def test_a_cache_of_transformers_is_continued() -> None:
    theirs, config = of_transformers("Kimi Linear")
    cache = importlib.import_module("transformers").DynamicCache(config=config)
    ours, x = from_transformers(theirs), torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        expected = theirs(x)
        theirs(x[:, :9], cache=cache)
        conv, memory = cache.get_conv_state(0), cache.get_recurrent_state(0)
        y, _ = ours(x[:, 9:], State(conv[..., -3:], memory))
    torch.testing.assert_close(y, expected[:, 9:], rtol=1e-5, atol=1e-5)


class FlaLayer(nn.Module):
    """The attributes and the function of FLA's layers (fla-core 0.6.0), which need a GPU."""

    H, HV, K, V = 2, 4, 8, 12

    def __init__(self, *, is_apart: bool, bound: float | None, negative: bool) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.num_v_heads = WIDTH, self.H, self.HV
        self.head_k_dim, self.head_v_dim = self.K, self.V
        self.use_short_conv, self.allow_neg_eigval, self.is_apart = True, negative, is_apart
        if not is_apart:
            self.lower_bound = bound
        keys, values = self.H * self.K, self.HV * self.V
        # Decay and erase gate of GDN-2 are of key heads, of KDA of value heads.
        self.gates = self.H if is_apart else self.HV
        sizes = {"q": keys, "k": keys, "v": values, "b": keys if is_apart else self.HV}
        sizes |= {"w": values} if is_apart else {}
        for name, size in sizes.items():
            self.add_module(f"{name}_proj", nn.Linear(WIDTH, size, bias=False))
        for name in "qkv":
            size = sizes[name]
            conv = nn.Conv1d(size, size, 4, groups=size, bias=False, padding=3)
            self.add_module(f"{name}_conv1d", conv)
        inner = nn.Linear(WIDTH, self.V, bias=False), nn.Linear(WIDTH, self.V, bias=False)
        self.f_proj = nn.Sequential(inner[0], nn.Linear(self.V, self.gates * self.K, bias=False))
        self.g_proj = nn.Sequential(inner[1], nn.Linear(self.V, values))
        self.A_log = nn.Parameter(torch.randn(self.gates))
        self.dt_bias = nn.Parameter(torch.randn(self.gates * self.K))
        self.o_norm = nn.RMSNorm(self.V, eps=1e-5)
        nn.init.normal_(self.o_norm.weight)
        self.o_norm.activation = "sigmoid"  # type: ignore[assignment]
        self.o_proj = nn.Linear(values, WIDTH, bias=False)

    def convolved(self, x: Tensor, name: str) -> Tensor:
        y = getattr(self, f"{name}_proj")(x)
        y = getattr(self, f"{name}_conv1d")(y.mT)[..., : x.shape[1]].mT
        return functional.silu(y).unflatten(-1, (self.HV if name == "v" else self.H, -1))

    def over_value_heads(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.HV // x.shape[2], 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.convolved(x, name) for name in "qkv")
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        step = (self.f_proj(x) + self.dt_bias).unflatten(-1, (self.gates, self.K))
        A, bound = self.A_log.exp()[:, None], getattr(self, "lower_bound", None)
        g = -A * functional.softplus(step) if bound is None else bound * (A * step).sigmoid()
        erase = self.b_proj(x).sigmoid().unflatten(-1, (self.gates, -1))
        erase = erase * (2 if self.allow_neg_eigval else 1)
        write = erase
        if self.is_apart:
            write = self.w_proj(x).sigmoid().unflatten(-1, (self.HV, self.V))
        q, k, g, erase = (self.over_value_heads(y) for y in (q, k, g, erase))
        state, out = x.new_zeros(len(x), self.HV, self.K, self.V), []
        for t in range(x.shape[1]):
            state = state * g[:, t].exp()[..., None]
            read = ((erase * k)[:, t, :, None] @ state)[:, :, 0]
            state = state + k[:, t, :, :, None] * (write * v)[:, t, :, None]
            state = state - k[:, t, :, :, None] * read[:, :, None]
            out.append((q[:, t, :, None] @ state)[:, :, 0] / self.K**0.5)
        o = self.o_norm(torch.stack(out, 1))
        o = o * self.g_proj(x).sigmoid().unflatten(-1, (self.HV, self.V))
        return self.o_proj(o.flatten(-2))


@pytest.mark.parametrize(
    "options",
    [
        {"is_apart": False, "bound": None, "negative": True},
        {"is_apart": False, "bound": -5.0, "negative": False},
        {"is_apart": True, "bound": None, "negative": False},
        {"is_apart": True, "bound": None, "negative": True},
    ],
    ids=["KDA, negative eigenvalues", "KDA, bounded", "GDN-2", "GDN-2, negative eigenvalues"],
)
def test_a_layer_of_fla_keeps_its_function(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theirs, x = FlaLayer(**options), torch.randn(2, TOKENS, WIDTH)
    ours = from_fla(theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], theirs(x), rtol=1e-5, atol=1e-5)
    marked = {n for n, p in ours.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"decay.A_log", "decay.dt_bias"}
    assert isinstance(ours, KimiDeltaAttention) and ours.erase_write == options["is_apart"]


def test_what_the_new_layer_has_no_place_for_is_refused() -> None:
    theirs = FlaLayer(is_apart=False, bound=None, negative=False)
    theirs.extra = nn.Parameter(torch.zeros(2))
    assert message_of(SpecError, from_fla, theirs) == (
        "from_fla: layer has the parameters extra, should have none besides those of the table in "
        "docs/layer.md: they would be lost"
    )
    del theirs.extra
    theirs.lower_bound = -8.0
    assert message_of(SpecError, from_fla, theirs) == (
        "GatedDeltaNet: lower_bound is -8.0, should be a number in [-5, 0): log α of the bounded "
        "gate lies between it and 0"
    )
