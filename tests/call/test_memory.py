"""Calls whose tensors share memory give the right results, or say why they cannot."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchRuntimeError

from errors import message_of
from gdn_ops import SpecError, gated_delta, gated_delta_step, gated_delta_steps
from gdn_ops.call.bind import arguments_of, bind
from gdn_ops.call.memory import apart, overlaps_itself
from gdn_ops.dispatch.registry import Backend, get_backend, known_backends
from gdn_ops.spec.ops import GATED_DELTA_STEP

pytestmark = pytest.mark.filterwarnings("ignore:backend '.*' emulates its kernels")

INSTALLED = [name for name in known_backends() if isinstance(get_backend(name), Backend)]
EAGER = [name for name in INSTALLED if name != "compile"]

T, K, V = 3, 16, 16

# Where the elements of one tensor lie.


def test_whether_a_tensor_overlaps_itself_is_exact() -> None:
    draw = random.Random(0)
    found = {True: 0, False: 0}
    for _ in range(3000):
        shape = [draw.randint(0, 4) for _ in range(4)]
        strides = [draw.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24)) for _ in range(4)]
        places = [
            sum(index * step for index, step in zip(indices, strides, strict=True))
            for indices in itertools.product(*map(range, shape))
        ]
        is_shared = len(set(places)) < len(places)
        assert overlaps_itself(torch.empty(400).as_strided(shape, strides)) == is_shared
        found[is_shared] += 1
    assert min(found.values()) > 500


def in_memory_of(*shape: int, order: tuple[int, ...]) -> Tensor:
    """Return an empty tensor whose axes lie in memory in another order, the last one densest."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.empty([shape[axis] for axis in order]).permute(back)


def with_odd_strides(*shape: int, stride: int) -> Tensor:
    """Return an empty tensor whose axes of length 1 have a stride that nothing follows from."""
    dense = torch.empty(shape)
    steps = [s if size > 1 else stride for size, s in zip(shape, dense.stride(), strict=True)]
    return torch.empty(dense.numel() + 3).as_strided(shape, steps, 3)


LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "transposed": lambda *s: in_memory_of(*s, order=(0, 1, 3, 2)),
    "heads first": lambda *s: in_memory_of(*s, order=(1, 0, 2, 3)),
    "heads last": lambda *s: in_memory_of(*s, order=(0, 2, 3, 1)),
    "reversed": lambda *s: in_memory_of(*s, order=(3, 2, 1, 0)),
    "rows within": lambda *s: in_memory_of(*s, order=(1, 2, 0, 3)),
    "every other column": lambda *s: torch.empty(*s[:-1], 2 * s[-1] + 1)[..., 1::2],
    "one layer of three": lambda *s: torch.empty(s[0], 3, *s[1:])[:, 1],
    "the end of a buffer": lambda *s: torch.empty(s[0] + 2, *s[1:])[2:],
    "every other row": lambda *s: torch.empty(2 * s[0], *s[1:])[1::2],
    "odd strides": lambda *s: with_odd_strides(*s, stride=5),
    "strides of 0": lambda *s: with_odd_strides(*s, stride=0),
}


