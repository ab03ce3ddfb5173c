"""A run of `bench gpu` comes to its end: by the clock, whatever a contender does to its process."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import command_line
import gdn_ops
from gdn_ops.bench.child import StoppedError, TimeUpError
from gdn_ops.bench.gpu import command, report, schedule
from gdn_ops.bench.gpu.device import Card
from gdn_ops.bench.gpu.result import Conformance, GpuResult, Outcome
from gdn_ops.bench.gpu.rows import ROWS
from gdn_ops.bench.gpu.schedule import Plan, run
from gdn_ops.dispatch import registry

SYSTEM = {
    "date": "2026-11-21",
    "device": "NVIDIA H200",
    "driver": "580.1",
    "versions": {"torch": "2.13.0", "gdn_ops": "0.1.0"},
}


class FakeWorker:
    """Answers orders from a script; time passes as the script says."""

    def __init__(self, script: Script) -> None:
        self.script, self.closed = script, False
        script.workers.append(self)

    def ask(self, order: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
        assert not self.closed
        self.script.orders.append((order, seconds))
        yield from self.script.answer(order, seconds)

    def close(self) -> None:
        self.closed = True


@dataclass
class Script:
    """What the workers of a run do: measure in a time, hang or die at a contender."""

    folder: Path
    now: float = 0.0
    workers: list[FakeWorker] = field(default_factory=list)
    orders: list[tuple[dict[str, Any], float]] = field(default_factory=list)
    seconds: float = 1.0
    hangs: set[str] = field(default_factory=set)
    dies: set[str] = field(default_factory=set)
    wrong: set[str] = field(default_factory=set)
    red: set[str] = field(default_factory=set)
    end_of_checks: StoppedError | None = None
    end_of_timing: StoppedError | None = None

    def clock(self) -> float:
        return self.now

    def start(self) -> FakeWorker:
        return FakeWorker(self)

    def answer(self, order: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
        if order["do"] == "check":
            name = order["backend"]
            state = Conformance(name, True, 3, 11, 0.5)
            if name in self.red:
                state = replace(state, passed=False, text="WRONG: o: got 1\nprint(judge(1))")
            if self.end_of_checks is not None:
                # What is at work is told before it is begun.
                yield {"conformance": asdict(replace(state, text="print(judge(1))"))}
                raise self.end_of_checks
            yield {"conformance": asdict(state)}
        elif order["do"] == "warm":
            yield from ({"warm": row} for row in order["rows"])
        else:
            if self.end_of_timing is not None:
                yield {"at": "timing"}
                raise self.end_of_timing
            yield {"at": "reference"}
            for name in order["contenders"]:
                yield from self._contender(name, seconds)
            self.now += self.seconds

    def _contender(self, name: str, seconds: float) -> Iterator[dict[str, Any]]:
        yield {"at": name}
        if name in self.hangs:
            self.now += seconds
            raise TimeUpError(f"stopped after {seconds:.0f} s")
        if name in self.dies:
            raise StoppedError("the process ended with signal SIGSEGV")
        status = "wrong" if name in self.wrong else "measured"
        is_peer = name not in ("triton", "torch")
        outcome = Outcome(name, "1", is_peer, status, kernel=1.0, wall=2.0, host=1.5, error=1e-3)
        yield {"outcome": asdict(outcome)}

    def go(self, **changes: Any) -> tuple[GpuResult, list[str]]:
        """Run a plan of three contenders; return its result, and what was told."""
        told: list[str] = []
        plan = Plan(("triton", "torch"), ("fla",), **changes)
        result = run(plan, SYSTEM, self.folder, told.append, start=self.start, clock=self.clock)
        return result, told

    def rows(self) -> list[tuple[str, list[str]]]:
        return [(o["row"], o["contenders"]) for o, _ in self.orders if o["do"] == "row"]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def test_every_row_is_measured_in_its_order_and_every_process_ended(script: Script) -> None:
    result, told = script.go()
    everybody = ["triton", "torch", "fla"]
    assert script.rows() == [(row.name, everybody) for row in ROWS]
    assert [row for row, _ in result.rows] == list(ROWS)
    assert not result.failed
    assert all(worker.closed for worker in script.workers)
    assert len(script.workers) == 2 + 3 * 3 + 1, "checks, warm-ups, and one for all rows"
    assert told[-1] == f"{ROWS[-1].name}: triton 1 ms, torch 1 ms, fla 1 ms"


def test_the_result_is_written_after_every_row(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    path = tmp_path / "gpu-nvidia-h200.json"
    line = report.line

    def spy(*arguments: Any) -> str:
        written.append(len(json.loads(path.read_text())["rows"]))
        return line(*arguments)

    monkeypatch.setattr(report, "line", spy)
    script.go(rows=ROWS[:4])
    assert written == [1, 2, 3, 4]
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_ends_in_its_time_and_names_what_it_left_out(script: Script) -> None:
    script.seconds = 20.0
    result, _ = script.go(seconds=100.0)
    assert script.now <= 100.0 + script.seconds
    assert all(seconds <= 100.0 for _, seconds in script.orders)
    statuses = [[o.status for o in outcomes] for _, outcomes in result.rows]
    assert statuses[:5] == [["measured"] * 3] * 5
    assert statuses[5:] == [["left out"] * 3] * (len(ROWS) - 5)
    assert {o.reason for _, outcomes in result.rows[5:] for o in outcomes} == {"not measured: time"}


def test_a_contender_that_hangs_costs_itself_and_is_left_out_in_the_end(script: Script) -> None:
    script.hangs = {"fla"}
    result, _ = script.go(rows=ROWS[:5])
    # Rows 0, 1 and 4 are forwards; 2 is a backward, 3 a step.
    everybody = [(row.name, ["triton", "torch", "fla"]) for row in ROWS[:4]]
    assert script.rows() == [*everybody, (ROWS[4].name, ["triton", "torch"])]
    by_row = [{o.contender: o for o in outcomes} for _, outcomes in result.rows]
    assert all(of_row["triton"].status == "measured" for of_row in by_row)
    assert by_row[0]["fla"].status == "left out"
    assert by_row[0]["fla"].reason == "not measured: stopped after 90 s"
    assert by_row[1]["fla"].reason == "not measured: stopped after 45 s"
    assert by_row[4]["fla"].status == "left out"
    assert by_row[4]["fla"].reason.startswith("left out after it was stopped 2 times: stopped")
    assert script.now < schedule.SECONDS


def test_a_row_is_tried_again_without_the_one_who_ended_the_process(script: Script) -> None:
    script.dies = {"torch"}
    result, _ = script.go(rows=ROWS[:1])
    assert [names for _, names in script.rows()] == [["triton", "torch", "fla"], ["fla"]]
    outcomes = {o.contender: o for o in result.rows[0][1]}
    assert outcomes["torch"].reason == "not measured: the process ended with signal SIGSEGV"
    assert outcomes["triton"].status == outcomes["fla"].status == "measured"


def test_a_process_that_ends_while_timing_leaves_the_row_out(script: Script) -> None:
    script.end_of_timing = TimeUpError("stopped after 9 s")
    result, _ = script.go(rows=ROWS[:1])
    reasons = {o.reason for o in result.rows[0][1]}
    assert reasons == {"not measured: stopped after 9 s, at timing"}


def test_a_wrong_backend_is_left_out_and_the_others_are_timed(
    script: Script, tmp_path: Path
) -> None:
    script.red = {"triton"}
    result, told = script.go(rows=ROWS[:2])
    assert result.failed
    assert script.rows() == [(row.name, ["torch", "fla"]) for row in ROWS[:2]]
    for _, outcomes in result.rows:
        by_name = {o.contender: o for o in outcomes}
        assert by_name["triton"].status == "left out"
        assert by_name["triton"].reason == "not timed, its check failed: WRONG: o: got 1"
        assert by_name["torch"].status == by_name["fla"].status == "measured"
    assert any("triton: FAILED" in line and "print(judge(" in line for line in told)
    data = json.loads((tmp_path / "gpu-nvidia-h200.json").read_text())
    assert data["failed"] is True
    assert [c["passed"] for c in data["conformance"]] == [False, True]
    assert "print(judge(" in report.text(result)


def test_peers_are_timed_where_all_of_ours_are_wrong(script: Script) -> None:
    script.red = {"triton", "torch"}
    result, _ = script.go(rows=ROWS[:1])
    assert result.failed
    assert script.rows() == [(ROWS[0].name, ["fla"])]
    statuses = {o.contender: o.status for o in result.rows[0][1]}
    assert statuses == {"triton": "left out", "torch": "left out", "fla": "measured"}


def test_a_check_that_dies_is_red_and_one_that_is_too_slow_is_not(script: Script) -> None:
    script.end_of_checks = TimeUpError("stopped after 30 s")
    result, _ = script.go(rows=ROWS[:1])
    assert [(c.passed, c.examples, c.text) for c in result.conformance] == [
        (True, 3, "stopped after 30 s\nprint(judge(1))")
    ] * 2
    script.end_of_checks = StoppedError("the process ended with signal SIGSEGV")
    result, _ = script.go(rows=ROWS[:1])
    assert result.failed
    assert [o.status for o in result.rows[0][1]] == ["left out", "left out", "measured"]
    dead = "the process ended with signal SIGSEGV\nprint(judge(1))"
    assert [c.text for c in result.conformance] == [dead] * 2


def test_a_backend_of_ours_that_dies_in_a_row_fails_the_run_and_a_slow_one_does_not(
    script: Script,
) -> None:
    script.dies = {"fla"}
    assert not script.go(rows=ROWS[:1])[0].failed
    script.dies = {"torch"}
    assert script.go(rows=ROWS[:1])[0].failed
    script.dies, script.hangs = set(), {"torch"}
    assert not script.go(rows=ROWS[:1])[0].failed


def test_a_wrong_row_of_ours_fails_the_run_and_of_a_peer_does_not(script: Script) -> None:
    script.wrong = {"fla"}
    assert not script.go(rows=ROWS[:1])[0].failed
    script.wrong = {"triton"}
    assert script.go(rows=ROWS[:2])[0].failed


# The report.


def test_the_report_names_times_goals_and_what_is_not_ours(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    script.dies = {"torch"}
    result, _ = script.go(rows=ROWS[:4])
    text = report.text(result)
    lines = text.splitlines()
    assert lines[0] == "NVIDIA H200, driver 580.1, torch 2.13.0, 2026-11-21"
    rows = {name: i for i, name in enumerate(lines) if not name.startswith(" ")}
    first = lines[rows["forward 16/64 T=8192"] + 1 :][:5]
    assert first[0].split() == [
        *("triton", "1", "-", "2", "1.5e+03", "1.0e-03", "-", "-"),
        *("goal", "kernel", "<=", "0.5", "ms:", "missed"),
    ]
    assert "not measured: the process ended with signal SIGSEGV" in first[1]
    assert first[2].split()[:3] == ["fla", "1", "0.814"]
    theirs = [["flash_qla", "-", "0.397"], ["flashinfer", "-", "0.392"]]
    assert [line.split() for line in first[3:]] == theirs
    assert "onnxruntime  -" in text and "0.0058, 0.0185 wall" in text
    assert lines[-2].startswith("theirs: published, not measured here (theirs: NVIDIA H200, CUDA")
    assert lines[-1] == "goals reached: 1 of 5, not measured: 0"


def test_the_report_tells_clocks_sets_and_launches(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    card = Card(345.0, 345.0, 1980.0, 3201.0, 700.0)
    launches = [{"name": "solve", "ms": 0.2}, {"name": "states", "ms": 0.15}]
    measured = Outcome("triton", "1", False, "measured", kernel=0.4, wall=0.5)
    outcomes = [
        replace(measured, sets=4, set_mib=25.5, launches=launches, sm_mhz=mhz)
        for mhz in (1755.0, 1980.0)
    ]
    rows = [(row, [outcome]) for row, outcome in zip(ROWS, outcomes, strict=False)]
    result = GpuResult({**SYSTEM, "card": asdict(card)}, rows=rows)
    lines = report.text(result).splitlines()
    assert lines[1] == (
        "SM clock at most 1980 MHz, memory clock at most 3201 MHz, power limit 700 W, "
        "SM clock after rows 1755 to 1980 MHz"
    )
    assert "forward 16/64 T=8192, 4 sets of 25.5 MiB" in lines
    (line, _) = (line for line in lines if line.startswith("  triton"))
    assert line.split()[1:5] == ["0.4", "-", "0.5", "-"], "device time, and until a call is done"
    assert line.endswith("; solve 0.2 + states 0.15")
    data = json.loads(json.dumps(result.to_json()))
    assert data["system"]["card"]["power_limit_w"] == 700.0
    (outcome,) = data["rows"][0]["outcomes"]
    assert outcome["launches"] == launches
    assert (outcome["kernel"], outcome["wall"], outcome["sm_mhz"]) == (0.4, 0.5, 1755.0)
    assert (outcome["sets"], outcome["set_mib"]) == (4, 25.5)
    # What a driver does not tell is null, and not said.
    result = GpuResult({**SYSTEM, "card": asdict(Card())})
    assert result.to_json()["system"]["card"] == dict.fromkeys(asdict(card))
    assert "clock" not in report.text(result)


def test_the_result_becomes_json_and_a_plot(script: Script, tmp_path: Path) -> None:
    result, _ = script.go(rows=ROWS[:4])
    written = report.write(result, tmp_path)
    assert written == [tmp_path / "gpu-nvidia-h200.json", tmp_path / "gpu-nvidia-h200.png"]
    assert (tmp_path / "gpu-nvidia-h200.png").read_bytes()[1:4] == b"PNG"
    data = json.loads((tmp_path / "gpu-nvidia-h200.json").read_text())
    assert data["schema"] == 1
    assert data["system"] == SYSTEM
    row = data["rows"][0]
    assert row["name"] == "forward 16/64 T=8192"
    assert row["sizes"]["HV"] == 64
    assert row["published"][0] == {"who": "flash_qla", "ms": 0.397, "what": "kernel"}
    goal = {"backend": "triton", "what": "kernel", "at_most": 0.5, "reached": False}
    assert row["goals"] == [goal]
    assert [o["contender"] for o in row["outcomes"]] == ["triton", "torch", "fla"]


def test_without_matplotlib_there_is_a_reason_instead_of_a_plot(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = script.go(rows=ROWS[:1])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, reason = report.write(result, tmp_path)
    assert reason == "no plot: package 'matplotlib.figure' is not installed"


def test_results_go_into_the_checkout_or_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(gdn_ops.__file__).resolve().parents[1]
    assert report.default_folder() == root / "benchmarks" / "results"
    monkeypatch.setattr(gdn_ops, "__file__", str(tmp_path / "site" / "gdn_ops" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert report.default_folder() == tmp_path


# The plan and the command.


def test_the_plan_takes_what_can_run_on_a_gpu_and_says_what_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = {"triton": "package 'triton' is not installed"}
    monkeypatch.setattr(registry, "known_backends", lambda: ["triton", "torch", "naive"])
    get_backend = registry.get_backend
    monkeypatch.setattr(registry, "get_backend", lambda n: answers.get(n) or get_backend(n))
    plan = command.make_plan([], command.PEERS, 450.0)
    assert plan.backends == ("torch",)
    assert plan.left_out == (
        ("triton", "package 'triton' is not installed"),
        ("tilelang", "this version has no such backend"),
    )
    assert command.make_plan(["naive"], [], 1.0).backends == ("naive",)
    with pytest.raises(ValueError, match="unknown peer 'x', known: fla, flash_qla, flashinfer"):
        command.make_plan([], ["x"], 1.0)
    with pytest.raises(gdn_ops.SpecError, match="unknown backend 'x'"):
        command.make_plan(["x"], [], 1.0)


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = command_line.run("bench", "gpu")
    assert result.exit_code == 2
    assert result.stderr == "gdn-ops: no GPU: torch.cuda.is_available() is False\n"
    assert command.main([]) == 2
    result = command_line.run("bench", "gpu", "--peer", "x")
    assert result.exit_code == 2
    assert "unknown peer 'x'" in result.stderr


@pytest.mark.parametrize("wrong", [False, True])
def test_the_command_runs_shows_and_ends_with_the_verdict(
    wrong: bool, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.red = {"torch"} if wrong else set()

    def fake(plan: Plan, system: Any, folder: Path, log: Any) -> GpuResult:
        assert (plan.backends, plan.peers, plan.seconds) == (("torch",), ("fla",), 60.0)
        plan = replace(plan, rows=ROWS[:1])
        return run(plan, system, folder, log, start=script.start, clock=script.clock)

    monkeypatch.setattr(command, "run", fake)
    monkeypatch.setattr(command, "system", lambda seconds: SYSTEM)
    arguments = ["bench", "gpu", "--backend", "torch", "--peer", "fla", "--seconds", "60"]
    result = command_line.run(*arguments, "--out", tmp_path)
    assert result.exit_code == int(wrong), result.output
    assert ("torch: FAILED" in result.output) == wrong
    assert "goals reached" in result.output
    assert str(tmp_path / "gpu-nvidia-h200.json") in result.output
