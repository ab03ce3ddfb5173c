"""Tensors whose memory does not hold their values as they are, and numbers beyond their dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from errors import refusal
from gdn_ops import gated_delta, gated_delta_step, gated_delta_steps
from gdn_ops.dispatch.registry import Backend, get_backend, known_backends
from good_calls import HV, B, T, draft, packed, sequence, token, zeros

pytestmark = pytest.mark.filterwarnings("ignore:backend '.*' emulates its kernels")

INSTALLED = [name for name in known_backends() if isinstance(get_backend(name), Backend)]
H, K, V = 2, 16, 16


def negated(x: Tensor) -> Tensor:
    """Return a dense view that equals x and whose memory holds -x, as of `z.conj().imag`."""
    view = torch._neg_view(-x)
    assert view.is_neg() and view.is_contiguous() and torch.equal(view, x)
    return view


def arguments(t: int) -> dict[str, Any]:
    """Return drawn arguments of every op but the state, of a step if t is 0."""
    draw = torch.Generator().manual_seed(0)
    shape = (B, t) if t else (B,)
    given = {n: torch.randn(*shape, H, K, generator=draw) for n in ("q", "k")}
    given["v"] = torch.randn(*shape, HV, V, generator=draw)
    given |= {n: torch.rand(*shape, HV, generator=draw) for n in ("alpha", "beta")}
    return given


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize(
    ("op", "state", "t"),
    [
        (gated_delta, "initial_state", 4),
        (gated_delta, "initial_state", 40),
        (gated_delta_step, "state", 0),
        (gated_delta_steps, "state", 4),
    ],
)
def test_a_negated_view_counts_as_its_values(
    backend: str, op: Callable[..., Any], state: str, t: int
) -> None:
    given = arguments(t) | {state: torch.randn(B, HV, K, V)}
    more = {"return_state": True} if state == "initial_state" else {}
    plain = op(**given, **more, backend=backend)
    for name, x in given.items():
        results = op(**given | {name: negated(x)}, **more, backend=backend)
        for result, expected in zip(results, plain, strict=True):
            torch.testing.assert_close(result, expected, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("backend", INSTALLED)
def test_a_negated_gradient_counts_as_its_values(backend: str) -> None:
    v = arguments(40)["v"].requires_grad_()
    o, state = gated_delta(**arguments(40) | {"v": v}, return_state=True, backend=backend)
    d_o, d_state = torch.randn_like(o), torch.randn_like(state)
    of = {"outputs": (o, state), "inputs": v, "retain_graph": True}
    (plain,) = torch.autograd.grad(**of, grad_outputs=(d_o, d_state))
    (other,) = torch.autograd.grad(**of, grad_outputs=(negated(d_o), negated(d_state)))
    assert torch.equal(plain, other)


@pytest.mark.parametrize("op", ["gated_delta_step", "gated_delta_steps"])
def test_a_negated_state_is_not_updated_in_place(op: str) -> None:
    make = {"gated_delta_step": token, "gated_delta_steps": draft}[op]
    given = make(inplace=True)
    assert refusal(getattr(gdn_ops, op), **given | {"state": negated(given["state"])}) == (
        f"{op}: state is a negated view, whose memory holds -state; inplace needs memory of its "
        "values: pass state.resolve_neg(), or inplace=False"
    )


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("op", ["gated_delta_step", "gated_delta_steps"])
def test_a_state_of_inference_mode_is_updated_in_that_mode_alone(backend: str, op: str) -> None:
    given = arguments(4 if op.endswith("s") else 0) | {"inplace": True, "backend": backend}
    with torch.inference_mode():
        state = torch.randn(B, HV, K, V)
        before = state.clone()
        _, new = getattr(gdn_ops, op)(**given, state=state)
    assert new is state and not torch.equal(state, before)
    assert refusal(getattr(gdn_ops, op), **given, state=state) == (
        f"{op}: state was made under torch.inference_mode(), which alone may update it in place: "
        "decode under it, or pass state.clone()"
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize(
    ("op", "make", "name"),
    [
        *(("gated_delta", sequence, name) for name in ("q", "v", "beta", "initial_state")),
        ("gated_delta", lambda **changes: packed(zeros(2), **changes), "cu_seqlens"),
        ("gated_delta_step", token, "k"),
        ("gated_delta_steps", draft, "q"),
    ],
)
def test_a_nested_tensor_is_refused(
    layout: torch.layout, op: str, make: Callable[..., dict[str, Any]], name: str
) -> None:
    nested = torch.nested.nested_tensor([zeros(2, 3), zeros(4, 3)], layout=layout)
    assert refusal(getattr(gdn_ops, op), **make() | {name: nested}) == (
        f"{op}: {name} is a nested tensor, should have one shape; sequences of different lengths "
        "are packed along T, with cu_seqlens of gated_delta"
    )


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize(("t", "op"), [(T, "gated_delta"), (0, "gated_delta_step")])
def test_a_scale_beyond_the_dtype_is_refused(backend: str, t: int, op: str) -> None:
    given = arguments(t) | {"scale": -1e300, "backend": backend}
    text = f"{op}: scale is -1e+300, should be a finite number in float32"
    assert refusal(getattr(gdn_ops, op), **given) == text


def test_float64_takes_a_scale_beyond_float32() -> None:
    given = {name: x.double() for name, x in arguments(T).items()}
    o = gated_delta(**given, scale=1e300)
    torch.testing.assert_close(o / 1e300, gated_delta(**given, scale=1.0))