def tokens(heads: int, rows: int, t: int) -> dict[str, Any]:
    """Return the arguments of `gated_delta_steps` but the state; of a step if t is 0."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, max(t, 1), heads)
    arguments = {name: torch.randn(*shape, K, generator=generator) for name in ("q", "k", "v")}
    arguments["k"] = torch.nn.functional.normalize(arguments["k"], dim=-1)
    arguments |= {name: torch.rand(shape, generator=generator) for name in ("alpha", "beta")}
    return arguments if t else {name: x[:, 0] for name, x in arguments.items()}


def expected(arguments: dict[str, Any], state: Tensor, slots: Tensor | None) -> Any:
    """Return the results of the definition in float64, computed from copies."""
    op: Any = gated_delta_steps if arguments["q"].dim() == 4 else gated_delta_step
    wide = {name: x.double() for name, x in arguments.items()}
    given: dict[str, Any] = {"state": state.double(), "state_indices": slots, "backend": "naive"}
    return op(**wide, **given)


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooled", [False, True], ids=["states", "pool"])
def test_a_state_of_any_layout_is_updated_in_place(backend: str, layout: str, pooled: bool) -> None:
    cases = [(1, 2), (1, 1), (2, 2)] if backend != "compile" else [(1, 2)]
    for (heads, rows), t in itertools.product(cases, (0, T)):
        slots = torch.tensor([3, 1][:rows]) if pooled else None
        named: Any = slice(0, rows) if slots is None else slots
        state = LAYOUTS[layout](4 if pooled else rows, heads, K, V).fill_(0.5)
        state[named] = torch.randn(rows, heads, K, V, generator=torch.Generator().manual_seed(1))
        arguments = tokens(heads, rows, t)
        o, new = expected(arguments, state, slots)
        for keep in (False, True) if t else (False,):
            mine = LAYOUTS[layout](*state.shape).copy_(state)
            op: Any = gated_delta_steps if t else gated_delta_step
            more: dict[str, Any] = {"return_states": True} if keep else {}
            given: dict[str, Any] = {
                "state": mine,
                "state_indices": slots,
                "inplace": True,
                "backend": backend,
            }
            results = op(**arguments, **given, **more)
            assert results[1] is mine
            torch.testing.assert_close(results[:2], (o.float(), new.float()))


# A state that overlaps itself.

OVERLAPPING: dict[str, Callable[[], Tensor]] = {
    "expanded": lambda: torch.randn(1, 1, K, V).expand(2, 2, K, V),
    "slots": lambda: torch.randn(2000).as_strided((2, 2, K, V), (100, K * V, V, 1)),
    "one axis": lambda: torch.randn(2, 2, 1, V).expand(2, 2, K, V),
    "no multiple": lambda: torch.randn(9000).as_strided((2, 2, K, V), (7777, 600, 3, 5)),
}


@pytest.mark.parametrize("backend", EAGER)
@pytest.mark.parametrize("layout", OVERLAPPING)
@pytest.mark.parametrize("pooled", [False, True], ids=["states", "pool"])
@pytest.mark.parametrize("t", [0, T], ids=["step", "steps"])
def test_a_state_that_overlaps_itself_is_read_but_not_updated(
    backend: str, layout: str, pooled: bool, t: int
) -> None:
    op: Any = gated_delta_steps if t else gated_delta_step
    state, arguments = OVERLAPPING[layout](), tokens(2, 2, t)
    slots = torch.tensor([1, 0]) if pooled else None
    given: dict[str, Any] = {"state": state, "state_indices": slots, "backend": backend}
    text = message_of(SpecError, op, **arguments, **given, inplace=True)
    assert text == (
        f"{op.__name__}: state has shape (2, 2, 16, 16) and strides {state.stride()}, so that "
        f"elements share memory; inplace needs memory for every element: pass "
        f"state.contiguous(), or inplace=False"
    )
    o, new = expected(arguments, state, slots)
    torch.testing.assert_close(op(**arguments, **given), (o.float(), new.float()))


# Inputs that lie in the memory of the state.


def within(state: Tensor, name: str, t: int) -> Tensor:
    """Return an input of a call as a view of its state (2, HV, K, V)."""
    row = {"v": 0, "q": 3, "k": 6, "alpha": 12, "beta": 13}[name]
    if name in ("alpha", "beta"):
        return state[:, :, row, : max(t, 1)].transpose(1, 2)[:, slice(None) if t else 0]
    return state[:, :, row : row + max(t, 1)].transpose(1, 2)[:, slice(None) if t else 0]


SHARED = ("q", "k", "v", "alpha", "beta")


def sharing(names: tuple[str, ...], transposed: bool, t: int) -> tuple[dict[str, Any], Tensor]:
    """Return the arguments of a call, some of which are views of the state, and the state."""
    state = torch.rand(2, 2, K, V, generator=torch.Generator().manual_seed(1)) / 2
    state = state.mT if transposed else state
    return tokens(2, 2, t) | {name: within(state, name, t) for name in names}, state


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("names", [*((name,) for name in SHARED), SHARED], ids="-".join)
@pytest.mark.parametrize("pooled", [False, True], ids=["states", "pool"])
def test_inputs_that_are_views_of_the_state_are_read_before_it_is_written(
    backend: str, names: tuple[str, ...], pooled: bool
) -> None:
    slots = torch.tensor([1, 0]) if pooled else None
    lengths = (0, T) if backend != "compile" else (0,)
    for transposed, t in itertools.product((False, True), lengths):
        arguments, state = sharing(names, transposed, t)
        o, new = expected(arguments, state, slots)
        op: Any = gated_delta_steps if t else gated_delta_step
        given: dict[str, Any] = {
            "state": state,
            "state_indices": slots,
            "inplace": True,
            "backend": backend,
        }
        results = op(**arguments, **given)
        torch.testing.assert_close(results, (o.float(), new.float()))


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize("t", [0, T], ids=["step", "steps"])
def test_a_graph_reads_its_inputs_before_it_writes_the_state(backend: str, t: int) -> None:
    op: Any = gated_delta_steps if t else gated_delta_step

    def run(arguments: dict[str, Any], state: Tensor) -> Any:
        return op(**arguments, state=state, inplace=True, backend=backend)

    torch._dynamo.reset()
    function = torch.compile(run, backend="aot_eager", fullgraph=True)
    arguments, state = sharing(("v", "q"), False, t)
    o, new = expected(arguments, state, None)
    with torch.no_grad():
        results = function(arguments, state)
        torch.testing.assert_close(results, (o.float(), new.float()))
        torch.testing.assert_close(state, new.float())
        # Dynamo of torch 2.8 names only the type of an error that it meets while it traces.
        text = r"elements share memory|raised exception \w+\(SpecError\)"
        with pytest.raises(TorchRuntimeError if t else Exception, match=text):
            function(tokens(2, 2, t), OVERLAPPING["expanded"]())


def test_only_what_lies_within_the_state_is_copied() -> None:
    buffer = torch.rand(4000)
    state = buffer[1000 : 1000 + 2 * 2 * K * V].view(2, 2, K, V)
    arguments = tokens(2, 2, 0)
    arguments["q"] = buffer[:64].view(2, 2, K)  # before the state
    arguments["k"] = buffer[1000 - 64 : 1000].view(2, 2, K)  # up to its first byte
    arguments["v"] = buffer[1000 + state.numel() :][:64].view(2, 2, V)  # from its end on
    arguments["alpha"] = buffer[990::5][:4].view(2, 2)  # begins before it and ends within
    arguments["beta"] = state[:, :, 0, 0]
    given = arguments_of(GATED_DELTA_STEP, arguments | {"state": state, "inplace": True})
    call = bind(GATED_DELTA_STEP, given)
    shared = {name: x for name, x in apart(call).tokens._asdict().items() if x is not None}
    copied = {name for name, x in shared.items() if x is not arguments[name]}
    assert copied == {"alpha", "beta"}
    assert all(torch.equal(shared[name], arguments[name]) for name in copied)
    alone = bind(GATED_DELTA_STEP, given._replace(tokens=given.tokens.map(torch.clone)))
    assert apart(alone) is alone


def test_slots_may_be_part_of_the_pool() -> None:
    pool = torch.rand(3, 2, K, V, dtype=torch.float64)
    pool[2, 1, 15].view(torch.int64)[:2] = torch.tensor([1, 2])
    slots = pool[2, 1, 15].view(torch.int64)[:2]
    arguments = {name: x.double() for name, x in tokens(2, 2, 0).items()}
    o, new = expected(arguments, pool, slots.clone())
    for backend in ("naive", "torch"):
        mine = pool.clone()
        given: dict[str, Any] = {
            "state_indices": mine[2, 1, 15].view(torch.int64)[:2],
            "inplace": True,
        }
        results = gated_delta_step(**arguments, state=mine, **given, backend=backend)
        torch.testing.assert_close(results, (o, new))


# Results.


def addresses(*tensors: Tensor | None) -> list[int]:
    return [x.untyped_storage().data_ptr() for x in tensors if x is not None and x.numel()]


@pytest.mark.parametrize("backend", EAGER)
@pytest.mark.parametrize("rule", ["gated_delta", "linear"])
@pytest.mark.parametrize("t", [0, 1, T])
def test_no_result_shares_memory_with_an_input_or_another_result(
    backend: str, rule: str, t: int
) -> None:
    state = torch.rand(2, 2, K, V)
    arguments: dict[str, Any] = {n: x[:, :t] for n, x in tokens(2, 2, max(t, 1)).items()} | {
        "rule": rule
    }
    if rule == "linear":
        del arguments["alpha"]
    else:
        arguments["alpha"] = torch.ones(2, t, 2)
    arguments["backend"] = backend
    calls: list[tuple[Tensor, ...]] = [
        gated_delta(**arguments, initial_state=state, return_state=True)
    ]
    calls += [
        gated_delta_steps(**arguments, state=given, return_states=True)
        for given in (state, state.mT)
    ]
    if t == 1:
        one: dict[str, Any] = {
            n: x[:, 0] if isinstance(x, Tensor) else x for n, x in arguments.items()
        }
        calls += [gated_delta_step(**one, state=given) for given in (state, state.mT)]
    inputs = addresses(state, *(x for x in arguments.values() if isinstance(x, Tensor)))
    for results in calls:
        own = addresses(*results)
        assert len(set(own)) == len(own) and not set(own) & set(inputs)


@pytest.mark.parametrize("t", [0, T], ids=["step", "steps"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_a_narrow_state_is_updated_in_place(t: int, dtype: torch.dtype) -> None:
    op: Any = gated_delta_steps if t else gated_delta_step
    arguments, state = tokens(2, 2, t), torch.rand(2, 2, K, V).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = op(**arguments, state=state)
        o, new = op(**arguments, state=(mine := state.clone()), inplace=True)
    assert new is mine and wide[1].dtype == torch.float32
    torch.testing.assert_close((o, new), (wide[0], wide[1].to(dtype)))
