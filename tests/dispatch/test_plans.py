"""A call like an earlier one takes a shorter way, which nothing but the clock can tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from errors import message_of
from gdn_ops import SpecError, gated_delta, gated_delta_step, gated_delta_steps
from repeated_calls import HV, B, H, K, Op, V, decode_op, every_op, exact, given, needs_cpp

pytestmark = [needs_cpp, pytest.mark.usefixtures("registry_as_found", "one_thread", "long_ways")]


@every_op
@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_a_call_like_an_earlier_one_is_computed_without_a_second_choice(
    op: Op, backend: str, long_ways: list[str]
) -> None:
    for seed in range(4):
        arguments = given(op, seed, backend=backend)
        expected = exact(op, arguments)
        del long_ways[1:]
        torch.testing.assert_close(op(**arguments), expected)
    assert long_ways == [op.__name__]


OPTIONS: dict[str, tuple[Op, dict[str, Any]]] = {
    "a fresh state": (gated_delta_step, {"inplace": False}),
    "a logarithm": (gated_delta_step, {"alpha": None, "log_alpha": -torch.rand(B, HV)}),
    "no beta": (gated_delta_step, {"beta": None}),
    "no decay": (gated_delta_step, {"alpha": None, "rule": "delta"}),
    "no erase": (gated_delta_step, {"rule": "gated"}),
    "l2norm": (gated_delta_step, {"qk_l2norm": True}),
    "a scale": (gated_delta_step, {"scale": 0.5}),
    "a transposed state": (gated_delta_step, {"state": torch.randn(B, HV, V, K).mT}),
    "a layer of a buffer": (gated_delta_step, {"state": torch.randn(B, 3, HV, K, V)[:, 1]}),
    "parts of a projection": (
        gated_delta_step,
        {"v": torch.randn(B, 2 * HV * V)[:, : HV * V].view(B, HV, V)},
    ),
    "heads before rows": (gated_delta_step, {"v": torch.randn(HV, B, V).transpose(0, 1)}),
    "a bfloat16 state": (gated_delta_step, {"state": torch.randn(B, HV, K, V).bfloat16()}),
    "a pool": (
        gated_delta_step,
        {"state": torch.randn(5, HV, K, V), "state_indices": torch.tensor([3, -1])},
    ),
    "a pool that is not updated": (
        gated_delta_steps,
        {
            "state": torch.randn(5, HV, K, V),
            "state_indices": torch.tensor([3, 0]),
            "inplace": False,
        },
    ),
    "int32 slots": (
        gated_delta_steps,
        {
            "state": torch.randn(5, HV, K, V),
            "state_indices": torch.tensor([0, 4], dtype=torch.int32),
        },
    ),
    "all states": (gated_delta_steps, {"return_states": True}),
    "no state": (gated_delta, {"initial_state": None}),
    "a bfloat16 start": (gated_delta, {"initial_state": torch.randn(B, HV, K, V).bfloat16()}),
    "no rows": (
        gated_delta_step,
        {n: x[:0] for n, x in given(gated_delta_step).items() if isinstance(x, Tensor)},
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_second_call_gives_the_results_of_the_first(option: str) -> None:
    op, changes = OPTIONS[option]
    found: list[tuple[Tensor, ...]] = []
    for _ in range(3):
        own = {n: x.clone() if isinstance(x, Tensor) else x for n, x in changes.items()}
        for name in ("state", "v"):
            if isinstance(x := changes.get(name), Tensor):
                # With the strides that it has.
                own[name] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)
        results = op(**given(op, **own), backend="cpp")
        if own.get("inplace", "state" in own):
            assert results[1] is own["state"]
        found.append(results)
    for results in found[1:]:
        assert len(results) == len(found[0])
        for x, first in zip(results, found[0], strict=True):
            assert torch.equal(x, first) and x.dtype == first.dtype and x.stride() == first.stride()


# What may differ between two calls of one signature.

BAD: dict[str, dict[str, Any]] = {
    "alpha above 1": {"alpha": torch.full((B, HV), 1.5)},
    "alpha below 0": {"alpha": torch.full((B, HV), -0.5)},
    "beta above 2": {"beta": torch.full((B, HV), 2.0000002)},
    "beta below 0": {"beta": torch.tensor([0.0, 1.0, 2.0, -1e-30]).expand(B, HV).contiguous()},
    "both gates": {"alpha": torch.full((B, HV), 1.5), "beta": torch.full((B, HV), 3.0)},
    "a number for a bool": {"qk_l2norm": 0},
    "a bool for a number": {"scale": True},
    "no such rule": {"rule": "other"},
    "a list": {"rule": []},
    "no tensor": {"k": [[1.0]]},
    "another shape": {"k": torch.zeros(B, H, K + 1)},
    "another dtype": {"k": torch.zeros(B, H, K, dtype=torch.float16)},
    "another device": {"k": torch.zeros(B, H, K, device="meta")},
    "a sparse tensor": {"k": torch.zeros(B, H, K).to_sparse()},
    "a tensor of another library": {"k": torch.zeros(B, H, K).to_mkldnn()},
    "a nested tensor": {"k": lambda: torch.nested.nested_tensor([torch.zeros(H, K)] * B)},
    "elements that share memory": {"state": torch.zeros(1, HV, K, V).expand(B, HV, K, V)},
    "a state for a gradient": {"state": torch.zeros(B, HV, K, V, requires_grad=True)},
    "a key for a gradient": {"k": torch.zeros(B, H, K, requires_grad=True)},
    "a backend that is not there": {"backend": "other"},
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_call_is_refused_in_the_same_words(fault: str) -> None:
    changes = {name: x() if callable(x) else x for name, x in BAD[fault].items()}
    bad = given(gated_delta_step, **{"backend": "cpp", **changes})
    first = message_of(SpecError, gated_delta_step, **bad)
    gated_delta_step(**given(gated_delta_step, backend="cpp"))
    before = bad["state"].clone()
    assert message_of(SpecError, gated_delta_step, **bad) == first
    assert torch.equal(bad["state"], before)


@every_op
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_every_gate_is_looked_at_and_nothing_between_them(
    op: Op, name: str, long_ways: list[str]
) -> None:
    arguments = given(op)
    shape = arguments[name].shape
    gates = torch.full((*shape, 3), 9.0)[..., 1]
    for i in range(-2, gates.numel()):
        arguments = given(op)
        arguments[name] = gates.copy_(arguments[name])
        long_ways.clear()
        if i >= 0:
            place = tuple(int(j) for j in torch.unravel_index(torch.tensor(i), shape))
            gates[place] = 3.0
            text = message_of(SpecError, op, **arguments)
            assert text.startswith(f"{op.__name__}: {name} has values in [")
        else:
            op(**arguments)
            assert long_ways == [op.__name__] * (i == -2)


def test_a_state_that_is_only_read_may_lie_in_an_input(long_ways: list[str]) -> None:
    memory = torch.rand(B * HV * K * V + 8)
    state, q = memory[8:].view(B, HV, K, V), memory[: B * H * K].view(B, H, K)
    for _ in range(3):
        arguments = given(gated_delta_step, state=state, q=q, inplace=False)
        expected = exact(gated_delta_step, arguments)
        del long_ways[1:]
        torch.testing.assert_close(gated_delta_step(**arguments), expected)
    assert long_ways == ["gated_delta_step"]


def test_a_sparse_gate_has_the_strides_of_an_expanded_one_and_is_none() -> None:
    alpha = torch.rand(1, 1).expand(B, HV)
    for _ in range(2):
        gated_delta_step(**given(gated_delta_step, alpha=alpha))
    assert alpha.to_sparse().stride() == alpha.stride() == (0, 0)
    text = message_of(
        SpecError, gated_delta_step, **given(gated_delta_step, alpha=alpha.to_sparse())
    )
    assert text == "gated_delta_step: alpha has layout sparse_coo, should be strided"


@every_op
@pytest.mark.parametrize("name", ["q", "v", "beta"])
def test_a_negated_view_counts_as_its_values(op: Op, name: str) -> None:
    for _ in range(2):
        arguments = given(op)
        expected = exact(op, arguments)
        op(**arguments)
    arguments = given(op)
    arguments[name] = torch._neg_view(-arguments[name])
    torch.testing.assert_close(op(**arguments), expected)


BAD_SLOTS: dict[str, dict[str, Any]] = {
    "a slot beyond the pool": {"state_indices": torch.tensor([1, 5])},
    "a slot twice": {"state_indices": torch.tensor([1, 1])},
    "a slot and a gate": {
        "state_indices": torch.tensor([1, 1]),
        "alpha": torch.full((B, HV), 1.5),
    },
}


@pytest.mark.parametrize("fault", BAD_SLOTS)
def test_bad_slots_are_refused_in_the_same_words(fault: str) -> None:
    pool = {"state": torch.randn(5, HV, K, V), "state_indices": torch.tensor([4, 2])}
    bad = given(gated_delta_step, **pool | BAD_SLOTS[fault])
    first = message_of(SpecError, gated_delta_step, **bad)
    gated_delta_step(**given(gated_delta_step, **pool))
    before = bad["state"].clone()
    assert message_of(SpecError, gated_delta_step, **bad) == first
    assert torch.equal(bad["state"], before)


@every_op
def test_nan_in_a_gate_passes_beside_a_value_out_of_range(op: Op) -> None:
    for _ in range(3):
        arguments = given(op)
        arguments["alpha"][0, ..., :2] = torch.tensor([torch.nan, 7.0])
        expected = exact(op, arguments)
        torch.testing.assert_close(op(**arguments), expected, equal_nan=True)


@decode_op
@pytest.mark.parametrize("name", ["q", "k", "v", "alpha", "beta"])
def test_an_input_in_the_memory_of_the_state_is_read_before_it_is_written(
    op: Op, name: str, long_ways: list[str]
) -> None:
    op(**given(op))
    arguments = given(op)
    x, size = arguments[name], B * HV * K * V
    # What begins where the state ends, and with its last element.
    for start, is_apart in ((size, True), (size - 1, False)):
        memory = torch.rand(size + x.numel(), generator=torch.Generator().manual_seed(1)) / 8
        state = memory[:size].view(B, HV, K, V)
        arguments |= {"state": state, name: memory[start : start + x.numel()].view(x.shape)}
        expected = exact(op, arguments)
        long_ways.clear()
        torch.testing.assert_close(op(**arguments), expected)
        assert long_ways == ([] if is_apart else [op.__name__])


@every_op
def test_gradients_are_had_when_they_are_wanted(op: Op) -> None:
    changes: dict[str, Any] = {} if op is gated_delta else {"inplace": False}
    op(**given(op, **changes))
    arguments = given(op, **changes)
    arguments["v"].requires_grad_()
    if op is gated_delta_steps:
        text = message_of(SpecError, op, **arguments)
        assert text.startswith("gated_delta_steps: v requires a gradient, should not")
        return
    o = op(**arguments)[0]
    o.sum().backward()
    assert arguments["v"].grad.abs().sum() > 0
    with torch.no_grad():
        assert not op(**arguments)[0].requires_grad


@decode_op
def test_a_state_of_inference_mode_is_updated_only_there(op: Op) -> None:
    with torch.inference_mode():
        for _ in range(2):
            arguments = given(op)
            assert op(**arguments)[0].is_inference()
    before = arguments["state"].clone()
    text = message_of(SpecError, op, **arguments)
    assert "state was made under torch.inference_mode(), which alone may update it" in text
    assert torch.equal(arguments["state"], before)


@decode_op
@pytest.mark.parametrize("backend", ["cpp", "torch", "naive"])
def test_a_backward_that_needs_the_old_state_says_so(op: Op, backend: str) -> None:
    for _ in range(2):
        arguments, w = given(op, backend=backend), torch.ones((), requires_grad=True)
        product = (arguments["state"] * w).sum()
        with torch.no_grad():
            op(**arguments)
        text = message_of(RuntimeError, product.backward)
        assert "has been modified by an inplace operation" in text
