"""A few steps in one call, and pools of states: results, operators, and what a backend is given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import gdn_ops
from errors import message_of
from gdn_ops import (
    Backend,
    BackendUnsupportedError,
    Limits,
    SpecError,
    gated_delta,
    gated_delta_step,
    gated_delta_steps,
)
from gdn_ops.call.bind import Call, arguments_of, bind
from gdn_ops.dispatch import decode_fallbacks
from gdn_ops.dispatch.registry import register_backend
from gdn_ops.spec.ops import GATED_DELTA_STEP, GATED_DELTA_STEPS
from gdn_ops.testing.decode_laws import (
    a_pool_equals_separate_states,
    steps_equal_one_step_after_another,
)
from gdn_ops.testing.example import Example
from gdn_ops.testing.runs import Check, installed
from gdn_ops.torch_ops import eager
from good_calls import HV, B, K, T, V, draft, ints, states

P = 5
BACKENDS = ("naive", "torch")


def pooled(*slots: int, p: int = P, t: int = T, **changes: Any) -> dict[str, Any]:
    """Return the arguments of `gated_delta_steps` on a pool of states, with changes."""
    return draft(len(slots), t, state=states(p), state_indices=ints(*slots), **changes)


def token(arguments: dict[str, Any], t: int = 0) -> dict[str, Any]:
    """Return the arguments of `gated_delta_step` for one of the tokens."""
    kept = ("state", "state_indices")
    return {
        name: x[:, t] if isinstance(x, Tensor) and name not in kept else x
        for name, x in arguments.items()
    }


# What the ops compute; the conformance kit does this on random calls.

LAWS = (a_pool_equals_separate_states, steps_equal_one_step_after_another)
POOL = Example(B=3, T=T, H=2, R=2, K=5, V=3, pool=P, initial_state=True)
NOTHING_TO_RUN = ({"B": 0, "slots": ()}, {"B": 2, "slots": (-1, -1), "pool": 0}, {"T": 0})


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("large", [decode_fallbacks.LARGE_STATE, 0], ids=["gathered", "by_row"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "changes",
    [
        *({"slots": slots} for slots in ((0, -1, -1), (-1, 0, -1), (-1, -1, -1), (4, -1, 0))),
        *({"slots": (2, 0, 1)} | changes for changes in ({}, *NOTHING_TO_RUN)),
    ],
    ids=str,
)
def test_skipped_rows_never_write_whichever_slot_the_others_name(
    changes: dict[str, Any], backend: str, large: int, law: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_fallbacks, "LARGE_STATE", large)
    verdict = law(backend, replace(POOL, **changes))
    assert verdict.passed, verdict


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_returns_a_copy_of_the_state_or_zeros(backend: str) -> None:
    arguments = draft(t=0, backend=backend)
    o, state = gated_delta_steps(**arguments)
    assert torch.equal(state, arguments["state"]) and o.shape == (B, 0, HV, V)
    assert state.data_ptr() != arguments["state"].data_ptr()
    assert gated_delta_steps(**arguments, inplace=True)[1] is arguments["state"]
    _, state, states = gated_delta_steps(**(arguments | {"state": None}), return_states=True)
    assert torch.equal(state, torch.zeros(B, HV, K, V)) and states.shape == (B, 0, HV, K, V)


def test_a_narrow_state_is_rounded_once_per_call_and_not_once_per_token() -> None:
    arguments = draft(t=30, backend="naive")
    arguments["state"] = arguments["state"].bfloat16()
    _, state, states = gated_delta_steps(**arguments, return_states=True)
    wide = gated_delta_steps(**(arguments | {"state": arguments["state"].float()}))[1]
    assert torch.equal(state, wide.bfloat16()) and torch.equal(states[:, -1], state)
    one_by_one = arguments["state"]
    for t in range(30):
        one_by_one = gated_delta_step(**token(arguments | {"state": one_by_one}, t))[1]
    assert not torch.equal(one_by_one, state), "the test is about nothing"


@pytest.mark.parametrize("rule", ["gated_delta", "delta", "gated", "linear"])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_long_draft_through_torch_equals_a_sequence(rule: str, zeros: bool) -> None:
    arguments = draft(t=40, rule=rule, qk_l2norm=True)
    if zeros:
        arguments["alpha"][:, ::7] = 0
    if rule in ("delta", "linear"):
        arguments["alpha"] = None
    o, state, states = gated_delta_steps(**arguments, return_states=True, backend="torch")
    arguments["initial_state"] = arguments.pop("state")
    expected = gated_delta(**arguments, return_state=True, backend="naive")
    torch.testing.assert_close((o, state), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[:, -1], state)


@pytest.mark.parametrize("backend", (*BACKENDS, "default"))
def test_a_state_with_gaps_is_updated_in_place(backend: str, stand_in: type[Backend]) -> None:
    arguments = draft(backend=stand_in.name if backend == "default" else backend)
    expected = gated_delta_steps(**arguments)
    wide = torch.full((B, HV, V, 2 * K), torch.nan)
    state = wide[..., ::2].mT.copy_(arguments["state"])
    o, same = gated_delta_steps(**(arguments | {"state": state}), inplace=True)
    assert same is state and bool(wide[..., 1::2].isnan().all())
    torch.testing.assert_close((o, state), expected)


# What a backend is given.


class StandIn(Backend):
    """Notes its calls, and runs them on torch."""

    name = "stand_in"
    limits = Limits(devices=("cpu",))
    calls: list[Call]

    def __init__(self) -> None:
        type(self).calls = []

    def decode_one(self, call: Call) -> tuple[Tensor, Tensor]:
        self.calls.append(call)
        return eager.decode_one(installed("torch"), call)


@pytest.fixture
def stand_in(registry_as_found: None) -> type[Backend]:
    return register_backend(StandIn)


def test_a_backend_that_knows_no_pools_is_given_rows(stand_in: type[StandIn]) -> None:
    arguments = pooled(3, -1, 1, backend="stand_in")
    o, pool, states = gated_delta_steps(**arguments, return_states=True)
    expected = gated_delta_steps(**(arguments | {"backend": "torch"}), return_states=True)
    torch.testing.assert_close((o, pool, states), expected)
    gated_delta_step(**token(arguments))
    assert len(stand_in.calls) == T + 1, "steps are one step after another by default"
    assert {(c.op, c.sizes.T, c.inplace) for c in stand_in.calls} == {(GATED_DELTA_STEP, 1, True)}
    assert all(c.state_indices is None and not c.return_states for c in stand_in.calls)
    assert {c.state.shape for c in stand_in.calls if c.state is not None} == {(3, HV, K, V)}


@pytest.mark.parametrize("inplace", [False, True])
def test_a_backend_that_knows_pools_is_given_one_to_update(
    stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch, inplace: bool
) -> None:
    monkeypatch.setattr(stand_in, "limits", Limits(devices=("cpu",), pools=True))
    arguments = pooled(3, -1, 1, backend="stand_in", inplace=inplace)
    before = arguments["state"].clone()
    _, pool = gated_delta_step(**token(arguments))
    (call,) = stand_in.calls
    assert call.inplace and call.state is pool and call.state_indices is arguments["state_indices"]
    assert (pool is arguments["state"]) == inplace
    assert torch.equal(arguments["state"], before) != inplace
    gated_delta_steps(**arguments)
    assert all(c.state_indices is None for c in stand_in.calls[1:]), "the default gathers rows"


def test_a_backend_without_the_op_says_so(registry_as_found: None) -> None:
    class Old(StandIn):
        name = "old"
        limits = Limits(devices=("cpu",), ops=("gated_delta", "gated_delta_step"))

    register_backend(Old)
    arguments = pooled(3, -1, 1, backend="old")
    assert message_of(BackendUnsupportedError, gated_delta_steps, **arguments) == (
        "backend 'old' cannot run gated_delta_steps on these inputs\n"
        "  q float32 (3, 8, 4, 16) cpu, v (3, 8, 8, 6), rule gated_delta, "
        "state_indices into a pool of 5\n"
        "  old: op gated_delta_steps (supported: gated_delta, gated_delta_step)\n"
        '  try backend="cpp"'
    )


@pytest.mark.parametrize("rows", [False, True])
def test_large_states_on_a_cpu_are_advanced_where_they_are(
    stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch, rows: bool
) -> None:
    arguments = pooled(3, -1, 1, backend="stand_in", inplace=True)
    monkeypatch.setattr(decode_fallbacks, "LARGE_STATE", HV * K * V * 4 + (not rows))
    gated_delta_step(**token(arguments))
    given = [call.state for call in stand_in.calls]
    if rows:
        pool = arguments["state"]
        slots = [x.data_ptr() for x in given if x is not None]
        assert slots == [pool[3].data_ptr(), pool[1].data_ptr()]
        assert {(c.sizes.B, c.sizes.N) for c in stand_in.calls} == {(1, 1)}
    else:
        assert [x.shape for x in given if x is not None] == [(3, HV, K, V)]


KNOWN = "should be one of gated_delta, gated_delta_step, gated_delta_steps"


def test_explain_is_told_the_op_by_its_function_or_its_name() -> None:
    arguments = draft()
    positional = [arguments[n] for n in ("q", "k", "v", "alpha", "beta", "state")]
    for op in (gated_delta_steps, "gated_delta_steps"):
        assert gdn_ops.explain(*positional, op=op).op == "gated_delta_steps"
        assert gdn_ops.explain(op=op, **arguments).op == "gated_delta_steps"
    assert gdn_ops.explain(gated_delta_steps, *positional).op == "gated_delta_steps"
    assert gdn_ops.explain(*positional[:5]).op == "gated_delta"
    explained = gdn_ops.explain(gated_delta_step, **token(pooled(0, 1, 2)))
    assert (explained.op, explained.backend) == ("gated_delta_step", "cpp")
    assert not explained.pinned


@pytest.mark.parametrize(
    ("error", "text", "positional", "named"),
    [
        (
            TypeError,
            "gated_delta: got an unknown argument 'state', should be initial_state; op= says which "
            "op is called",
            (),
            draft(),
        ),
        (
            TypeError,
            "gated_delta: too many positional arguments; op= says which op is called",
            [None] * 6,
            {},
        ),
        (SpecError, f"op is 'gated_delta_stops', {KNOWN}", (), draft(op="gated_delta_stops")),
        (SpecError, f"op is 'relu', {KNOWN}", (torch.relu,), draft()),
        (SpecError, f"op has type OpSpec, {KNOWN}", (), draft(op=GATED_DELTA_STEPS)),
        (
            SpecError,
            "the op is given twice, first and as op=, should be given once",
            (gated_delta_step,),
            draft(op="gated_delta_steps"),
        ),
    ],
)
def test_explain_guesses_no_op(
    error: type[Exception], text: str, positional: Any, named: dict[str, Any]
) -> None:
    assert message_of(error, gdn_ops.explain, *positional, **named) == f"explain: {text}"


def test_nothing_waits_for_the_device_to_find_the_slots() -> None:
    with FakeTensorMode() as mode:
        arguments = {n: mode.from_tensor(x) for n, x in pooled(3, -1, 1).items()}
        given = arguments_of(GATED_DELTA_STEPS, arguments)
        call = bind(GATED_DELTA_STEPS, given, check_values=False)
        # A fake tensor has no values: a look at one raises.
        for name in BACKENDS:
            o, pool, _ = eager.decode_many(installed(name), call)
            assert (o.shape, pool.shape) == ((3, T, HV, V), (P, HV, K, V))
