"""The processes of `bench gpu`: orders and events, time limits, ends, and what a worker does."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any

import pytest

from gdn_ops.bench import child, turns
from gdn_ops.bench.child import StoppedError, Worker
from gdn_ops.bench.gpu import worker
from gdn_ops.bench.gpu.device import BrokenDeviceError
from gdn_ops.bench.gpu.result import Conformance
from gdn_ops.bench.gpu.worker import Desk
from gpu_stand_ins import BACKWARD, FORWARD, STEP, FakeDevice, stand_in
from paths import ROOT

TALKS = """
import json, sys, time
print("a greeting that is no event", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    print(json.dumps({"got": order}), flush=True)
    if order["do"] == "hang":
        time.sleep(60)
    if order["do"] == "die":
        sys.exit("the last words\\n")
    if order["do"] == "kill":
        import os, signal
        os.kill(os.getpid(), signal.SIGSEGV)
    print(json.dumps({"done": True}), flush=True)
"""


def running(code: str) -> contextlib.closing[Worker]:
    return contextlib.closing(Worker([sys.executable, "-c", code]))


def test_a_worker_answers_order_after_order() -> None:
    with running(TALKS) as worker:
        for order in ({"do": "a"}, {"do": "b"}):
            assert list(worker.ask(order, 30.0)) == [{"got": order}]
        # Closing it twice is once too often, and no error.
        worker.close()


@pytest.mark.parametrize(
    ("do", "why"),
    [
        ("hang", "stopped after 2 s"),
        ("die", "the process ended with exit code 1: the last words"),
        ("kill", "the process ended with signal SIGSEGV"),
    ],
)
def test_a_worker_that_hangs_or_dies_is_an_error_that_says_how(do: str, why: str) -> None:
    before, events = time.monotonic(), []
    with running(TALKS) as worker, pytest.raises(StoppedError, match=f"^{why}$"):
        events.extend(worker.ask({"do": do}, 2.0 if do == "hang" else 30.0))
    assert events == [{"got": {"do": do}}]
    assert time.monotonic() - before < 30


def test_a_child_keeps_fla_from_handing_its_calls_to_flash_qla() -> None:
    assert child.call(os.getenv, "FLA_FLASH_QLA") == "0"
    assert child.call(os.getenv, "FLA_FLASH_KDA") == "0"


def desk(monkeypatch: pytest.MonkeyPatch) -> tuple[Desk, list[dict[str, Any]]]:
    """Return a worker's desk with a made-up device, tiny rows and a stand-in for fla."""
    device, events = FakeDevice(), []
    monkeypatch.setattr(turns, "ROUNDS", (2, 2))
    tiny = {row.name: row for row in (FORWARD, BACKWARD, STEP)}
    monkeypatch.setattr(worker, "find_row", tiny.__getitem__)
    known = {"fla": stand_in("fla", device), "flash_qla": "package 'flash_qla' is not installed"}
    monkeypatch.setattr(worker, "find_contender", known.__getitem__)
    return Desk(device, events.append), events


def test_a_worker_measures_a_row_and_tells_who_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at, events = desk(monkeypatch)
    names = ["flash_qla", "fla"]
    at.carry_out({"do": "row", "row": FORWARD.name, "contenders": names, "seconds": 100.0})
    outcomes = {e["outcome"]["contender"]: e["outcome"] for e in events if "outcome" in e}
    assert outcomes["flash_qla"]["status"] == "unsupported"
    assert outcomes["flash_qla"]["reason"] == "package 'flash_qla' is not installed"
    assert outcomes["fla"]["status"] == "measured"
    assert json.loads(json.dumps(events)) == events, "events travel as JSON"


def test_a_worker_warms_up_and_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    at, events = desk(monkeypatch)
    names = [FORWARD.name, BACKWARD.name, STEP.name]
    at.carry_out({"do": "warm", "contender": "fla", "rows": names})
    assert [e["warm"] for e in events if "warm" in e] == names
    assert not any("outcome" in e for e in events)
    state = Conformance("torch", True, 1, 11)
    monkeypatch.setattr(worker, "short_check", lambda name, device, seconds: iter([state]))
    at.carry_out({"do": "check", "backend": "torch", "seconds": 1.0})
    assert events[-1] == {"conformance": asdict(state)}
    with pytest.raises(ValueError, match="unknown order 'dance'"):
        at.carry_out({"do": "dance"})


def test_a_worker_tells_who_broke_the_device_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    at, events = desk(monkeypatch)

    def broken(*_: object) -> None:
        raise BrokenDeviceError("fla: RuntimeError: CUDA error")

    monkeypatch.setattr(worker, "measure_row", broken)
    monkeypatch.setattr(worker, "Cuda", lambda: at.device)
    order = {"do": "row", "row": FORWARD.name, "contenders": ["fla"], "seconds": 1.0}
    with pytest.raises(SystemExit) as ended:
        worker.start(events.append)(order)
    assert ended.value.code == 3
    assert events[-1] == {"broken": "fla: RuntimeError: CUDA error"}


REAL = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from gpu_stand_ins import FORWARD, FakeDevice, stand_in
from gdn_ops.bench import child, turns
from gdn_ops.bench.gpu import worker

def print_it(x):
    print("compiling, please wait", flush=True)

device = FakeDevice()
turns.ROUNDS = (2, 2)
worker.Cuda = lambda: device
worker.find_row = {{FORWARD.name: FORWARD}}.__getitem__
loud = stand_in("loud", device, before=print_it)
worker.find_contender = {{"loud": loud}}.__getitem__
child.carry_out_orders(worker.start)
"""


def test_what_a_contender_prints_is_not_taken_for_an_event() -> None:
    order = {"do": "row", "row": FORWARD.name, "contenders": ["loud"], "seconds": 100.0}
    with running(REAL) as worker:
        # An order is done when it is carried out; then comes the next one.
        for _ in range(2):
            events = list(worker.ask(order, 100.0))
            assert [e["outcome"]["status"] for e in events if "outcome" in e] == ["measured"]
