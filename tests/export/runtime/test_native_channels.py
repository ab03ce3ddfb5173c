"""The custom-op library takes a decay of every key channel, as naive in float64 does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gdn_ops import export, gated_delta_step
from gdn_ops.backends.cpp import library
from gdn_ops.export.model.nodes import check_model
from gdn_ops.export.runtime.comparison import compare
from onnx_native import DTYPES, Node, needs_library
from onnx_steps import Step
from paths import ORT_LIBRARY

pytestmark = needs_library


def channel_node(**options: object) -> Node:
    return Node(decay="channel", **options)  # type: ignore[arg-type]


def check_heads(node: Node, tensors: dict[str, torch.Tensor], allowed: float) -> None:
    """Assert that every head (B, HV) is what naive gives, relative to its own size."""
    for computed, expected in zip(node(**tensors), node.expected(**tensors), strict=True):
        error = (computed - expected).flatten(2).norm(dim=2)
        assert bool((error <= allowed * expected.flatten(2).norm(dim=2)).all())


@pytest.mark.parametrize("rule", ["gated_delta", "gated"])
@pytest.mark.parametrize("heads", [(1, 1), (2, 4), (2, 6)])
def test_every_head_agrees_with_naive(heads: tuple[int, int], rule: str) -> None:
    for qk_l2norm, (K, V) in ((0, (24, 40)), (1, (33, 7)), (0, (1, 128)), (1, (128, 131))):
        node = channel_node(heads=heads, rule=rule, qk_l2norm=qk_l2norm)
        for B in (0, 1, 3):
            tensors = node.draw(B, K, V)
            node.check(**tensors)
            check_heads(node, tensors, 3e-6)


@pytest.mark.parametrize("gate", DTYPES)
@pytest.mark.parametrize("state", DTYPES)
def test_every_type_of_gate_and_state_agrees_with_naive(state: str, gate: str) -> None:
    kinds = {"log_alpha": gate, "beta": gate, "state": state, "new_state": state}
    node = channel_node(types=dict.fromkeys(("q", "k", "v", "o"), "float32") | kinds)
    node.check(**node.draw(B=2, K=24, V=300))


@pytest.mark.parametrize("state", ["float32", "bfloat16", "float64"])
def test_a_closed_channel_forgets_exactly(state: str) -> None:
    kinds = {"state": state, "new_state": state}
    names = ("q", "k", "v", "log_alpha", "beta", "o")
    node = channel_node(types=dict.fromkeys(names, "float32") | kinds)
    tensors = node.draw()
    tensors["log_alpha"][:, :, 7] = -1e4
    tensors["log_alpha"][:, :, 9] = 0
    tensors["log_alpha"][:, :, 5] = -torch.inf
    tensors["log_alpha"][1, 2] = -torch.inf
    changed = tensors["state"].clone()
    changed[:, :, 5] = 1e38
    changed[1, 2] = -1e38
    first, second = node(**tensors), node(**tensors | {"state": changed})
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)
        assert bool(x.isfinite().all())
    node.check(**tensors)


def test_equal_channels_are_the_decay_of_a_head() -> None:
    node, of_heads = channel_node(), Node()
    tensors = of_heads.draw()
    wide = tensors["log_alpha"].unsqueeze(-1).repeat(1, 1, 24)
    found = node(**tensors | {"log_alpha": wide})
    for x, y in zip(found, of_heads(**tensors), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_64_tokens_of_a_session_are_right_in_place() -> None:
    step = Step(K=24, V=40, HV=6, decay="channel", qk_l2norm=True)
    model = step.model(None)
    check_model(model)
    for kernel in (model, step.model("standard")):
        errors = compare(kernel, "custom", custom_op_library=str(ORT_LIBRARY))
        assert errors.passed, errors
    session = export.DecodeSession(model, batch=2, custom_op_library=ORT_LIBRARY, threads=1)
    assert session.body == "custom"


@pytest.mark.parametrize("state", ["float32", "bfloat16", "float16"])
def test_the_backend_cpp_gives_the_same_bits(state: str) -> None:
    if library.missing() is not None:
        pytest.skip(f"backend 'cpp': {library.missing()}")
    kinds = {"state": state, "new_state": state}
    names = ("q", "k", "v", "log_alpha", "beta", "o")
    node = channel_node(heads=(2, 6), types=dict.fromkeys(names, "float32") | kinds, qk_l2norm=1)
    tensors = node.draw(B=3, K=40, V=200)
    given = {name: x.to(DTYPES[node.types[name]]) for name, x in tensors.items()}
    other = gated_delta_step(**given, scale=float(np.float32(0.3)), qk_l2norm=True, backend="cpp")
    for x, y in zip(node(**tensors), other, strict=True):
        assert torch.equal(x, y.double())
