"""What is told beside the times of `bench gpu`: each launch of ours, and the clocks of the card."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gdn_ops.aot import sampling
from gdn_ops.aot.results import Sample
from gdn_ops.bench.gpu import launches
from gdn_ops.bench.gpu.device import Card, read_card
from gdn_ops.bench.gpu.measuring import _Measuring
from gdn_ops.bench.gpu.rows import GpuRow
from gdn_ops.bench.inputs import Inputs
from gdn_ops.call.bind import arguments_of, bind
from gdn_ops.dispatch import registry
from gdn_ops.kernel_support.launches import recording
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP
from gpu_stand_ins import BACKWARD, FORWARD, STEP, FakeDevice, contender


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.mark.filterwarnings("ignore:backend 'triton' emulates")
@pytest.mark.parametrize("row", (FORWARD, BACKWARD, STEP), ids=lambda row: row.what)
def test_every_launch_of_ours_is_timed_by_its_name(
    row: GpuRow, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(launches, "CALLS", 1)
    ready = _Measuring(row, device, 1.0, lambda event: None)
    ready.draw(1)
    _, (run,), _ = ready.first_call(contender("triton"))
    before = device.now
    timed = launches.time_launches("triton", run, device)
    assert device.now - before > 2.0, "the device is busy while a call is launched"
    # Between two marks of the stand-in there is a millisecond.
    assert [launch["ms"] for launch in timed] == pytest.approx([1.0] * len(timed))
    x = ready.sets[0].inputs.map(lambda y: y.to("meta"))
    noted = launched(row, x)
    assert [launch["name"] for launch in timed] == noted[-len(timed) :]
    assert len(timed) == len(noted) or row is BACKWARD
    launcher = sys.modules["gdn_ops.backends.triton.host.launcher"]
    module = sys.modules["gdn_ops.backends.triton.host.decode"]
    assert module.launch is launcher.launch, "what was observed is as it was"


def launched(row: GpuRow, x: Inputs) -> list[str]:
    """Return the names of what triton launches in a row, on operands without memory."""
    backend = registry.get_backend("triton")
    assert not isinstance(backend, str)
    op, given = GATED_DELTA, {**x.named(), "initial_state": x.state}
    if row is STEP:
        op, given = GATED_DELTA_STEP, {**x.named(), "inplace": True}
    else:
        del given["state"]
    call = bind(op, arguments_of(op, given), check_values=False)
    with recording("sm_90") as noted:
        sampling.run(backend, Sample("", replace(call, needs_grad=row is BACKWARD), False))
    return [launch.kernel.__name__ for launch in noted]


def test_launches_of_a_backend_without_kernels_are_none(device: FakeDevice) -> None:
    assert launches.time_launches("torch", lambda: None, device) == []


# The card.


@pytest.mark.parametrize(
    "printed, card",
    [
        ("1980, 2619, 1980, 2619, 700.00\n", Card(1980.0, 2619.0, 1980.0, 2619.0, 700.0)),
        ("345, [N/A], 1980, [Not Supported], 700.00\n", Card(345.0, None, 1980.0, None, 700.0)),
        ("No devices were found\n", Card()),
    ],
)
def test_a_card_is_asked_for_its_clocks_and_its_limit(
    printed: str, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho $1 > {tmp_path}/asked\nprintf '{printed}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert read_card("GPU-1") == card
    assert (tmp_path / "asked").read_text() == "--id=GPU-1\n"


def test_a_card_without_its_tool_has_no_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert read_card("0") == Card()
