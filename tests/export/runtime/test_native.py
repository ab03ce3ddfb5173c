"""The custom-op library of native/, in onnxruntime, against naive in float64."""

from __future__ import annotations

import gc
import itertools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import helper

from gdn_ops import gated_delta_step
from gdn_ops.backends.cpp import library
from gdn_ops.export.node.schema import ATTRIBUTES, DOMAIN, ELEMENT_TYPES, INPUTS, OUTPUTS, STEP
from gdn_ops.spec.ops import RULES
from onnx_native import DTYPES, Node, model_of, needs_library, session_of
from paths import ORT_LIBRARY

pytestmark = needs_library

HEADS = ((1, 1), (2, 2), (2, 4), (2, 6))


def assert_equal(computed: Any, expected: Any) -> None:
    for x, y in zip(computed, expected, strict=True):
        assert np.array_equal(x, y)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_every_rule_scale_and_batch_agrees_with_naive(rule: str, heads: tuple[int, int]) -> None:
    for scale, qk_l2norm, (K, V) in itertools.product(
        (1.0, 0.3, 24**-0.5), (0, 1), ((24, 40), (33, 7))
    ):
        node = Node(heads, rule=rule, scale=scale, qk_l2norm=qk_l2norm)
        for B in (0, 1, 3, 7):
            node.check(**node.draw(B, K, V))


def types_of(
    activation: str = "float32", gate: str = "float32", state: str = "float32"
) -> dict[str, str]:
    """Return the types of the inputs and outputs of a node."""
    kinds = {"log_alpha": gate, "beta": gate, "state": state, "new_state": state}
    return dict.fromkeys(("q", "k", "v", "o"), activation) | kinds


@pytest.mark.parametrize("gate", DTYPES)
@pytest.mark.parametrize("state", DTYPES)
@pytest.mark.parametrize("activation", DTYPES)
def test_every_mixture_of_types_agrees_with_naive(activation: str, state: str, gate: str) -> None:
    node = Node(types=types_of(activation, gate, state))
    # Two blocks of columns and one that is not full.
    node.check(**node.draw(B=2, K=24, V=300))


def _levels() -> list[str]:
    """Return the levels of this machine, as the library names them."""
    if not ORT_LIBRARY.exists():
        return []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GDN_OPS_NATIVE_LEVEL", "none")
        try:
            ort.SessionOptions().register_custom_ops_library(str(ORT_LIBRARY))
        except Exception as error:
            levels = re.search(r"should be one of (.*) on this machine", str(error))
            return levels[1].split(", ") if levels else []
    return []


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512bf16"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in _levels():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("GDN_OPS_NATIVE_LEVEL", request.param)
    return request.param


@pytest.mark.parametrize("rule", ["gated_delta", "gated"])
@pytest.mark.parametrize("state", DTYPES)
def test_every_level_agrees_with_naive_at_every_width(level: str, state: str, rule: str) -> None:
    node = Node(types=types_of(state=state), rule=rule)
    # Blocks of four vectors of columns, single ones, and columns that fill none.
    for V in (1, 8, 43, 64, 128, 171):
        node.check(**node.draw(B=1, K=19, V=V))


def test_an_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDN_OPS_NATIVE_LEVEL", "sse9")
    with pytest.raises(Exception, match=r"^\[ONNXRuntimeError\]") as caught:
        Node()
    text = "GDN_OPS_NATIVE_LEVEL is 'sse9', should be one of "
    assert f"{text}{', '.join(_levels())} on this machine" in str(caught.value)
    assert "baseline" in _levels()


