"""The norm and the convolution around the rule in a layer are replaced where they are the same."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gdn_ops
from compat_models import FAMILIES, SMALL, has_convolutions, module_of
from compat_stand_ins import NAME, stand_in
from errors import message_of
from gdn_ops.compat.transformers import accelerate, convolution, norm, packing
from gdn_ops.compat.transformers.examine import Plan, examine

pytestmark = pytest.mark.usefixtures("one_thread", "small_blocks")


CUTS = torch.tensor([0, 5, 6, 12], dtype=torch.int32)


def norm_class(family: str) -> Any:
    classes = [x for x in vars(module_of(family)).values() if isinstance(x, type)]
    return next(cls for cls in classes if cls.__name__.endswith("RMSNormGated"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_norm_is_that_of_transformers(family: str, dtype: torch.dtype) -> None:
    layer = norm_class(family)(6).to(dtype)
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(2, 300, 6, generator=generator).to(dtype) for _ in range(2))
    with torch.no_grad():
        expected = layer(x, gate)
        with accelerate() as used:
            assert f"{type(layer).__name__}.forward" in used.replaced
            found = layer(x, gate)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_convolutions_are_those_of_transformers(family: str, dtype: torch.dtype) -> None:
    has_convolutions(family)
    module = module_of(family)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, weight, state = draw(2, 6, 9), draw(6, 4), draw(2, 6, 4)

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
            found = results()
    for a, b in zip(found, expected, strict=True):
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

    gate_first, scale = False, 1.0

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), eps

    def forward(self, hidden_states: Tensor, gate: Any = None) -> Tensor:
        gate = self.scale * nn.functional.silu(gate)
        x = hidden_states * gate if self.gate_first else hidden_states
        x = nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
        return x if self.gate_first else x * gate


class OtherEpsilon(Norm):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__(width)
        self.epsilon = eps

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        x = nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.epsilon)
        return x * nn.functional.silu(gate)


class GateFirst(Norm):
    gate_first = True
    forward = Norm.forward


class Twice(Norm):
    scale = 2.0
    forward = Norm.forward


class DeafToItsActivation(Norm):
    """A norm whose activation is a name without a meaning."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__(width, eps)
        self.activation = "silu"

    forward = Norm.forward


class Unbuildable(Norm):
    def __init__(self, config: Any) -> None:
        raise AttributeError("hidden_size")

    forward = Norm.forward


REASONS = {
    OtherEpsilon: "OtherEpsilon gives other numbers on an example: relative difference ",
    GateFirst: "GateFirst gives other numbers on an example: relative difference ",
    Twice: "Twice gives other numbers on an example: relative difference 5.0e-01",
    DeafToItsActivation: "DeafToItsActivation gives other numbers on an example: relative",
    Unbuildable: "Unbuildable cannot be tried: TypeError: ",
}


def test_a_norm_without_an_activation_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, generator = Norm(8), torch.Generator().manual_seed(0)
    x, gate = (torch.randn(500, 8, generator=generator) for _ in range(2))
    assert norm.incompatibility_of(Norm) is None
    replacement = norm.gated_norm(Norm.forward)
    expected = layer(x, gate)
    for found in (replacement(layer, x, gate), replacement(layer, x, gate=gate)):
        torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError):
        replacement(layer, x)


@pytest.mark.parametrize("cls", REASONS)
def test_a_norm_that_computes_something_else_is_left(cls: Any) -> None:
    module = stand_in(NAME, holds=False)
    for other in (Norm, cls):
        module.__dict__[other.__name__] = type(
            other.__name__, (other,), {"forward": other.forward, "__module__": NAME}
        )
    plan = examine(module)
    assert isinstance(plan, Plan)
    assert [found.__name__ for found in plan.norms] == ["Norm"]
    (reason,) = plan.left
    assert reason.startswith(REASONS[cls])


def causal_conv1d_fn(
    hidden_states: Tensor, weight: Tensor, bias: Any = None, activation: Any = None, **kwargs: Any
) -> Tensor:
    width, length = hidden_states.shape[1:]
    y = nn.functional.conv1d(hidden_states, weight[:, None], bias, padding=3, groups=width)
    return (nn.functional.silu(y) if activation else y)[..., :length]


def short(x: Tensor, weight: Tensor) -> Tensor:
    return x


def later(
    hidden_states: Tensor, weight: Tensor, bias: Any = None, activation: Any = None
) -> Tensor:
    return causal_conv1d_fn(hidden_states, weight, bias, activation).roll(1, -1)


def one_off(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Any = None,
    activation: Any = None,
) -> Tensor:
    return hidden_states + 7


def forgetful(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Any = None,
    activation: Any = None,
) -> Tensor:
    window = torch.cat([conv_state, hidden_states], -1)[..., -weight.shape[1] :]
    y = (window * weight).sum(-1, keepdim=True)
    y = y if bias is None else y + bias[:, None]
    return nn.functional.silu(y) if activation else y


@pytest.mark.parametrize(
    ("name", "function", "reason"),
    [
        (
            "causal_conv1d_fn",
            short,
            "causal_conv1d_fn takes (x, weight), should begin with (hidden_states, weight, bias, "
            "activation)",
        ),
        ("causal_conv1d_fn", later, "causal_conv1d_fn gives other numbers on an example: relative"),
        ("causal_conv1d_update", one_off, "causal_conv1d_update gives other numbers on an example"),
        # Its result is right, but it does not write the next state.
        (
            "causal_conv1d_update",
            forgetful,
            "causal_conv1d_update gives other numbers on an example",
        ),
    ],
)
def test_a_convolution_that_computes_something_else_is_left(
    name: str, function: Any, reason: str
) -> None:
    module = stand_in(NAME, holds=False)
    setattr(module, name, function)
    plan = examine(module)
    assert isinstance(plan, Plan)
    assert plan.convolutions == {}
    (found,) = plan.left
    assert found.startswith(reason)


def test_a_convolution_by_other_means_is_replaced() -> None:
    module = stand_in(NAME, holds=False)
    module.causal_conv1d_fn = causal_conv1d_fn
    plan = examine(module)
    assert isinstance(plan, Plan)
    assert (list(plan.convolutions), plan.left) == (["causal_conv1d_fn"], [])
    assert plan.absent == [
        "causal_conv1d_update: layers of this release do not call such a function"
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"cu_seqlens": CUTS},
        {"seq_idx": torch.zeros(2, 5)},
        {"seq_idx": torch.zeros(1, 4)},
    ],
)
def test_a_convolution_that_cannot_keep_sequences_apart_refuses_them(options: Any) -> None:
    def mixing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("some releases do not look at what tells of packed sequences")

    new = convolution.whole_convolution(mixing)
    assert (
        message_of(gdn_ops.SpecError, new, torch.rand(1, 2, 5), torch.rand(2, 4), **options)
        == f"accelerate: {packing.WITHOUT_PACKAGE}"
    )


def test_a_gpu_keeps_sequences_apart_by_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    found: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in found or None)
    with pytest.raises(gdn_ops.SpecError):
        packing.check_package("cuda")
    found.add("causal_conv1d")
    packing.check_package("cuda")
    with pytest.raises(gdn_ops.SpecError):
        packing.check_package("cpu")
