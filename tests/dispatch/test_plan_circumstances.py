"""The short way of a call is left where somebody looks, or where another choice is made."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gdn_ops
from errors import message_of
from gdn_ops import Backend, Limits, SpecError, gated_delta_step
from gdn_ops.call.bind import Arguments, Call
from gdn_ops.dispatch import order, plans, registry
from gdn_ops.dispatch.backend import Prepared
from repeated_calls import HV, B, V, exact, given, needs_cpp

pytestmark = [needs_cpp, pytest.mark.usefixtures("registry_as_found", "one_thread", "long_ways")]


# Circumstances.


class Functions(TorchFunctionMode):
    """See the functions of torch that are called."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Name the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def in_functions(call: Callable[[], Any]) -> Any:
    with Functions():
        return call()


def in_operators(call: Callable[[], Any]) -> Any:
    with Operators():
        return call()


def in_autocast(call: Callable[[], Any]) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return call()


def in_forward_mode(call: Callable[[], Any]) -> Any:
    with forward_ad.dual_level():
        return call()


def in_vmap(call: Callable[[], Any]) -> Any:
    results: list[Any] = []

    def mapped(x: Tensor) -> Tensor:
        results.append(call())
        return x

    torch.vmap(mapped)(torch.zeros(2))
    return results[0]


def in_a_trace(call: Callable[[], Any]) -> Any:
    results: list[Any] = []

    def traced(x: Tensor) -> Tensor:
        results.append(call())
        return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(traced, torch.zeros(1), check_trace=False)  # type: ignore[no-untyped-call]
    return results[0]


CIRCUMSTANCES = (
    in_functions,
    in_operators,
    in_autocast,
    in_forward_mode,
    in_vmap,
    in_a_trace,
)


