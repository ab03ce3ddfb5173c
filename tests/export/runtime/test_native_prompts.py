"""The custom-op library reads a prompt as naive in float64 does, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from gdn_ops.export.node.schema import SEQUENCE
from onnx_native import DTYPES, Node, needs_library
from onnx_steps import STATE, Step, as_prompt, assert_right
from paths import ORT_LIBRARY

pytestmark = needs_library


def prompt_node(**options: Any) -> Node:
    return Node(operator=SEQUENCE, **options)


def types_of(activation: str, state: str, gate: str = "float32") -> dict[str, str]:
    kinds = {"log_alpha": gate, "beta": gate, "state": state, "new_state": state}
    return dict.fromkeys(("q", "k", "v", "o"), activation) | kinds


def check_heads(node: Node, tensors: dict[str, torch.Tensor], allowed: float) -> None:
    """Assert that every head of o and of the state is what naive gives, relative to its size."""
    for computed, expected in zip(node(**tensors), node.expected(**tensors), strict=True):
        axes = [d for d in range(expected.dim()) if d not in (0, expected.dim() - 2)]
        if expected.shape == tensors["state"].shape:
            axes = [2, 3]
        error = (computed - expected).square().sum(axes).sqrt()
        assert bool((error <= allowed * expected.square().sum(axes).sqrt()).all())


@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("rule", ["gated_delta", "gated", "delta", "linear"])
def test_every_head_agrees_with_naive(rule: str, decay: str) -> None:
    if rule in ("delta", "linear") and decay == "channel":
        pytest.skip(f"rule {rule!r} has no decay")
    cases = (
        ((1, 1), 0, 24, 40, 5), ((2, 4), 1, 33, 7, 40), ((2, 6), 0, 1, 128, 33),
        ((2, 2), 1, 64, 131, 70),
    )  # fmt: skip
    for heads, qk_l2norm, K, V, T in cases:
        node = prompt_node(heads=heads, rule=rule, qk_l2norm=qk_l2norm, decay=decay)
        for B, length in ((0, T), (2, 0), (1, 1), (3, T)):
            tensors = node.draw(B, K, V, T=length)
            if rule == "delta":
                # What an erase of more than one keeps grows from token to token.
                tensors["beta"] = tensors["beta"].clamp(max=1)
            computed = node(**tensors)
            if B * length:
                check_heads(node, tensors, 3e-5)
            else:
                assert computed[0].shape == (B, length, heads[1], V)
                assert torch.equal(computed[1], tensors["state"])


@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("state", DTYPES)
@pytest.mark.parametrize("activation", DTYPES)
def test_every_mixture_of_types_agrees_with_naive(activation: str, state: str, decay: str) -> None:
    gate = "float64" if state == "float64" else "float32"
    node = prompt_node(types=types_of(activation, state, gate), decay=decay)
    tensors = node.draw(B=2, K=24, V=72, T=70)
    exact = node.expected(**tensors)
    allowed = {"float64": 1e-13, "float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
    # Arithmetic is float32 where the state is no float64, and takes products of pairs of bfloat16
    # where the processor has them.
    least = 1e-5 if state != "float64" else 0.0
    least = 5e-3 if activation == "bfloat16" and state != "float64" else least
    for computed, expected, kind in zip(node(**tensors), exact, (activation, state), strict=True):
        error = float((computed - expected).norm() / expected.norm())
        assert error <= max(allowed[kind], least)


@pytest.mark.parametrize("state", ["float32", "float64", "float16"])
def test_a_closed_channel_forgets_exactly_and_nothing_overflows(state: str) -> None:
    gate = "float64" if state == "float64" else "float32"
    node = prompt_node(types=types_of(gate, state, gate), decay="channel")
    tensors = node.draw(T=70)
    tensors["log_alpha"][:, 3:, :, 7] = -90.0
    tensors["log_alpha"][:, 5, :, :] = -1e4
    tensors["log_alpha"][:, 40, 1] = -torch.inf
    tensors["log_alpha"][:, 0, :, 5] = -torch.inf
    changed = tensors["state"].clone()
    changed[:, :, 5] = -3e4
    first, second = node(**tensors), node(**tensors | {"state": changed})
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)
        assert bool(x.isfinite().all())
    check_heads(node, tensors, 2e-3 if state == "float16" else 1e-5)


def test_16_bit_states_come_back_as_they_were() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.int16)
    for narrow in ("float16", "bfloat16"):
        held = torch.from_numpy(every).view(DTYPES[narrow]).double()
        finite = held.where(held.isfinite(), 0.0).reshape(1, 1, 1, -1)
        node = prompt_node(heads=(1, 1), rule="linear", types=types_of("float32", narrow))
        zeros = {"k": torch.zeros(1, 1, 1, 1), "v": torch.zeros(1, 1, 1, 2**16)}
        one = torch.ones(1, 1, 1, 1)
        _, state = node(q=one, **zeros, beta=one[0], state=finite)
        assert torch.equal(state, finite)


def test_a_file_of_a_prompt_runs_in_it_as_its_function_does() -> None:
    for decay in ("scalar", "channel"):
        step = Step(K=24, V=40, HV=6, tokens=40, decay=decay, qk_l2norm=True)
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(ORT_LIBRARY))
        engine = onnxruntime.InferenceSession(
            step.prefill_model("standard").SerializeToString(), options
        )
        tokens, start = step.draw()
        assert_right(step, tokens, start, as_prompt(engine))
        assert {value.name for value in engine.get_inputs()} >= {STATE, "log_alpha"}


def test_state_and_new_state_may_share_their_memory() -> None:
    node = prompt_node(decay="channel")
    model = Step(K=24, V=40, decay="channel").prefill_model(None)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(ORT_LIBRARY))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    drawn = {name: x.numpy().astype(np.float32) for name, x in node.draw(B=2, T=40).items()}
    state = drawn.pop("state")
    o, expected = session.run(None, {**drawn, STATE: state})
    held = onnxruntime.OrtValue.ortvalue_from_numpy(state.copy())
    binding = session.io_binding()
    for name, x in drawn.items():
        binding.bind_cpu_input(name, x)
    binding.bind_ortvalue_input(STATE, held)
    binding.bind_output("o")
    binding.bind_ortvalue_output("present.0.recurrent_state", held)
    session.run_with_iobinding(binding)
    assert np.array_equal(held.numpy(), expected)
    assert np.array_equal(binding.copy_outputs_to_cpu()[0], o)


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_threads_change_no_bit(decay: str) -> None:
    one, four = (prompt_node(threads=threads, decay=decay) for threads in (1, 4))
    tensors = one.draw(B=3, K=64, V=128, T=70)
    for x, y in zip(one(**tensors), four(**tensors), strict=True):
        assert torch.equal(x, y)


def test_a_wrong_shape_of_a_prompt_is_refused() -> None:
    node = prompt_node(decay="channel")
    tensors = node.draw(T=4)
    for name, shape, text in (
        ("k", (3, 5, 2, 24), "k has shape (3, 5, 2, 24), should be (B, T, H, K) = (3, 4, 2, 24); "
         "T is fixed by q"),
        ("log_alpha", (3, 4, 4), "log_alpha has shape (3, 4, 4), should be (B, T, HV, K): 4 "
         "dimensions, not 3"),
        ("beta", (3, 4), "beta has shape (3, 4), should be (B, T, HV): 3 dimensions, not 2"),
    ):  # fmt: skip
        with pytest.raises(Exception, match="GatedDelta: ") as caught:
            node(**tensors | {name: torch.zeros(shape)})
        assert str(caught.value).partition("gdn_ops::GatedDelta: ")[2] == text