@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
def test_every_16_bit_number_comes_back_as_it_was(level: str, narrow: str) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.int16)
    state = torch.from_numpy(every).view(DTYPES[narrow]).double().reshape(1, 1, 1, -1)
    node = _writer(narrow)
    zero, one = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    # Nothing is written, and o reads the state as float32.
    o, new_state = node(q=one, k=zero, v=torch.zeros(1, 1, 2**16), beta=zero[0], state=state)
    for copied in (o.flatten(), new_state.flatten()):
        torch.testing.assert_close(copied, state.flatten(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
def test_a_state_is_rounded_to_nearest_even(level: str, narrow: str) -> None:
    drawn = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
    # Many in the range of float16, subnormal ones and ties among them.
    drawn[::2] = drawn[::2] % 0x12000000 + 0x32000000
    drawn[::4] &= np.uint32(0xFFFFF000)
    v = torch.from_numpy(drawn.view(np.float32))
    node = _writer(narrow)
    one = torch.ones(1, 1, 1)
    state = torch.zeros(1, 1, 1, v.numel())
    _, new_state = node(q=one, k=one, v=v.reshape(1, 1, -1), beta=one[0], state=state)
    expected = v.to(DTYPES[narrow]).double()
    torch.testing.assert_close(new_state.flatten(), expected, rtol=0, atol=0, equal_nan=True)


def _writer(narrow: str) -> Node:
    """Return a node that adds k v^T to a state of the given type."""
    return Node((1, 1), rule="linear", scale=1.0, types=types_of(state=narrow))


def test_short_and_zero_keys_are_normalised_as_in_naive() -> None:
    node = Node(qk_l2norm=1)
    tensors = node.draw()
    tensors["k"] = (tensors["k"] * 1e-3).float().double()
    tensors["q"] = (tensors["q"] * 1e-4).float().double()
    tensors["k"][0] = 0
    node.check(**tensors)


@pytest.mark.parametrize("largest", [None, 3e38], ids=["drawn", "what a product would overflow"])
def test_a_closed_gate_forgets_exactly(largest: float | None) -> None:
    node = Node()
    tensors = node.draw()
    if largest is not None:
        tensors["state"][:] = largest
    tensors["log_alpha"][:] = -torch.inf
    fresh = node(**tensors | {"state": torch.zeros_like(tensors["state"])})
    assert_equal(node(**tensors), fresh)
    node.check(**tensors)


def test_some_closed_gates_leave_the_other_heads_alone() -> None:
    node = Node()
    tensors = node.draw()
    tensors["log_alpha"][0, 1] = -torch.inf
    tensors["log_alpha"][2, 3] = -1e4
    tensors["log_alpha"][1, 0] = 0
    tensors["beta"][1, 2] = 0
    node.check(**tensors)


def test_an_infinite_state_gives_what_naive_gives() -> None:
    node = Node((1, 2))
    tensors = node.draw(B=2)
    tensors["state"][0, 0] = torch.inf
    tensors["log_alpha"][0, 0] = -torch.inf
    computed, expected = node(**tensors), node.expected(**tensors)
    for x, y in zip(computed, expected, strict=True):
        assert y.isnan().any()
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_beta_that_is_not_given_is_one() -> None:
    node = Node(without=["beta"])
    tensors = node.draw()
    node.check(**tensors)
    one = torch.ones(3, 4, dtype=torch.float64)
    assert_equal(node(**tensors), Node()(**tensors, beta=one))


@pytest.mark.parametrize("types", ["float32", "float16"])
def test_in_place_equals_ping_pong_equals_float64_over_256_steps(types: str) -> None:
    dtype = np.dtype(types)
    session, node = _bare_session(types), Node(types=types, scale=1.0)
    start = node.draw(K=8, V=136)
    state = start["state"].numpy().astype(dtype)
    one, two, other = (ort.OrtValue.ortvalue_from_numpy(state.copy()) for _ in range(3))
    expected = start["state"]
    for t in range(256):
        drawn = node.draw(K=8, V=136, seed=t)
        feeds = {name: drawn[name].numpy().astype(dtype) for name in INPUTS[:-1]}
        o_in_place = _bound_step(session, feeds, one, one)
        o_ping_pong = _bound_step(session, feeds, two, other)
        two, other = other, two
        assert np.array_equal(o_in_place, o_ping_pong)
        expected_o, expected = node.expected(**drawn | {"state": expected})
    assert np.array_equal(one.numpy(), two.numpy())
    limit = {"float32": 1e-6, "float16": 4e-3}[types]
    for computed, wanted in ((one.numpy(), expected), (o_in_place, expected_o)):
        error = np.abs(computed - wanted.numpy()).max() / wanted.abs().max().item()
        assert error <= limit, f"off by {error:.1e}"


def test_o_may_be_written_over_v() -> None:
    session, node = _bare_session("float32"), Node(scale=1.0)
    drawn = node.draw(K=32, V=136)
    feeds = {name: drawn[name].numpy().astype(np.float32) for name in INPUTS}
    expected, _ = session.run(None, feeds)
    values = {name: ort.OrtValue.ortvalue_from_numpy(x) for name, x in feeds.items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output("o", values["v"])
    binding.bind_ortvalue_output("new_state", values["state"])
    session.run_with_iobinding(binding)
    assert np.array_equal(values["v"].numpy(), expected)


def _bound_step(session: Any, feeds: Mapping[str, Any], state: Any, new_state: Any) -> Any:
    """Run one step with the states bound and return o."""
    binding = session.io_binding()
    for name, x in feeds.items():
        binding.bind_cpu_input(name, x)
    binding.bind_ortvalue_input("state", state)
    binding.bind_ortvalue_output("new_state", new_state)
    binding.bind_output("o")
    session.run_with_iobinding(binding)
    return binding.copy_outputs_to_cpu()[1]


def _bare_session(types: str, nodes: int = 1, threads: int = 1) -> Any:
    """Return a session without casts: `nodes` steps on the same inputs, one after another."""
    attributes = dict(num_qk_heads=2, num_v_heads=4, scale=1.0, rule="gated_delta", qk_l2norm=0)
    states = ["state", *(f"state_{i}" for i in range(1, nodes)), "new_state"]
    steps = [
        helper.make_node(
            STEP.name,
            [*INPUTS[:-1], state],
            ["o" if i + 1 == nodes else f"o_{i}", new_state],
            domain=DOMAIN,
            **attributes,
        )
        for i, (state, new_state) in enumerate(itertools.pairwise(states))
    ]
    return session_of(model_of(steps, ELEMENT_TYPES[types], INPUTS, OUTPUTS), threads)


@pytest.mark.parametrize("types", ["float32", "float16"])
def test_a_state_inside_the_graph_needs_no_declared_type(types: str) -> None:
    session, node = _bare_session(types, nodes=3), Node(types=types, scale=1.0)
    tensors = node.draw()
    dtype = np.dtype(types)
    o, state = session.run(None, {name: x.numpy().astype(dtype) for name, x in tensors.items()})
    expected = tensors["state"]
    for _ in range(3):
        expected_o, expected = node.expected(**tensors | {"state": expected})
    limit = {"float32": 1e-6, "float16": 2e-3}[types]
    assert np.abs(state - expected.numpy()).max() <= limit * expected.abs().max().item()
    assert np.abs(o - expected_o.numpy()).max() <= limit * expected_o.abs().max().item()


def test_threads_change_no_bit() -> None:
    one, four = (_bare_session("float32", threads=threads) for threads in (1, 4))
    drawn = Node().draw(B=8, K=128, V=128)
    feeds = {name: x.numpy().astype(np.float32) for name, x in drawn.items()}
    assert_equal(one.run(None, feeds), four.run(None, feeds))


@pytest.mark.parametrize("state", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("activation", ["float32", "bfloat16", "float16"])
def test_the_backend_cpp_gives_the_same_bits(level: str, activation: str, state: str) -> None:
    if library.missing() is not None or not library.library().gdn_choose_level(level.encode()):
        pytest.skip(f"backend 'cpp': {library.missing() or f'no level {level}'}")
    try:
        node = Node((2, 6), types=types_of(activation, state=state), qk_l2norm=1)
        tensors = node.draw(B=3, K=40, V=200)
        given = {name: x.to(DTYPES[node.types[name]]) for name, x in tensors.items()}
        scale = float(np.float32(0.3))
        other = gated_delta_step(**given, scale=scale, qk_l2norm=True, backend="cpp")
        for x, y in zip(node(**tensors), other, strict=True):
            assert torch.equal(x, y.double())
    finally:
        library.choose_level(library.library(), "")


def test_a_session_outlives_its_options_and_other_sessions() -> None:
    node, other = Node(), Node(rule="gated")
    tensors = node.draw()
    before = node(**tensors)
    del other
    gc.collect()
    assert_equal(node(**tensors), before)


def test_the_library_wins_over_a_function_in_the_file() -> None:
    # A function that gives its arguments back: what naive gives cannot have come from it.
    body = [
        helper.make_node("Identity", ["v"], ["o"]),
        helper.make_node("Identity", ["state"], ["new_state"]),
    ]
    opsets = [helper.make_opsetid("", 21)]
    function = helper.make_function(
        DOMAIN, STEP.name, INPUTS, OUTPUTS, body, opsets, attributes=ATTRIBUTES
    )
    node = Node(functions=[function])
    node.check(**node.draw())
