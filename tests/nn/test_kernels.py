"""The layers compute the same by the C++ kernels and without, wherever the kernels may run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import gdn_ops
from cpp_libraries import note_calls
from errors import message_of
from gdn_ops.backends.cpp import library
from gdn_ops.nn import (
    GatedDeltaNet,
    GatedRMSNorm,
    KimiDeltaAttention,
    ShortConvolution,
    State,
    kernels,
)
from gdn_ops.nn.causal import causal_convolution
from gdn_ops.nn.norm import gated_rms_norm
from layer_kernels import ROUNDING
from nn_layers import OPTIONS, WIDTH, make

if library.missing() is not None:
    pytest.skip(f"backend 'cpp': {library.missing()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 37


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the names of the doors of the library that are called."""
    return note_calls(monkeypatch, "layers", "layer_token")


def plain(function: Callable[[], Any]) -> Any:
    """Run a function as where the library of kernels was not built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "missing", lambda: "not built")
        return function()


def close(actual: Any, expected: Any, dtype: torch.dtype = torch.float32) -> None:
    bound = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


def packing(kind: str) -> dict[str, Tensor]:
    if kind == "packed":
        return {"cu_seqlens": torch.tensor([0, 2, 2, 20, TOKENS])}
    return {"mask": torch.arange(TOKENS) < torch.tensor([[TOKENS], [9]])} if kind == "mask" else {}


@pytest.mark.parametrize("kind", ["whole", "packed", "mask"])
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_layer_is_the_same_without_the_library(name: str, has_state: bool, kind: str) -> None:
    layer, rows = make(**OPTIONS[name]), 1 if kind == "packed" else 2
    x = torch.randn(rows, TOKENS, WIDTH)
    state = None
    if has_state:
        with torch.no_grad():
            state = layer(torch.randn(4 if kind == "packed" else 2, 5, WIDTH))[1]

    def run() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y, new = layer(leaf, state, **packing(kind))
        kept = [t for t in new if t is not None]
        loss = y.square().sum() + sum(t.square().sum() for t in kept)
        grads = torch.autograd.grad(loss, [leaf, *layer.parameters()])
        return [y.detach(), *(t.detach() for t in kept), *grads]

    for one, other in zip(run(), plain(run), strict=True):
        scale = max(1.0, float(other.abs().max()))
        close(one / scale, other / scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_token_is_the_same_without_the_library(name: str, dtype: torch.dtype) -> None:
    layer = make(**OPTIONS[name]).to(dtype)
    x = torch.randn(2, 4, WIDTH).to(dtype)

    def run() -> list[Any]:
        with torch.no_grad():
            _, state = layer(x[:, :1])
            out = []
            for t in range(1, 4):
                y, state = layer(x[:, t : t + 1], state)
                out += [y, *(s for s in state if s is not None)]
        return out

    for one, other in zip(run(), plain(run), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        close(one.float(), other.float(), dtype)


@pytest.mark.parametrize("name", ["the paper", "no short conv"])
def test_a_state_that_is_given_is_not_changed(name: str) -> None:
    layer, x = make(**OPTIONS[name]), torch.randn(1, 1, WIDTH)
    with torch.no_grad():
        state = layer(torch.randn(1, 5, WIDTH))[1]
        before = [None if t is None else t.clone() for t in state]
        _, first = layer(x, state)
        _, again = layer(x, state)
    for t, old in zip(state, before, strict=True):
        assert old is None or torch.equal(t, old)
    for a, b in zip(first, again, strict=True):
        assert a is None or torch.equal(a, b)


LAYERS: dict[str, tuple[type[GatedDeltaNet], dict[str, Any]]] = {
    "GDN": (GatedDeltaNet, {}),
    "GDN, low rank": (GatedDeltaNet, {"gate_rank": 3}),
    "GDN, bounded": (GatedDeltaNet, {"lower_bound": -2.0}),
    "GLA": (GatedDeltaNet, {"channel_decay": True, "rule": "gated"}),
    "KDA": (KimiDeltaAttention, {}),
    "KDA, bounded": (KimiDeltaAttention, {"lower_bound": -5.0, "gate_rank": None}),
    "KDA, wide values": (KimiDeltaAttention, {"expand_v": 1.5, "output_gate": "silu"}),
}
"""Layers of which one token is one call."""


def members(name: str) -> GatedDeltaNet:
    """Return a layer of LAYERS with two value heads to a key head."""
    cls, options = LAYERS[name]
    torch.manual_seed(0)
    return cls(WIDTH, 2, 4, **{"head_dim": 4, **options})


@pytest.mark.parametrize("name", LAYERS)
def test_one_token_is_one_call(name: str, calls: list[str]) -> None:
    layer, x = members(name), torch.randn(3, 6, WIDTH)
    with torch.no_grad():
        y, expected = layer(x)
        state = layer(x[:, :5])[1]
        calls.clear()
        last, new = layer(x[:, 5:], state)
    assert calls == ["gdn_token"]
    close((last, *new), (y[:, 5:], *expected))
    # Autograd sees the parts.
    calls.clear()
    layer(x[:, 5:], state)
    assert "gdn_token" not in calls and "gdn_convolution" in calls


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_token_of_a_layer_is_that_of_float64(name: str, dtype: torch.dtype) -> None:
    layer, x = members(name).to(dtype), torch.randn(2, 8, WIDTH).to(dtype)
    with torch.no_grad():
        own, exact = layer(x[:, :4])[1], copy.deepcopy(layer).double()
        wide = State(*(None if s is None else s.double() for s in own))
        for t in range(4, 8):
            y, own = layer(x[:, t : t + 1], own)
            expected, wide = exact(x[:, t : t + 1].double(), wide)
            close(y.double(), expected, dtype)
    close(own.memory.double(), wide.memory, dtype)


@pytest.mark.parametrize("name", ["KDA", "KDA, bounded"])
def test_a_row_is_decoded_after_padding_as_alone(name: str, calls: list[str]) -> None:
    layer, x = members(name), torch.randn(2, 7, WIDTH)
    mask = torch.ones(2, 7)
    mask[1, :3] = 0
    with torch.no_grad():
        _, state = layer(x, mask=mask)
        _, alone = layer(x[1:, 3:])
        more = torch.randn(2, 1, WIDTH)
        calls.clear()
        y, state = layer(more, state)
        row, alone = layer(more[1:], alone)
    assert calls == 2 * ["gdn_token"]
    close((y[1:], state.memory[1:]), (row, alone.memory))


def test_one_token_of_gates_apart_is_not_that_call(calls: list[str]) -> None:
    layer, x = make(erase_write=True), torch.randn(1, 6, WIDTH)
    with torch.no_grad():
        y, _ = layer(x)
        state = layer(x[:, :5])[1]
        calls.clear()
        last, _ = layer(x[:, 5:], state)
    assert "gdn_token" not in calls and "gdn_convolution" in calls
    close(last, y[:, 5:])


def test_a_hook_of_a_part_is_called(calls: list[str]) -> None:
    layer, x = make(), torch.randn(1, 1, WIDTH)
    seen = []
    with torch.no_grad():
        state = layer(torch.randn(1, 5, WIDTH))[1]
        layer.conv.register_forward_hook(lambda *_: seen.append("conv"))
        layer.o_norm.register_forward_hook(lambda *_: seen.append("norm"))
        calls.clear()
        layer(x, state)
    assert seen == ["conv", "norm"] and "gdn_token" not in calls


def test_a_subclass_runs_its_own_methods(calls: list[str]) -> None:
    class Mine(GatedDeltaNet):
        def _output(self, o: Tensor, x: Tensor) -> Tensor:
            return super()._output(2 * o, x)

    layer, x = Mine(WIDTH, 2, head_dim=4), torch.randn(1, 1, WIDTH)
    with torch.no_grad():
        layer(x, layer.zero_state(1))
    assert "gdn_token" not in calls


X, W = torch.randn(2, 7, 3), torch.randn(3, 4)
CONVOLUTION = functools.partial(causal_convolution, silu=True)
NORM = functools.partial(gated_rms_norm, eps=1e-2)
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], str]] = {
    "convolution": (CONVOLUTION, (X, W, torch.randn(3)), "gdn_convolution"),
    "norm": (NORM, (X, W[:, 0].contiguous(), torch.randn(2, 7, 3)), "gdn_norm"),
}


@pytest.mark.parametrize("name", CASES)
def test_plain_tensors_take_the_kernels_and_nothing_else_does(name: str, calls: list[str]) -> None:
    function, operands, door = CASES[name]
    expected = plain(lambda: function(*operands))
    assert calls == []
    close(function(*operands), expected)
    assert calls == [door]
    calls.clear()
    others: dict[str, Callable[[], Tensor]] = {
        "float64": lambda: function(*(t.double() for t in operands)).float(),
        "another backend": lambda: function(*operands, backend="torch"),
        "vmap": lambda: torch.vmap(function)(*(t[None] for t in operands))[0],
        "export": lambda: exported(function, operands)(*operands),
        "make_fx": lambda: torch.fx.experimental.proxy_tensor.make_fx(function)(*operands)(
            *operands
        ),
        "negated": lambda: function(-torch._neg_view(operands[0]), *operands[1:]),
        "negated view": lambda: function(torch._neg_view(-operands[0]), *operands[1:]),
    }
    for what, run in others.items():
        close(run(), expected)
        assert calls == ([] if what != "negated" else [door]), what
        calls.clear()
    with gdn_ops.use_backend("torch"):
        close(function(*operands), expected)
    assert calls == []


def exported(function: Callable[..., Tensor], operands: tuple[Tensor, ...]) -> Any:
    class Module(torch.nn.Module):
        def forward(self, *operands: Tensor) -> Tensor:
            return function(*operands)

    return torch.export.export(Module(), operands).module()


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_and_second_derivatives_are_those_of_plain_torch(
    name: str, calls: list[str]
) -> None:
    function, operands, door = CASES[name]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(operands[0], torch.ones_like(operands[0]))
        tangent = forward_ad.unpack_dual(function(dual, *operands[1:])).tangent
    exact = [t.double() for t in operands]
    wanted = torch.func.jvp(
        lambda x: function(x, *exact[1:]), (exact[0],), (torch.ones_like(exact[0]),)
    )[1]
    close(tangent, wanted.float())
    assert calls == []

    def second(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        grads = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
        return [*torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)]

    for one, other in zip(second(list(operands)), second(exact), strict=True):
        scale = max(1.0, float(other.abs().max()))
        close(one / scale, (other / scale).float())
    assert calls == [door]


@pytest.mark.parametrize("name", CASES)
def test_batched_gradients_are_those_of_one_after_another(name: str) -> None:
    function, operands, _ = CASES[name]
    leaves = [t.clone().requires_grad_() for t in operands]
    y = function(*leaves)
    d = torch.randn(3, *y.shape)
    together = torch.autograd.grad(y, leaves, d, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for one, all_ in zip(
            torch.autograd.grad(y, leaves, d[i], retain_graph=True), together, strict=True
        ):
            close(one, all_[i])


def test_a_state_has_second_derivatives_too() -> None:
    conv = ShortConvolution(3).double()
    single = ShortConvolution(3)
    single.load_state_dict(conv.state_dict())
    conv.load_state_dict(single.state_dict())
    state, x = torch.randn(2, 3, 3), torch.randn(2, 5, 3)

    def second(layer: ShortConvolution, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x.clone(), state.clone())]
        y, last = layer(*leaves)
        loss = y.square().sum() + last.pow(3).sum()
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        return [*torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)]

    for one, other in zip(second(single, torch.float32), second(conv, torch.float64), strict=True):
        scale = max(1.0, float(other.abs().max()))
        close(one / scale, (other / scale).float())


@pytest.mark.parametrize("result", [0, 1])
def test_only_one_result_may_have_a_gradient(result: int) -> None:
    conv, x, state = ShortConvolution(3), torch.randn(1, 5, 3), torch.randn(1, 3, 3)

    def grads() -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), state.clone().requires_grad_()]
        loss = conv(*leaves)[result].sum()
        return [*torch.autograd.grad(loss, leaves, materialize_grads=True)]

    for one, other in zip(grads(), plain(grads), strict=True):
        close(one, other)


def test_half_precision_is_rounded_once() -> None:
    x, w, z = (torch.randn(s).bfloat16() for s in ((64, 128), (128,), (64, 128)))
    exact = gated_rms_norm(x.double(), w.double(), z.double(), eps=1e-6)
    nearest = exact.bfloat16()
    # A number next to the middle between two may be either; twice rounded ones differ by far more.
    assert float((gated_rms_norm(x, w, z, eps=1e-6) != nearest).double().mean()) < 1e-3


def test_an_unknown_backend_is_named() -> None:
    for layer, x in (
        (ShortConvolution(3, backend="troch"), X),
        (GatedRMSNorm(3, backend="troch"), X),
    ):
        text = message_of(gdn_ops.SpecError, layer, x)
        assert text.startswith("unknown backend 'troch', known: ")
        assert text.endswith("did you mean 'torch'?")


def test_a_state_of_the_layer_is_a_state(calls: list[str]) -> None:
    layer = make()
    with torch.no_grad():
        _, state = layer(torch.randn(2, 1, WIDTH), layer.zero_state(2))
    assert isinstance(state, State) and calls == ["gdn_token"]
    assert state.memory.dtype == torch.float32
