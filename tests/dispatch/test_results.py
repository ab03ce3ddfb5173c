"""A backend that returns something else than it should is named, with what it should return."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gdn_ops
from constant_backends import arguments
from errors import message_of
from gdn_ops import Backend, Forward, Grads, Limits, register_backend
from gdn_ops.call.bind import Arguments, Call, Tokens, bind
from gdn_ops.dispatch.registry import get_backend, unregister_backend
from gdn_ops.dispatch.results import Summarised, checked_start, checked_summary, checked_walk
from gdn_ops.spec.ops import GATED_DELTA
from good_calls import draft, token

OUT, STATE = (1, 4, 4, 6), (1, 4, 8, 6)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    unregister_backend("mine")


def register(**methods: Callable[..., Any]) -> None:
    """Register a backend `mine` that is `torch` but for some methods, given the right result."""
    right = get_backend("torch")
    assert isinstance(right, Backend)

    def wrong(name: str, change: Callable[[Any], Any]) -> Callable[..., Any]:
        return lambda self, *given: change(getattr(right, name)(*given))

    members = {name: wrong(name, change) for name, change in methods.items()}
    own = {"name": "mine", "limits": Limits(devices=("cpu",), second_grad=True, forward_mode=True)}
    register_backend(type("Mine", (type(right),), members | own))


FORWARD = "a gdn_ops.Forward(o, final_state, saved)"
FORWARDS: list[tuple[Callable[[Forward], Any], str]] = [
    (lambda out: None, f"None, should return {FORWARD}"),
    (lambda out: out.o, f"a tensor {OUT} of float32, should return {FORWARD}"),
    (lambda out: tuple(out), f"a tuple of 3, should return {FORWARD}"),
    (lambda out: "o", f"a value of type str, should return {FORWARD}"),
    (
        lambda out: out._replace(o=None),
        f"o as None, should return a tensor {OUT} of float32",
    ),
    (
        lambda out: out._replace(o=out.o.double()),
        f"o as a tensor {OUT} of float64, should return a tensor {OUT} of float32",
    ),
    (
        lambda out: out._replace(final_state=out.final_state.mT),
        f"final_state as a tensor (1, 4, 6, 8) of float32, should return a tensor {STATE} of "
        f"float32",
    ),
    (
        lambda out: out._replace(saved=None),
        "saved as None, should return a tuple of tensors",
    ),
    (
        lambda out: out._replace(saved=(out.o, 1.0)),
        "saved as tuple with a value of type float, should return a tuple of tensors",
    ),
]


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize(("change", "text"), FORWARDS)
def test_a_wrong_forward_is_named(
    change: Callable[[Any], Any], text: str, needs_grad: bool
) -> None:
    register(forward=change)
    given = arguments(backend="mine")
    given["v"].requires_grad_(needs_grad)
    text = f"backend 'mine': forward returns {text}"
    assert message_of(TypeError, gdn_ops.gated_delta, **given) == text
    given.pop("backend")

    def mapped(v: Tensor) -> Tensor:
        return gdn_ops.gated_delta(**given | {"v": v}, backend="mine")

    v = torch.ones(2, *given["v"].shape, requires_grad=needs_grad)
    if "tensor (" not in text:  # which has the mapped rows, too
        assert message_of(TypeError, torch.vmap(mapped), v) == text


@pytest.mark.parametrize("change", [lambda out: None, lambda out: out.o])
def test_a_wrong_forward_in_a_graph_is_named(change: Callable[[Any], Any]) -> None:
    register(forward=change)
    given = arguments()
    operator = torch.ops.gdn_ops.gated_delta
    names = [argument.name for argument in operator.default._schema.arguments]
    options = {"rule": "gated_delta", "qk_l2norm": False, "backend": "mine", "save": False}
    called = {name: given.get(name) for name in names} | options
    message = message_of(TypeError, operator, **called)
    assert message.startswith("backend 'mine': forward returns ")
    assert message.endswith(f", should return {FORWARD}")


NAMES = "q, k, v, alpha, log_alpha, beta, erase, write, state"
BACKWARDS: list[tuple[Callable[[Grads], Any], str]] = [
    (lambda out: None, f"None, should return a gdn_ops.Grads of 9: {NAMES}"),
    (
        lambda out: out.q,
        f"a tensor (1, 4, 2, 8) of float32, should return a gdn_ops.Grads of 9: {NAMES}",
    ),
    (lambda out: out[:3], f"3 gradients, should return a gdn_ops.Grads of 9: {NAMES}"),
    (lambda out: (*out, None), f"10 gradients, should return a gdn_ops.Grads of 9: {NAMES}"),
    (
        lambda out: out._replace(v=out.v[0]),
        f"the gradient of v as a tensor (4, 4, 6) of float32, should return a tensor {OUT} of "
        f"float32",
    ),
    (
        lambda out: out._replace(v=2.0),
        f"the gradient of v as a value of type float, should return a tensor {OUT} of float32",
    ),
]


@pytest.mark.parametrize(("change", "text"), BACKWARDS)
def test_a_wrong_backward_is_named(change: Callable[[Any], Any], text: str) -> None:
    register(backward=change)
    given = arguments(backend="mine")
    v = given.pop("v").requires_grad_()
    text = f"backend 'mine': backward returns {text}"
    total = gdn_ops.gated_delta(v=v, **given).sum()
    assert message_of(TypeError, total.backward) == text
    graded = torch.func.grad(lambda v: gdn_ops.gated_delta(v=v, **given).sum())
    assert message_of(TypeError, graded, v.detach()) == text
    o = torch.compile(gdn_ops.gated_delta, backend="aot_eager")(v=v, **given)
    # Some releases of torch add which node of the graph ran.
    assert message_of(TypeError, o.sum().backward).startswith(text)


STEP = "a tuple (o, state)"
STEPS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda out: None, f"None, should return {STEP}"),
    (lambda out: out[0], f"a tensor (2, 8, 6) of float32, should return {STEP}"),
    (lambda out: (*out, None), f"a tuple of 3, should return {STEP}"),
    (
        lambda out: (out[0][:1], out[1]),
        "o as a tensor (1, 8, 6) of float32, should return a tensor (2, 8, 6) of float32",
    ),
    (
        lambda out: (out[0], out[1].double()),
        "state as a tensor (2, 8, 16, 6) of float64, should return a tensor (2, 8, 16, 6) of "
        "float32",
    ),
    (
        lambda out: (out[0], None),
        "state as None, should return a tensor (2, 8, 16, 6) of float32",
    ),
]


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize(("change", "text"), STEPS)
def test_a_wrong_step_is_named(change: Callable[[Any], Any], text: str, has_state: bool) -> None:
    register(decode_one=change)
    given = {name: x for name, x in token().items() if has_state or name != "state"}
    text = f"backend 'mine': decode_one returns {text}"
    assert message_of(TypeError, gdn_ops.gated_delta_step, **given, backend="mine") == text


MANY = "a tuple (o, state, states or None)"
DRAFTS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda out: None, f"None, should return {MANY}"),
    (lambda out: out[:2], f"a tuple of 2, should return {MANY}"),
    (
        lambda out: (out[0][:, :1], *out[1:]),
        "o as a tensor (2, 1, 8, 6) of float32, should return a tensor (2, 8, 8, 6) of float32",
    ),
    (
        lambda out: (*out[:2], None),
        "states as None, should return a tensor (2, 8, 8, 16, 6) of float32",
    ),
]


@pytest.mark.parametrize(("change", "text"), DRAFTS)
def test_wrong_steps_are_named(change: Callable[[Any], Any], text: str) -> None:
    register(decode_many=change)
    text = f"backend 'mine': decode_many returns {text}"
    given = draft() | {"return_states": True, "backend": "mine"}
    assert message_of(TypeError, gdn_ops.gated_delta_steps, **given) == text


def test_states_that_nobody_asked_for_are_named() -> None:
    register(decode_many=lambda out: (*out[:2], out[0]))
    text = (
        "backend 'mine': decode_many returns states as a tensor (2, 8, 8, 6) of float32, should "
        "return None: none are asked for"
    )
    assert message_of(TypeError, gdn_ops.gated_delta_steps, **draft(), backend="mine") == text


def test_a_wrong_step_behind_steps_and_pools_is_named() -> None:
    class Mine(Backend):
        name = "mine"
        limits = Limits(devices=("cpu",))

        def decode_one(self, call: Call) -> Any:
            return None

    register_backend(Mine)
    text = f"backend 'mine': decode_one returns None, should return {STEP}"
    assert message_of(TypeError, gdn_ops.gated_delta_steps, **draft(), backend="mine") == text
    slots = {"state_indices": torch.tensor([1, 0]), "backend": "mine"}
    assert message_of(TypeError, gdn_ops.gated_delta_step, **token(), **slots) == text
    assert message_of(TypeError, gdn_ops.gated_delta_steps, **draft(), **slots) == text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda out: None, "None, should return a tuple (o, final_state)"),
        (lambda out: out[0], f"a tensor {OUT} of float32, should return a tuple (o, final_state)"),
        (
            lambda out: (out[0], None),
            f"final_state as None, should return a tensor {STATE} of float32",
        ),
    ],
)
def test_a_wrong_pure_is_named(change: Callable[[Any], Any], text: str) -> None:
    register(pure=change)
    given = arguments(backend="mine")
    v = given.pop("v")

    def pushed() -> Any:
        return torch.func.jvp(lambda v: gdn_ops.gated_delta(v=v, **given), (v,), (v,))

    assert message_of(TypeError, pushed) == f"backend 'mine': pure returns {text}"


STAGES: list[tuple[Callable[..., Any], Any, str]] = [
    (checked_summary, None, "summarise returns None, should return a Summarised(M, R, kept)"),
    (
        checked_summary,
        Summarised(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 4, 5)),
        "summarise returns M as a tensor (1, 2, 1, 1) of float32, should return a tensor "
        "(1, 2, 4, 4) of float32",
    ),
    (
        checked_summary,
        Summarised(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 5, 4)),
        "summarise returns R as a tensor (1, 2, 5, 4) of float32, should return a tensor "
        "(1, 2, 4, 5) of float32",
    ),
    (
        checked_start,
        torch.zeros(1, 2, 4, 5),
        "summarise_gradients returns a tensor (1, 2, 4, 5) of float32, should return a tuple "
        "(gradient, kept)",
    ),
    (
        checked_start,
        (None, ()),
        "summarise_gradients returns the gradient as None, should return a tensor (1, 2, 4, 5) of "
        "float32",
    ),
    (
        lambda backend, call, out: checked_walk(backend, "walk", call, out),
        torch.zeros(1, 2, 5, 4),
        "walk returns the result as a tensor (1, 2, 5, 4) of float32, should return a tensor "
        "(1, 2, 4, 5) of float32",
    ),
]


@pytest.mark.parametrize(("check", "out", "text"), STAGES)
def test_a_wrong_stage_is_named(check: Callable[..., Any], out: Any, text: str) -> None:
    q, v, gate = torch.randn(1, 3, 2, 4), torch.randn(1, 3, 2, 5), torch.rand(1, 3, 2)
    call = bind(GATED_DELTA, Arguments(Tokens(q, q, v, gate, None, gate)))
    assert message_of(TypeError, check, get_backend("naive"), call, out) == (
        f"backend 'naive': {text}"
    )
