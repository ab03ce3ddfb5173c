"""Models that call the ops under torch.compile and torch.export: modes, autocast, dynamic shapes.

Nothing that is traced may be more than every supported Dynamo traces: see what a graph asks of
Python in the last section.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gdn_ops
from errors import message_of
from gdn_ops import Backend, Limits, SpecError
from gdn_ops.backends import torch as torch_backend
from gdn_ops.dispatch import order, registry
from gdn_ops.spec.ops import GATED_DELTA_STEP
from gdn_ops.torch_ops import onnx_export
from good_calls import token
from graphs import nodes

WIDTH, H, HV, K, V = 6, 2, 4, 5, 3


class Model(nn.Module):
    """Projections and one of the ops; the forward takes x (B, T, WIDTH), T = 1 for a step."""

    def __init__(self, op: str, **options: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(width: int) -> nn.Parameter:
            return nn.Parameter(0.3 * torch.randn(WIDTH, width, generator=generator))

        self.op, self.options = op, options
        self.q, self.k, self.v = weight(H * K), weight(H * K), weight(HV * V)
        self.alpha, self.beta = weight(HV), weight(HV)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x = nn.functional.dropout(x, 0.0, self.training)
        q, k = (project(x, w).unflatten(-1, (H, K)) for w in (self.q, self.k))
        v = project(x, self.v).unflatten(-1, (HV, V))
        alpha, beta = (torch.sigmoid(project(x, w)) for w in (self.alpha, self.beta))
        if self.op == "gated_delta":
            return gdn_ops.gated_delta(
                q, k, v, alpha, beta, initial_state=state, return_state=True, **self.options
            )
        if self.op == "gated_delta_steps":
            return gdn_ops.gated_delta_steps(q, k, v, alpha, beta, state, **self.options)
        token = (y.squeeze(1) for y in (q, k, v, alpha, beta))
        return gdn_ops.gated_delta_step(*token, state, **self.options)


def project(x: Tensor, w: Tensor) -> Tensor:
    """x w, in which autocast rounds nothing: what it rounds is what the ops ask it to."""
    return (x.unsqueeze(-1) * w).sum(-2)


def inputs(rows: int = 2, tokens: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, tokens, WIDTH, generator=generator)
    return x, torch.randn(rows, HV, K, V, generator=generator)


def autocast(on: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if on else nullcontext()


def results(model: Callable[..., Any], *values: Tensor, grad: bool, on: bool) -> list[Any]:
    """Return the outputs of a call and, where asked for, the gradients of everything."""
    x, state = (y.clone().requires_grad_(grad) for y in values)
    with torch.set_grad_enabled(grad):
        with autocast(on):
            outputs = model(x, state)
        if grad:
            leaves = [x, state, *model.parameters()]  # type: ignore[attr-defined]
            total = sum(y.float().square().sum() for y in outputs)
            outputs = (*outputs, *torch.autograd.grad(total, leaves))
    return [*outputs]


def same(actual: list[Any], expected: list[Any]) -> None:
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    torch.testing.assert_close(actual, expected)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# Whole models.

MODES = [
    pytest.param("gated_delta", True, id="train"),
    pytest.param("gated_delta", False, id="eval"),
    pytest.param("gated_delta_step", True, id="step in training"),
    pytest.param("gated_delta_step", False, id="step"),
    pytest.param("gated_delta_steps", False, id="steps"),
]


@pytest.mark.parametrize("on", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(("op", "training"), MODES)
@pytest.mark.parametrize("backend", ["auto", "naive", "torch"])
def test_a_model_is_one_graph_whatever_its_shape(
    backend: str, op: str, training: bool, on: bool
) -> None:
    model = Model(op, backend=backend).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, tokens in ((2, 7), (3, 11)):
        values = inputs(rows, 1 if op == "gated_delta_step" else tokens)
        expected = results(model, *values, grad=training, on=on)
        same(results(compiled, *values, grad=training, on=on), expected)


@pytest.mark.parametrize("on", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(
    ("op", "backend"),
    [("gated_delta", "auto"), ("gated_delta", "torch"), ("gated_delta_step", "auto")],
)
def test_inductor_trains_a_model(op: str, backend: str, on: bool) -> None:
    model = Model(op, backend=backend)
    values = inputs(2, 1 if op == "gated_delta_step" else 7)
    expected = results(model, *values, grad=True, on=on)
    actual = results(torch.compile(model, fullgraph=True), *values, grad=True, on=on)
    if not on:
        same(actual, expected)
    # Inductor keeps values wide that eager rounds to bfloat16, by 2^-9 of each.
    for a, b in zip(actual, expected, strict=True):
        a, b = a.detach().float(), b.detach().float()
        assert a.dtype == b.dtype and float((a - b).norm()) <= 2**-7 * float(b.norm())


@pytest.mark.parametrize("op", ["gated_delta", "gated_delta_step", "gated_delta_steps"])
def test_a_compiled_model_notices_that_autocast_was_turned_on_or_off(op: str) -> None:
    model, values = Model(op), inputs(2, 1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for on in (False, True, False):
        expected = results(model, *values, grad=False, on=on)
        same(results(compiled, *values, grad=False, on=on), expected)
        assert expected[0].dtype == (torch.bfloat16 if on else torch.float32)


@pytest.mark.parametrize("op", ["gated_delta", "gated_delta_step", "gated_delta_steps"])
def test_autocast_may_begin_and_end_inside_a_graph(op: str) -> None:
    model, values = Model(op), inputs(2, 1)

    def inside(x: Tensor, state: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = model(x, state)
        return [*actual, *model(x, state)]

    with torch.no_grad():
        actual = torch.compile(inside, fullgraph=True, backend="aot_eager")(*values)
        same(actual, inside(*values))
    assert [x.dtype for x in actual[::2]] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("on", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("op", ["gated_delta", "gated_delta_step", "gated_delta_steps"])
def test_an_export_keeps_batch_and_length_dynamic(op: str, on: bool) -> None:
    model, has_length = Model(op).eval(), op != "gated_delta_step"
    batch, tokens = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=2)
    shapes = {"x": {0: batch, 1: tokens} if has_length else {0: batch}, "state": {0: batch}}
    with torch.no_grad(), autocast(on):
        values = inputs(2, 7 if has_length else 1)
        program = torch.export.export(model, values, dynamic_shapes=shapes)
        for rows, length in ((3, 33), (1, 8)):
            values = inputs(rows, length if has_length else 1)
            same([*program.module()(*values)], [*model(*values)])
    if not on:
        assert nodes([program]) == ([f"gdn_ops.{op}.default"] if has_length else [])


# What a graph asks of Python.


def decode(**options: Any) -> Callable[..., Any]:
    """Return a compiled `gated_delta_step`, one full graph."""

    def step(**values: Any) -> tuple[Tensor, Tensor]:
        return gdn_ops.gated_delta_step(**values, **options)

    return torch.compile(step, fullgraph=True, backend="eager")


def test_a_graph_does_not_ask_which_devices_have_autocast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def untraceable(device_type: str) -> bool:
        raise AssertionError(f"asked for {device_type}, but Dynamo of torch 2.11 cannot trace it")

    monkeypatch.setattr(torch._C, "_is_autocast_available", untraceable)
    torch.testing.assert_close(decode()(**token()), gdn_ops.gated_delta_step(**token()))


@pytest.mark.parametrize("op", ["gated_delta", "gated_delta_step", "gated_delta_steps"])
def test_what_a_graph_takes_for_constant_is_made_of_literals(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def keep(*values: Any) -> Any:
            asked.extend(values)
            return function(*values)

        keep._dynamo_marked_constant = True  # type: ignore[attr-defined]
        return keep

    for module in (onnx_export, registry):
        for name, function in [*vars(module).items()]:
            if getattr(function, "_dynamo_marked_constant", False):
                monkeypatch.setattr(module, name, watched(function))
    model = Model(op, backend="naive")
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend="eager")(*inputs(2, 1))
    assert asked
    assert {type(x) for x in asked} <= {str, bool}, f"got {asked}, but should be literals"


def test_a_backend_that_is_not_installed_is_passed_over_without_an_import_in_the_graph(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gdn_ops_needy_backend.py").write_text("import a_package_that_is_absent\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    class Needy(Backend):
        name = "needy"
        limits = Limits(devices=("cpu",))
        requires = ("a_package_that_is_absent",)

    registry.known_backends()
    monkeypatch.setitem(registry._backends, "needy", Needy)
    monkeypatch.setitem(registry._backends, "broken", "gdn_ops_needy_backend")
    monkeypatch.setitem(order.AUTO_ORDER, "cpu", ("needy", "broken", "torch", "naive"))
    torch.testing.assert_close(decode()(**token()), gdn_ops.gated_delta_step(**token()))
    assert "gdn_ops_needy_backend" not in sys.modules


def test_a_traceable_backend_with_reasons_is_passed_over_as_it_is_without_a_graph(
    monkeypatch: pytest.MonkeyPatch, registry_as_found: None
) -> None:
    class Narrow(torch_backend.Torch):
        name = "narrow"
        limits = Limits(devices=("cpu",), dtypes=("bfloat16",))

    registry.register_backend(Narrow)
    monkeypatch.setitem(order.AUTO_ORDER, "cpu", ("narrow", "naive"))
    torch.testing.assert_close(decode()(**token()), gdn_ops.gated_delta_step(**token()))
    with pytest.raises(Exception, match=r"dtype float32 \(supported: bfloat16\)"):
        decode(backend="narrow")(**token())


def test_a_graph_warns_of_a_narrow_alpha_as_eager_does() -> None:
    alpha = token()["alpha"].bfloat16()
    text = "gated_delta_step: alpha is bfloat16, which has no value between"
    with pytest.warns(UserWarning, match=text):
        expected = gdn_ops.gated_delta_step(**token(alpha=alpha))
    with pytest.warns(UserWarning, match=text):
        torch.testing.assert_close(decode()(**token(alpha=alpha)), expected)


def test_a_bad_step_is_refused_in_the_same_words() -> None:
    bad = token(k=torch.rand(2, 4, 17))
    compiled = torch.compile(gdn_ops.gated_delta_step, backend="eager")
    message = message_of(SpecError, compiled, **bad)
    assert message == message_of(SpecError, gdn_ops.gated_delta_step, **bad)
    assert message.startswith(f"{GATED_DELTA_STEP.name}: k has shape (2, 4, 17), should")
    with pytest.raises(SpecError, match=r"alpha is 0\.5, should be a torch\.Tensor"):
        compiled(**token(alpha=0.5))
    with pytest.raises(Exception, match="SpecError"):
        decode()(**bad)
