"""A layer that is converted keeps all of its weights, or says which cannot be kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from compat_models import SMALL, model
from errors import message_of
from gdn_ops import SpecError
from gdn_ops.nn import from_transformers

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("qwen3_5-3:1", "qwen3_next-2:1", "olmo_hybrid-1:1")


def layer_of(family: str = SMALL) -> Any:
    """Return a copy of a linear-attention layer of transformers."""
    return copy.deepcopy(model(family).model.layers[0].linear_attn)


def linears(layer: nn.Module) -> list[str]:
    return [name for name, part in layer.named_children() if type(part) is nn.Linear]


def assert_same_function(theirs: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, model(SMALL).config.hidden_size)
    with torch.no_grad():
        ours = from_transformers(theirs)(x)[0]
        torch.testing.assert_close(ours, theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_of_projections_are_kept(family: str) -> None:
    layer = layer_of(family)
    for name in linears(layer):
        part = getattr(layer, name)
        part.bias = nn.Parameter(torch.randn(part.out_features))
    assert_same_function(layer)
    ours = from_transformers(layer)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "parametrise", [parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_parametrised_weights_are_read_as_they_act(
    family: str, parametrise: Callable[[nn.Module], nn.Module]
) -> None:
    layer = layer_of(family)
    for name in linears(layer):
        parametrise(getattr(layer, name))
    layer.eval()
    assert_same_function(layer)


def test_the_activation_of_the_gate_is_kept() -> None:
    layer = layer_of()
    if not hasattr(layer.norm, "activation"):
        pytest.skip("norms of this transformers name no activation")
    layer.norm.activation = "sigmoid"
    assert from_transformers(layer).output_gate == "sigmoid"
    assert_same_function(layer)


class Adapter(nn.Module):
    """A linear layer with a low-rank addition; it shows the weight of the layer inside."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 1, bias=False)
        self.lora_B = nn.Linear(1, base_layer.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x))
        return y


class Subclass(Tensor):
    """A tensor of another kind, as sharded and quantised weights are."""


def frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def put(layer: Any, name: str, value: Any) -> None:
    owner, _, last = name.rpartition(".")
    setattr(layer.get_submodule(owner), last, value)


def wrapped_forward(layer: Any) -> None:
    inner = layer.out_proj.forward
    layer.out_proj.forward = lambda x: inner(x)


MERGE = "merge adapters into the model first, with peft model.merge_and_unload(), and dequantise it"

BROKEN: dict[str, Callable[[Any], object]] = {
    f"in_proj_qkv is a Adapter, should be a torch.nn.Linear: {MERGE}": (
        lambda layer: put(layer, "in_proj_qkv", Adapter(layer.in_proj_qkv))
    ),
    f"out_proj is a Adapter, should be a torch.nn.Linear: {MERGE}": (
        lambda layer: put(layer, "out_proj", Adapter(layer.out_proj))
    ),
    f"conv1d is a Adapter, should be a torch.nn.Conv1d: {MERGE}": (
        lambda layer: put(layer, "conv1d", Adapter(nn.Linear(3, 3)))
    ),
    "in_proj_z.weight has dtype int8, should be a float: dequantise the model first": (
        lambda layer: put(layer, "in_proj_z.weight", frozen(layer.in_proj_z.weight.to(torch.int8)))
    ),
    "in_proj_z.weight has dtype float8_e4m3fn, should be a float: dequantise the model first": (
        lambda layer: put(
            layer, "in_proj_z.weight", frozen(layer.in_proj_z.weight.to(torch.float8_e4m3fn))
        )
    ),
    "in_proj_z.weight is a Subclass, should be a torch.Tensor: gather a sharded model, or "
    "dequantise it, first": (
        lambda layer: put(
            layer,
            "in_proj_z.weight",
            frozen(layer.in_proj_z.weight.detach().as_subclass(Subclass)),
        )
    ),
    "in_proj_b.weight is on the device meta, should be loaded: weights that are offloaded or not "
    "loaded yet have no values": lambda layer: layer.in_proj_b.to("meta"),
    "out_proj has a forward of its own, should be a torch.nn.Linear without hooks: undo its "
    "offloading first, with accelerate remove_hook_from_submodules": wrapped_forward,
    "in_proj_a.weight is no parameter, should be one: remove what computes it from others first, "
    "with torch.nn.utils.remove_weight_norm or remove_spectral_norm": (
        lambda layer: torch.nn.utils.spectral_norm(layer.in_proj_a)
    ),
    "layer has the parameters gain, should have none besides those of the table in docs/layer.md: "
    "they would be lost": lambda layer: put(layer, "gain", nn.Parameter(torch.ones(1))),
    "layer has the parameters norm.bias, should have none besides those of the table in "
    "docs/layer.md: they would be lost": (
        lambda layer: put(layer, "norm.bias", nn.Parameter(torch.ones(1)))
    ),
    "out_proj has forward hooks, should have none: what they do would be lost; remove them first": (
        lambda layer: layer.out_proj.register_forward_hook(lambda module, x, y: 2 * y)
    ),
    "norm has forward hooks, should have none: what they do would be lost; remove them first": (
        lambda layer: layer.norm.register_forward_pre_hook(lambda module, x: x)
    ),
    "norm is a LayerNorm, should be an RMS norm": (
        lambda layer: put(layer, "norm", nn.LayerNorm(layer.head_v_dim, bias=False))
    ),
    "norm.eps is None, should be a number": (
        lambda layer: put(layer, "norm", nn.RMSNorm(layer.head_v_dim))
    ),
    "conv1d.weight has shape (6, 3, 4), should be (D, 1, k): depthwise": (
        lambda layer: put(layer, "conv1d", nn.Conv1d(6, 6, 4, groups=2, bias=False))
    ),
    # Refuse what hooks do around a layer.
    "layer has forward hooks, should have none: what they do would be lost; remove them first": (
        lambda layer: layer.register_forward_hook(lambda module, x, y: 2 * y)
    ),
    "layer has a forward of its own, should have that of its class: what it does would be lost": (
        lambda layer: put(layer, "forward", lambda x: x)
    ),
    "norm.activation is 'tanh', should be one of swish, silu, sigmoid": (
        lambda layer: put(layer, "norm.activation", "tanh")
    ),
    "layer has the shape (1, 3) for decay.A_log of the new layer, should have (3,): that is what "
    "its sizes say": (lambda layer: put(layer, "A_log", nn.Parameter(torch.zeros(1, 3)))),
    "the layer's activation is None, should be 'silu'": (
        lambda layer: put(layer, "activation", None)
    ),
    "A_log is a NoneType, should be a parameter": lambda layer: put(layer, "A_log", None),
}


@pytest.mark.parametrize(("message", "change"), BROKEN.items())
def test_weights_that_would_be_lost_are_refused_by_name(
    message: str, change: Callable[[Any], object]
) -> None:
    if not SMALL.startswith("qwen3_5"):
        pytest.skip("the names are those of Qwen3.5")
    layer = layer_of()
    change(layer)
    assert message_of(SpecError, from_transformers, layer) == f"from_transformers: {message}"


def test_a_compiled_layer_is_read_as_the_layer_inside() -> None:
    layer = layer_of()
    own, inside = (from_transformers(x) for x in (layer, torch.compile(layer, backend="eager")))
    for x, y in zip(own.parameters(), inside.parameters(), strict=True):
        assert torch.equal(x, y)
