"""Repeat decode calls the short way, as on a GPU: tensors and what was packed go to the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import gdn_ops
from gdn_ops.call.bind import arguments_of, signature
from gdn_ops.dispatch import plans
from gdn_ops.spec.ops import GATED_DELTA_STEP, GATED_DELTA_STEPS
from kernel_backends import assert_same_bits

pytest.importorskip("triton")

from gdn_ops.backends.triton import Triton

B, H, HV, K, V = 2, 2, 4, 16, 24


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the CPU be a device that is launched on, so that calls are prepared, and launches run."""
    limits = replace(Triton.limits, devices=("cuda", "cpu"), emulated_devices=())
    monkeypatch.setattr(Triton, "limits", limits)
    plans._plans.clear()
    yield
    plans._plans.clear()


def make(steps: bool, **changes: Any) -> dict[str, Any]:
    """Return the arguments of a decode call."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    rows = (B, 3) if steps else (B,)
    mixed = drawn(*rows, 2 * H * K + HV * V).bfloat16()
    q, k, v = mixed.split((H * K, H * K, HV * V), -1)
    given: dict[str, Any] = {
        "q": q.unflatten(-1, (H, K)),
        "k": k.unflatten(-1, (H, K)),
        "v": v.unflatten(-1, (HV, V)),
        "alpha": drawn(*rows, HV),
        "beta": drawn(*rows, HV),
        "state": drawn(5, HV, K, V) if "state_indices" in changes else drawn(B, HV, K, V),
    }
    return given | changes


SLOTS = torch.tensor([3, -1], dtype=torch.int32)

CALLS: dict[str, tuple[bool, dict[str, Any]]] = {
    "a step": (False, {}),
    "in place": (False, {"inplace": True, "qk_l2norm": True}),
    "a pool": (False, {"inplace": True, "state_indices": SLOTS}),
    "without beta": (False, {"beta": None, "rule": "gated"}),
    "a log gate": (False, {"alpha": None, "log_alpha": -torch.rand(B, HV)}),
    "a state of bfloat16": (False, {"state": torch.rand(B, HV, K, V).bfloat16()}),
    "a state with gaps": (
        False,
        {"state": torch.rand(B, HV, 2 * K, V)[:, :, ::2], "inplace": True},
    ),
    "a decay of channels": (False, {"alpha": torch.rand(B, HV, K)}),
    "erase and write": (
        False,
        {"beta": None, "erase": torch.rand(B, HV, K), "write": torch.rand(B, HV, V)},
    ),
    "steps with an erase of heads": (True, {"beta": None, "erase": torch.rand(B, 3, HV)}),
    "steps with a write of heads": (True, {"beta": None, "write": torch.rand(B, 3, HV)}),
    "steps": (True, {}),
    "steps with a log gate of channels": (
        True,
        {"alpha": None, "log_alpha": -torch.rand(B, 3, HV, K), "rule": "gated"},
    ),
    "steps with states": (True, {"return_states": True}),
    "steps in place on a pool": (True, {"inplace": True, "state_indices": SLOTS}),
}


def call(steps: bool, given: dict[str, Any], backend: str) -> list[torch.Tensor]:
    """Run a call on its own copy of the state; return its results and the state after it."""
    old = given["state"]
    state = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype).copy_(old)
    function = gdn_ops.gated_delta_steps if steps else gdn_ops.gated_delta_step
    return [*function(**given | {"state": state}, backend=backend), state]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_call_gives_the_bits_of_the_first(name: str) -> None:
    steps, changes = CALLS[name]
    given = make(steps, **changes)
    spec = GATED_DELTA_STEPS if steps else GATED_DELTA_STEP
    with torch.no_grad():
        first = call(steps, given, "triton")
        plan = plans.find(signature(spec, arguments_of(spec, given | {"backend": "triton"})))
        assert plan is not None and plan.backend.name == "triton"
        again = call(steps, given, "triton")
        expected = call(steps, given, "naive")
    for x, y, z in zip(first, again, expected, strict=True):
        assert_same_bits(y, x)
        torch.testing.assert_close(y.float(), z.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_an_input_in_the_state_is_copied_in_a_repeated_call_too() -> None:
    given = make(False, inplace=True)
    results = []
    with torch.no_grad():
        for backend in ("triton", "triton", "naive"):
            memory = torch.arange(float(B * HV * K * V)).sin()
            state = memory.view(B, HV, K, V)
            inside = memory[: B * HV].view(B, HV)
            o, _ = gdn_ops.gated_delta_step(
                **given | {"state": state, "beta": inside.abs_()}, backend=backend
            )
            results.append(torch.cat([o.float().flatten(), state.flatten()]))
    assert_same_bits(results[1], results[0])
    torch.testing.assert_close(results[1], results[2], rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    "changes", [{"state": None}, {"state_indices": SLOTS}], ids=["none", "pool"]
)
def test_what_needs_more_than_a_launch_goes_the_long_way(changes: dict[str, Any]) -> None:
    given = make(False, **changes)
    with torch.no_grad():
        gdn_ops.gated_delta_step(**given, backend="triton")
    assert [plan for plan in plans._plans.values() if plan is not None] == []


@pytest.mark.gpu
def test_a_loop_of_steps_is_captured_into_a_graph() -> None:
    given = {
        name: x.cuda() if isinstance(x, torch.Tensor) else x
        for name, x in make(False, inplace=True, qk_l2norm=True).items()
    }
    start = given["state"].clone()

    def decode() -> torch.Tensor:
        out = [gdn_ops.gated_delta_step(**given, backend="triton")[0] for _ in range(8)]
        return torch.stack(out)

    with torch.no_grad():
        expected = decode()
        after = given["state"].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            decode()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = decode()
        for _ in range(3):
            given["state"].copy_(start)
            graph.replay()
            assert_same_bits(out, expected)
            assert_same_bits(given["state"], after)