@pytest.mark.parametrize("within", CIRCUMSTANCES, ids=lambda within: within.__name__)
def test_a_call_that_somebody_looks_at_goes_the_long_way(
    within: Callable[[Callable[[], Any]], Any], long_ways: list[str]
) -> None:
    arguments = given(gated_delta_step, inplace=False)
    first = within(lambda: gated_delta_step(**arguments))
    gated_delta_step(**arguments)
    long_ways.clear()
    second = within(lambda: gated_delta_step(**arguments))
    assert long_ways == ["gated_delta_step"]
    for x, y in zip(second, first, strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype
    gated_delta_step(**arguments)
    assert long_ways == ["gated_delta_step"], "afterwards there is nobody"


def test_a_dispatch_mode_sees_the_same_operators_of_every_call() -> None:
    arguments = given(gated_delta_step, inplace=False)
    seen = []
    for _ in range(3):
        with Operators() as operators:
            gated_delta_step(**arguments)
        seen.append(operators.names)
        gated_delta_step(**arguments)
    assert seen[0] and seen[0] == seen[1] == seen[2]


def test_a_change_of_threads_counts_from_the_next_call_on(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = given(gated_delta_step)
    for _ in range(2):
        gated_delta_step(**arguments)
    seen: list[int] = []

    class Library:
        def gdn_decode_repeated(self, packed: bytes, threads: int, *pointers: object) -> int:
            seen.append(threads)
            return 0

    monkeypatch.setattr("gdn_ops.backends.cpp.prepared.library", Library)
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        gated_delta_step(**arguments)
    assert seen == [1, 2, 1]


@pytest.mark.parametrize("backend", ["cpp", "sevens"])
def test_a_narrow_alpha_is_warned_of_every_time(backend: str) -> None:
    gdn_ops.register_backend(Sevens)
    arguments = given(gated_delta_step, inplace=False, backend=backend)
    arguments["alpha"] = arguments["alpha"].bfloat16()
    for _ in range(3):
        with pytest.warns(UserWarning, match="alpha is bfloat16") as caught:
            gated_delta_step(**arguments)
        assert [warning.filename for warning in caught] == [__file__]


def test_a_library_that_is_gone_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = given(gated_delta_step, backend="cpp")
    for _ in range(2):
        gated_delta_step(**arguments)
    monkeypatch.setattr("gdn_ops.backends.cpp.backend.missing", lambda: "not built: run it")
    text = message_of(gdn_ops.BackendUnsupportedError, gated_delta_step, **arguments)
    assert "  cpp: not built: run it\n" in text


def test_eight_threads_share_a_plan() -> None:
    calls = [given(gated_delta_step, seed, inplace=False) for seed in range(64)]
    expected = [exact(gated_delta_step, arguments) for arguments in calls]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            found = list(pool.map(lambda arguments: gated_delta_step(**arguments), calls))
            torch.testing.assert_close(found, expected)


# Keeping.


class Sevens(Backend):
    """Answer 7 the long way, and 8 the short one."""

    name = "sevens"
    limits = Limits(devices=("cpu",))

    def decode_one(self, call: Call) -> tuple[Tensor, Tensor]:
        assert call.state is not None
        return torch.full_like(call.tokens.v, 7.0), call.state

    def prepared(self, call: Call) -> Prepared | None:
        q = call.tokens.q
        assert q.is_meta and not call.needs_grad
        if call.rule.name == "linear":
            return None

        def run(arguments: Arguments) -> Any:
            v, state = arguments.tokens.v, arguments.state
            return None if v[0, 0, 0] == 1 else (torch.full_like(v, 8.0), state)

        return run


def answer(**changes: Any) -> float:
    """Return the number that a call of the backend "sevens" is answered."""
    arguments = given(gated_delta_step, **{"backend": "sevens", "inplace": False, **changes})
    o: Tensor = gated_delta_step(**arguments)[0]
    assert (o == o[0, 0, 0]).all()
    return o[0, 0, 0].item()


def test_a_backend_may_have_no_short_way_or_leave_it() -> None:
    gdn_ops.register_backend(Sevens)
    assert [answer() for _ in range(3)] == [7, 8, 8]
    assert [answer(v=torch.ones(B, HV, V)), answer()] == [7, 8]
    assert [answer(rule="linear", alpha=None) for _ in range(3)] == [7, 7, 7]


def test_another_choice_is_made_as_soon_as_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gdn_ops.register_backend(Sevens)
    monkeypatch.setitem(order.AUTO_ORDER, "cpu", ("sevens", "naive"))
    assert [answer(backend="auto") for _ in range(2)] == [7, 8]
    with gdn_ops.use_backend("sevens"):
        assert [answer(backend="auto") for _ in range(2)] == [7, 8]
    preference = order.Preference("naive", "gated_delta_step", "cpu", "made up", ("float32",))
    changes: list[tuple[Any, str, Any]] = [
        (order.AUTO_ORDER, "cpu", ("naive", "sevens")),
        (order, "PREFERENCES", (preference,)),
        (
            registry,
            "vetoes",
            [lambda backend, call: "not today" if backend.name == "sevens" else None],
        ),
        (Sevens, "reasons", lambda self, call: ["not today"]),
    ]
    for place, name, value in changes:
        with monkeypatch.context() as patch:
            if isinstance(place, dict):
                patch.setitem(place, name, value)
            else:
                patch.setattr(place, name, value)
            o = gated_delta_step(**given(gated_delta_step, inplace=False))[0]
            assert not (o == 8).any()
        assert answer(backend="auto") == 8
    registry.unregister_backend("sevens")
    text = message_of(SpecError, answer)
    assert text.startswith("unknown backend 'sevens', known: ")


def test_an_emulating_backend_and_a_subclass_of_its_own_way_have_no_plan() -> None:
    class Emulating(Sevens):
        name = "emulating"
        limits = Limits(devices=("cuda",), emulated_devices=("cpu",))

    gdn_ops.register_backend(Emulating)
    with pytest.warns(UserWarning, match="emulates its kernels"):
        assert [answer(backend="emulating") for _ in range(3)] == [7, 7, 7]


def test_the_oldest_plans_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MOST_PLANS", 2)
    gdn_ops.register_backend(Sevens)
    assert [answer(scale=scale) for scale in (1.0, 2.0, 3.0)] == [7, 7, 7]
    assert len(plans._plans) == 2
    assert [answer(scale=scale) for scale in (2.0, 3.0, 1.0)] == [8, 8, 7]


def test_a_plan_holds_no_tensor_of_a_call() -> None:
    arguments = given(gated_delta_step)
    for _ in range(2):
        results = gated_delta_step(**arguments)
    held = [weakref.ref(x) for x in (*arguments.values(), *results) if isinstance(x, Tensor)]
    del arguments, results
    gc.collect()
    assert [x() for x in held] == [None] * len(held)
