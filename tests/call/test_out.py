"""Results go into memory of the caller, and sequences without an initial state start from zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import gdn_ops
from errors import message_of
from gdn_ops.backends.cpp import backend as cpp
from gdn_ops.backends.cpp.library import missing
from gdn_ops.spec.errors import SpecError, SpecTypeError

B, T, H, K, V = 2, 20, 2, 8, 12


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def given(**changes: Any) -> dict[str, Any]:
    """Return a call of the sequence op on two rows, with changes."""
    call = {"q": drawn(B, T, H, K), "k": drawn(B, T, H, K, seed=1) / K, "v": drawn(B, T, H, V)}
    call |= {name: drawn(B, T, H, seed=2).sigmoid() for name in ("alpha", "beta")}
    return call | {"initial_state": drawn(B, H, K, V, seed=3), "backend": "torch"} | changes


def like_v(**options: Any) -> Tensor:
    return torch.empty(B, T, H, V, **options)


STATE = drawn(B, H, K, V)
A_PAIR = "should be a pair of tensors for o and final_state: return_state is True"
SHARED = torch.empty(B * T * H * V + 8)

WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "out is 1, should be a torch.Tensor": (SpecTypeError, {"out": 1}),
    "out has shape (2, 20, 2, 8), should be (2, 20, 2, 12), that of v": (
        SpecError, {"out": torch.empty(B, T, H, K)}
    ),
    "out has dtype float16, should be float32, the dtype of v": (
        SpecError, {"out": like_v(dtype=torch.float16)}
    ),
    "out is on meta, should be on cpu, the device of v": (
        SpecError, {"out": like_v(device="meta")}
    ),
    "out has shape (2, 20, 2, 12) and strides (0, 24, 12, 1), so that elements share memory; "
    "results need memory for every element": (SpecError, {"out": like_v()[:1].expand(B, T, H, V)}),
    f"out has type Tensor, {A_PAIR}": (SpecTypeError, {"out": like_v(), "return_state": True}),
    f"out has 3 items, {A_PAIR}": (
        SpecTypeError, {"out": (like_v(), STATE, STATE), "return_state": True}
    ),
    "out[1] is None, should be a torch.Tensor": (
        SpecTypeError, {"out": (like_v(), None), "return_state": True}
    ),
    "out[1] has shape (1, 2, 8, 12), should be (N, HV, K, V) = (2, 2, 8, 12)": (
        SpecError, {"out": (like_v(), STATE[:1]), "return_state": True}
    ),
    "out[1] has dtype float64, should be one of float32, bfloat16, float16": (
        SpecError, {"out": (like_v(), STATE.double()), "return_state": True}
    ),
    "out[0] and out[1] share memory, should have memory of their own": (
        SpecError,
        {
            "out": (SHARED[: -8].view(B, T, H, V), SHARED[8 : 8 + STATE.numel()].view(STATE.shape)),
            "return_state": True,
        },
    ),
    "initial_state is None, should be a torch.Tensor: has_initial_state says whose counts": (
        SpecError, {"initial_state": None, "has_initial_state": torch.ones(B, dtype=torch.bool)}
    ),
    "has_initial_state is True, should be a torch.Tensor of bool": (
        SpecTypeError, {"has_initial_state": True}
    ),
    "has_initial_state has dtype int32, should be bool": (
        SpecError, {"has_initial_state": torch.ones(B, dtype=torch.int32)}
    ),
    "has_initial_state has shape (1,), should be (N,) = (2,); N is fixed by initial_state": (
        SpecError, {"has_initial_state": torch.ones(1, dtype=torch.bool)}
    ),
    "has_initial_state is on meta, should be on cpu, the device of initial_state": (
        SpecError, {"has_initial_state": torch.ones(B, dtype=torch.bool, device="meta")}
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_what_does_not_fit_is_refused_by_its_name(text: str) -> None:
    kind, changes = WRONG[text]
    with torch.no_grad():
        for function in (gdn_ops.gated_delta, gdn_ops.explain):
            message = message_of(kind, lambda f=function: f(**given(**changes)))
            assert message == f"gated_delta: {text}"


def test_nothing_is_written_where_gradients_are_needed() -> None:
    text = (
        "gated_delta: out is given, should be None where gradients are needed; call under "
        "torch.no_grad()"
    )
    asking = given(out=like_v())
    asking["q"].requires_grad_()
    out = like_v(requires_grad=True)
    for call in (asking, given(out=out)):
        assert message_of(SpecError, lambda call=call: gdn_ops.gated_delta(**call)) == text
        with torch.no_grad():
            gdn_ops.gated_delta(**call)


def test_transforms_write_to_no_memory_of_the_caller() -> None:
    call = given(out=like_v())

    def one(q: Tensor) -> Tensor:
        return gdn_ops.gated_delta(**call | {"q": q})

    text = "gated_delta: out is given, should be None under vmap, grad, vjp and jvp"
    assert message_of(SpecError, lambda: torch.func.vmap(one)(drawn(3, B, T, H, K))) == text


def test_a_wrong_out_changes_no_state() -> None:
    state = drawn(B, H, K, V)
    token = {name: x[:, 0] for name, x in given().items() if name in ("q", "k", "v")}
    token |= {"alpha": torch.rand(B, H), "state": state.clone(), "inplace": True}
    for out in (torch.empty(B, H, K), torch.empty(B, H, V, dtype=torch.bfloat16)):
        with pytest.raises(SpecError, match=r"^gated_delta_step: out has"):
            gdn_ops.gated_delta_step(**token, out=out)
    assert torch.equal(token["state"], state)


def test_decoded_tokens_are_written_too() -> None:
    tokens = {name: x[:, :3] for name, x in given().items() if isinstance(x, Tensor)}
    state = drawn(B, H, K, V)
    del tokens["initial_state"]
    with torch.no_grad():
        wanted = gdn_ops.gated_delta_steps(**tokens, state=state, return_states=True)
        out = like_v()[:, :3]
        found = gdn_ops.gated_delta_steps(**tokens, state=state, return_states=True, out=out)
        assert found[0] is out and all(map(torch.equal, found, wanted))
        token = {name: x[:, 0] for name, x in tokens.items()}
        for _ in range(3):  # the second call is repeated by the plan of the first
            wanted_o, _ = gdn_ops.gated_delta_step(**token, state=state)
            place = like_v()[:, 0]
            o, new = gdn_ops.gated_delta_step(**token, state=state, out=place)
            assert o is place and torch.equal(o, wanted_o) and new is not state


def test_an_out_that_lies_in_an_input_is_written_when_all_is_read() -> None:
    call = given()
    wanted = gdn_ops.gated_delta(**call)
    assert gdn_ops.gated_delta(**call, out=call["v"]) is call["v"]
    assert torch.equal(call["v"], wanted)


@pytest.mark.skipif(missing() is not None, reason=f"backend 'cpp': {missing()}")
def test_the_kernels_of_cpp_write_there_themselves() -> None:
    place = like_v()
    with torch.no_grad(), mock.patch.object(cpp, "empty") as empty:
        found = gdn_ops.gated_delta(**given(backend="cpp", out=place))
    assert not empty.called
    torch.testing.assert_close(found, gdn_ops.gated_delta(**given(backend="cpp")), rtol=0, atol=0)


def test_half_a_state_is_the_state_rounded_between_two_calls() -> None:
    call = given(backend="torch")
    tokens = ("q", "k", "v", "alpha", "beta")
    first, rest = (
        call | {name: call[name][:, part] for name in tokens} for part in (slice(9), slice(9, T))
    )
    stored = torch.empty(B, H, K, V, dtype=torch.bfloat16)
    with torch.no_grad():
        out = (torch.empty(B, 9, H, V), stored)
        gdn_ops.gated_delta(**first, return_state=True, out=out)
        _, exact = gdn_ops.gated_delta(**first, return_state=True)
        assert torch.equal(stored, exact.bfloat16())
        o = gdn_ops.gated_delta(**rest | {"initial_state": stored})
        wanted = gdn_ops.gated_delta(**rest | {"initial_state": exact.bfloat16().float()})
    assert torch.equal(o, wanted)


def test_under_autocast_results_have_its_dtype() -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = like_v(dtype=torch.bfloat16)
        found = gdn_ops.gated_delta(**given(out=out))
        wanted = gdn_ops.gated_delta(**given())
    assert found is out and torch.equal(found, wanted)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_a_graph_writes_into_its_inputs() -> None:
    mask = torch.tensor([True, False])
    call = given(has_initial_state=mask, return_state=True)

    def whole(state: Tensor, o: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
        return gdn_ops.gated_delta(**call | {"initial_state": state, "out": (o, final)})

    with torch.no_grad():
        wanted = whole(STATE, like_v(), torch.empty_like(STATE))
        o, final = like_v(), torch.empty_like(STATE)
        compiled(whole)(STATE, o, final)
    torch.testing.assert_close((o, final), wanted)
    zeroed = STATE * mask[:, None, None, None]
    known = gdn_ops.gated_delta(**given(initial_state=zeroed, return_state=True))
    torch.testing.assert_close(wanted, known)
