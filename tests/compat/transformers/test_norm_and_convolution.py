"""The norm and the convolution around the rule in a layer are replaced where they are the same."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gdn_ops
from compat_models import FAMILIES, SMALL, has_convolutions, module_of
from compat_stand_ins import NAME, plan_of, stand_in
from errors import message_of
from gdn_ops.compat.transformers import accelerate, convolution, norm, packing

pytestmark = pytest.mark.usefixtures("one_thread", "small_blocks")


CUTS = torch.tensor([0, 5, 6, 12], dtype=torch.int32)


def norm_class(family: str) -> Any:
    classes = [x for x in vars(module_of(family)).values() if isinstance(x, type)]
    return next(cls for cls in classes if cls.__name__.endswith("RMSNormGated"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_norm_is_that_of_transformers(family: str, dtype: torch.dtype) -> None:
    layer = norm_class(family)(6).to(dtype)
    torch.manual_seed(0)
    x, gate = (torch.randn(2, 300, 6).to(dtype) for _ in range(2))
    with torch.no_grad():
        expected = layer(x, gate)
        with accelerate() as used:
            assert f"{type(layer).__name__}.forward" in used.replaced
            y = layer(x, gate)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_convolutions_are_those_of_transformers(family: str, dtype: torch.dtype) -> None:
    has_convolutions(family)
    module = module_of(family)
    torch.manual_seed(0)
    x, weight, state = (torch.randn(s).to(dtype) for s in ((2, 6, 9), (6, 4), (2, 6, 4)))

    def results() -> list[Tensor]:
        y = module.causal_conv1d_fn(x, weight, None, activation="silu", position_ids=None)
        plain = module.causal_conv1d_fn(x, weight, state[0, :, 0])
        last, several = state.clone(), state[..., :3].clone()
        one = module.causal_conv1d_update(x[..., :1], last, weight, state[0, :, 0], "silu")
        two = module.causal_conv1d_update(x[..., :2], several, weight, None, "silu")
        return [y, plain, one, last, two, several]

    with torch.no_grad():
        expected = results()
        with accelerate():
            ours = results()
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b)


def test_what_is_not_on_a_cpu_is_left_to_transformers() -> None:
    # The convolution and the norm are replaced for numbers on CPUs alone.
    has_convolutions(SMALL)
    module = module_of(SMALL)
    x, weight = torch.empty(1, 6, 5, device="meta"), torch.empty(6, 4, device="meta")
    with accelerate():
        y = module.causal_conv1d_fn(x, weight, None, activation="silu")
        assert y.is_meta
        assert y.shape == x.shape
        with torch.device("meta"):
            assert norm_class(SMALL)(6)(x.mT, x.mT).is_meta
        with pytest.raises(KeyError, match="no such activation"):
            module.causal_conv1d_fn(x, weight, None, activation="no such activation")


class Norm(nn.Module):
    """A norm as in releases before 5.15: it has no activation to look at."""

    gate_first, scale, further_epsilon = False, 1.0, 0.0

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), eps

    def forward(self, hidden_states: Tensor, gate: Any = None) -> Tensor:
        gate = self.scale * nn.functional.silu(gate)
        x = hidden_states * gate if self.gate_first else hidden_states
        eps = self.variance_epsilon + self.further_epsilon
        x = nn.functional.rms_norm(x, self.weight.shape, self.weight, eps)
        return x if self.gate_first else x * gate


OTHER_NUMBERS = "gives other numbers on an example: relative"

OTHER_NORMS: dict[str, tuple[dict[str, Any], str]] = {
    # name: what it has otherwise than Norm, why it is left
    "OtherEpsilon": ({"further_epsilon": 0.5}, f"{OTHER_NUMBERS} difference "),
    "GateFirst": ({"gate_first": True}, f"{OTHER_NUMBERS} difference "),
    "Twice": ({"scale": 2.0}, f"{OTHER_NUMBERS} difference 5.0e-01"),
    "DeafToItsActivation": ({"activation": "silu"}, OTHER_NUMBERS),
    "Unbuildable": ({"__init__": lambda self, config: None}, "cannot be tried: TypeError: "),
}


def test_a_norm_without_an_activation_is_replaced() -> None:
    torch.manual_seed(0)
    layer, (x, gate) = Norm(8), torch.randn(2, 500, 8)
    assert norm.incompatibility_of(Norm) is None
    replacement = norm.gated_norm(Norm.forward)
    expected = layer(x, gate)
    for y in (replacement(layer, x, gate), replacement(layer, x, gate=gate)):
        torch.testing.assert_close(y, expected)
    with pytest.raises(TypeError):
        replacement(layer, x)


@pytest.mark.parametrize("name", OTHER_NORMS)
def test_a_norm_that_computes_something_else_is_left(name: str) -> None:
    changes, reason = OTHER_NORMS[name]
    module = stand_in(NAME, holds=False)
    for cls, content in (("Norm", {}), (name, changes)):
        own = {"forward": Norm.forward, "__module__": NAME}
        setattr(module, cls, type(cls, (Norm,), {**own, **content}))
    plan = plan_of(module)
    assert [replaced.__name__ for replaced in plan.norms] == ["Norm"]
    (left,) = plan.left
    assert left.startswith(f"{name} {reason}")


def causal_conv1d_fn(
    hidden_states: Tensor, weight: Tensor, bias: Any = None, activation: Any = None, **kwargs: Any
) -> Tensor:
    width, length = hidden_states.shape[1:]
    y = nn.functional.conv1d(hidden_states, weight[:, None], bias, padding=3, groups=width)
    return (nn.functional.silu(y) if activation else y)[..., :length]


def forgetful(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Any = None,
    activation: Any = None,
) -> Tensor:
    """Compute the right result, but do not write the next state."""
    window = torch.cat([conv_state, hidden_states], -1)[..., -weight.shape[1] :]
    y = (window * weight).sum(-1, keepdim=True)
    y = y if bias is None else y + bias[:, None]
    return nn.functional.silu(y) if activation else y


@pytest.mark.parametrize(
    ("name", "function", "reason"),
    [
        (
            "causal_conv1d_fn",
            lambda x, weight: x,
            "takes (x, weight), should begin with (hidden_states, weight, bias, activation)",
        ),
        (
            "causal_conv1d_fn",
            lambda hidden_states, weight, bias=None, activation=None: causal_conv1d_fn(
                hidden_states, weight, bias, activation
            ).roll(1, -1),
            OTHER_NUMBERS,
        ),
        (
            "causal_conv1d_update",
            lambda hidden_states, conv_state, weight, bias=None, activation=None: hidden_states + 7,
            OTHER_NUMBERS,
        ),
        ("causal_conv1d_update", forgetful, OTHER_NUMBERS),
    ],
)
def test_a_convolution_that_computes_something_else_is_left(
    name: str, function: Any, reason: str
) -> None:
    module = stand_in(NAME, holds=False)
    setattr(module, name, function)
    plan = plan_of(module)
    assert plan.convolutions == {}
    (left,) = plan.left
    assert left.startswith(f"{name} {reason}")


def test_a_convolution_by_other_means_is_replaced() -> None:
    module = stand_in(NAME, holds=False)
    module.causal_conv1d_fn = causal_conv1d_fn
    plan = plan_of(module)
    assert (list(plan.convolutions), plan.left) == (["causal_conv1d_fn"], [])
    assert plan.absent == [
        "causal_conv1d_update: layers of this release do not call such a function"
    ]


@pytest.mark.parametrize(
    "options",
    [{"cu_seqlens": CUTS}, {"seq_idx": torch.zeros(2, 5)}, {"seq_idx": torch.zeros(1, 4)}],
)
def test_a_convolution_that_cannot_keep_sequences_apart_refuses_them(options: Any) -> None:
    def mixing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("some releases do not look at what tells of packed sequences")

    new, x, weight = convolution.whole_convolution(mixing), torch.rand(1, 2, 5), torch.rand(2, 4)
    message = message_of(gdn_ops.SpecError, new, x, weight, **options)
    assert message == f"accelerate: {packing.WITHOUT_PACKAGE}"


def test_a_gpu_keeps_sequences_apart_by_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    packages: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in packages or None)
    with pytest.raises(gdn_ops.SpecError):
        packing.check_package("cuda")
    packages.add("causal_conv1d")
    packing.check_package("cuda")
    with pytest.raises(gdn_ops.SpecError):
        packing.check_package("cpu")
