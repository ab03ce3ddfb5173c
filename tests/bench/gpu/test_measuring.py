"""`bench gpu` measures a row: what is timed and how, what is not and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import gdn_ops
from gdn_ops.backends.torch import Torch
from gdn_ops.bench import turns
from gdn_ops.bench.contender import Contender
from gdn_ops.bench.gpu import conformance, measuring
from gdn_ops.bench.gpu.device import BrokenDeviceError
from gdn_ops.bench.gpu.measuring import measure_row
from gdn_ops.bench.gpu.result import Outcome, reached, roofline_seconds
from gdn_ops.bench.gpu.rows import ROWS, GpuRow
from gdn_ops.bench.inputs import Inputs, make_cotangents
from gdn_ops.testing.oracle import Verdict
from gpu_stand_ins import BACKWARD, BACKWARD_PACKED, FORWARD, STEP, FakeDevice, stand_in


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up clock has no noise."""
    monkeypatch.setattr(turns, "ROUNDS", (2, 3))


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


def measure(
    device: FakeDevice, row: GpuRow, *contenders: Contender, seconds: float = 1000.0
) -> dict[str, Outcome]:
    outcomes = measure_row(row, contenders, device, seconds, lambda event: None)
    return {o.contender: o for o in outcomes}


def measure_one(device: FakeDevice, row: GpuRow = FORWARD, **work: Any) -> Outcome:
    return measure(device, row, stand_in("a", device, **work))["a"]


@pytest.mark.parametrize("row", (FORWARD, BACKWARD, STEP), ids=lambda row: row.what)
def test_a_row_has_every_number_of_everybody(row: GpuRow, device: FakeDevice) -> None:
    events: list[dict[str, Any]] = []
    both = [stand_in("a", device), stand_in("b", device, 4e-3)]
    outcomes = measure_row(row, both, device, 1000.0, events.append)
    for o, ms in zip(outcomes, (1.0, 4.0), strict=True):
        assert (o.status, o.kernel_by, o.samples) == ("measured", "graph", turns.ROUNDS[1])
        assert o.kernel == pytest.approx(ms)
        assert o.wall == o.host == pytest.approx(ms)
        assert o.error is not None and o.error < 1e-5
        assert o.peak == 3.0
        assert o.first_call is not None
    at = [event["at"] for event in events if "at" in event]
    assert at == ["reference", "a", "b", "timing"]
    assert [e["outcome"]["contender"] for e in events if "outcome" in e] == ["a", "b"]


def test_the_roofline_fraction_is_the_floor_over_the_kernel_time(device: FakeDevice) -> None:
    floor = roofline_seconds(FORWARD, "NVIDIA H200")
    assert floor is not None
    assert measure_one(device).roofline == pytest.approx(floor / 1e-3)
    assert measure_one(FakeDevice("a card that nobody knows")).roofline is None


def test_contenders_take_turns_and_every_round_starts_with_another(device: FakeDevice) -> None:
    log: list[str] = []
    measure(device, FORWARD, *(stand_in(n, device, 1.0, log=log) for n in "abc"))
    assert "".join(log).endswith("abcbcacab" + "abcbcacab")


def test_short_work_is_captured_several_times_and_divided(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "MOST_REPEATS", 4)
    outcomes = measure(device, FORWARD, stand_in("a", device, 5e-4), stand_in("b", device, 1e-9))
    assert device.captured == [2, 4]
    assert outcomes["a"].kernel == pytest.approx(0.5)


@pytest.mark.parametrize("row", (FORWARD, BACKWARD, STEP), ids=lambda row: row.what)
def test_sets_of_operands_together_twice_the_cache_take_turns(
    row: GpuRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "MOST_SETS", 6)
    x = row.draw("cpu")
    tensors = (*x.operands(), *(make_cotangents(x) if row is BACKWARD else ()))
    size = sum(y.numel() * y.element_size() for y in tensors)
    device = FakeDevice(l2=2 * size + 1)
    seen: dict[str, set[int]] = {"q": set(), "state": set()}

    def look(x: Inputs) -> None:
        assert x.state is not None
        seen["q"].add(x.q.data_ptr())
        seen["state"].add(x.state.data_ptr())

    outcome = measure_one(device, row, before=look)
    assert {name: len(places) for name, places in seen.items()} == {"q": 5, "state": 5}
    assert device.captured == [5]
    assert outcome.kernel == pytest.approx(1.0), "per call, not per graph"
    assert outcome.error is not None and outcome.error < 1e-5, "all have the same values"
    assert outcome.sets == 5
    assert outcome.set_mib == size / 2**20
    device = FakeDevice(l2=1 << 40)
    measure_one(device, row, seconds=1.0)
    assert device.captured == [6]


def test_operands_larger_than_the_cache_are_one_set() -> None:
    outcome = measure_one(FakeDevice(l2=100))
    assert outcome.sets == 1


def test_the_clocks_after_a_row_are_told(device: FakeDevice) -> None:
    o = measure_one(device)
    assert (o.sm_mhz, o.memory_mhz) == (1755.0, 3201.0)


def test_a_row_of_ours_holds_its_launches_and_one_of_a_peer_none(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [{"name": "states", "ms": 0.2}]
    monkeypatch.setattr(measuring, "time_launches", lambda name, run, device: found)
    ours = replace(stand_in("ours", device), is_peer=False)
    monkeypatch.setattr(Contender, "reasons", lambda *_: [])
    outcomes = measure(device, FORWARD, ours, stand_in("peer", device))
    assert outcomes["ours"].launches == found
    assert outcomes["peer"].launches == []


def test_what_cannot_be_captured_is_timed_by_events_and_says_so(device: FakeDevice) -> None:
    device.refuses_capture = True
    o = measure_one(device)
    assert (o.status, o.kernel_by) == ("measured", "events")
    assert o.reason == "not captured: RuntimeError: called a synchronizing CUDA operation"
    assert o.kernel == pytest.approx(1.0)


def test_a_capture_without_memory_fails_and_is_not_timed_by_events(device: FakeDevice) -> None:
    device.is_full = True
    o = measure_one(device)
    assert (o.status, o.kernel) == ("failed", None)
    assert o.reason == "RuntimeError: operation failed due to a previous error during capture"


def test_wrong_numbers_have_no_time(device: FakeDevice) -> None:
    wrong = stand_in("wrong", device, change=lambda o: o * 1.1)
    nan = stand_in("nan", device, change=lambda o: o * math.nan)
    outcomes = measure(device, FORWARD, wrong, nan, stand_in("right", device))
    assert outcomes["wrong"].status == outcomes["nan"].status == "wrong"
    assert outcomes["wrong"].kernel is None
    assert outcomes["wrong"].reason == "o is off by 0.1, more than 0.01: no time is shown"
    assert outcomes["right"].status == "measured"


def test_an_exception_is_a_row_with_its_text_and_not_the_end(device: FakeDevice) -> None:
    def fail(x: Inputs) -> None:
        raise NotImplementedError("Triton 3.6 on Hopper\ngets the backward wrong")

    fla = stand_in("fla", device, before=fail)
    outcomes = measure(device, FORWARD, fla, stand_in("b", device))
    assert outcomes["fla"].status == "failed"
    assert outcomes["fla"].reason == "NotImplementedError: Triton 3.6 on Hopper"
    assert outcomes["b"].status == "measured"


def test_reasons_are_told_without_running(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    monkeypatch.setattr(Contender, "reasons", lambda *_: ["K=8 (supported: 128)", "no step"])
    o = measure_one(device, log=log)
    assert (o.status, o.reason) == ("unsupported", "K=8 (supported: 128); no step")
    assert log == []


def test_who_comes_after_the_time_is_named(device: FakeDevice) -> None:
    both = (stand_in("slow", device, 50.0), stand_in("late", device))
    outcomes = measure(device, FORWARD, *both, seconds=60.0)
    assert outcomes["slow"].status == "measured"
    assert outcomes["slow"].samples == turns.ROUNDS[0]
    late = outcomes["late"]
    assert (late.status, late.reason) == ("left out", "not measured: time")


def test_a_broken_device_ends_the_row_with_a_name(device: FakeDevice) -> None:
    def break_it(x: Inputs) -> None:
        device.is_broken = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    bad = stand_in("bad", device, before=break_it)
    with pytest.raises(BrokenDeviceError, match=r"^bad: RuntimeError: CUDA error: an illegal"):
        measure(device, FORWARD, stand_in("a", device), bad)


def test_a_reference_that_does_not_fit_leaves_the_error_out(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measuring, "exact_backward", too_large)
    o = measure_one(device, BACKWARD_PACKED)
    assert (o.status, o.error) == ("measured", None)
    assert o.reason == "error not measured: OutOfMemoryError: CUDA out of memory"


def test_a_goal_is_reached_missed_or_not_measured() -> None:
    goal = ROWS[0].goals[0]
    made = Outcome("triton", "1", False, "measured", kernel=goal.at_most)
    assert reached(goal, made) is True
    assert reached(goal, replace(made, kernel=goal.at_most * 1.01)) is False
    assert reached(goal, replace(made, status="wrong")) is None
    assert reached(goal, replace(made, kernel=None)) is None


# The short check.


@pytest.fixture
def small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls, narrow and short: the wide ones take a minute on a CPU."""
    small = {"K": 8, "V": 16}
    calls = [
        (law, replace(e, **small, T=min(e.T, 12), lengths=None if e.lengths is None else (7, 5)))
        for law, e in conformance.CALLS
    ]
    monkeypatch.setattr(conformance, "CALLS", tuple(calls))


def test_the_short_check_passes_a_right_backend(small_calls: None) -> None:
    checks = list(conformance.short_check("torch", "cpu", 100.0))
    assert all(c.passed for c in checks)
    assert checks[-1].examples == checks[-1].total == len(conformance.CALLS)
    assert 0 < checks[-1].worst <= 1


def test_the_short_check_stops_at_its_time(small_calls: None) -> None:
    now = iter([0.0, 100.0])
    checks = list(conformance.short_check("torch", "cpu", 10.0, lambda: next(now)))
    assert [c.passed for c in checks] == [True] * 3
    assert "print(judge(Example(dtype='bfloat16'" in checks[0].text, "what is at work is told"
    assert (checks[-1].examples, checks[-1].total) == (1, len(conformance.CALLS))
    assert checks[-1].text == "the time of 10 s was up"


def broken(monkeypatch: pytest.MonkeyPatch, forward: Callable[[Any, gdn_ops.Forward], Any]) -> None:
    """Change what the forward of torch returns."""
    right = Torch.forward
    monkeypatch.setattr(Torch, "forward", lambda self, call: forward(call, right(self, call)))


def test_the_short_check_fails_a_wrong_backend_with_the_smallest_call_as_code(
    small_calls: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(call: Any, out: gdn_ops.Forward) -> gdn_ops.Forward:
        return out._replace(final_state=out.final_state * (1.5 if call.sizes.T > 4 else 1.0))

    broken(monkeypatch, wrong)
    check = list(conformance.short_check("torch", "cpu", 100.0))[-1]
    assert not check.passed
    assert check.text.startswith("WRONG: final_state")
    code = check.text.partition("\n")[2]
    # One head of each kind, no initial state: what is at its default is not shown.
    example = "Example(dtype='bfloat16', T=5, K=8, V=16, gate='slow', log_gate=True)"
    assert example in code
    shown: list[Verdict] = []
    exec(code, {"print": shown.append})
    assert not shown[0].passed
    # With no time left the call is shown as it was found.
    now = iter([0.0, 100.0])
    check = list(conformance.short_check("torch", "cpu", 10.0, lambda: next(now, 100.0)))[-1]
    assert not check.passed and "T=12, H=2, R=2" in check.text


def test_the_code_of_a_law_that_fails_judges_the_law(
    small_calls: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = conformance.rows_of_a_batch_do_not_meet
    calls = tuple(pair for pair in conformance.CALLS if pair[0] is law)
    monkeypatch.setattr(conformance, "CALLS", calls)

    def wrong(call: Any, out: gdn_ops.Forward) -> gdn_ops.Forward:
        return out._replace(o=out.o + 0.1 * out.o.flip(0))

    broken(monkeypatch, wrong)
    check = list(conformance.short_check("torch", "cpu", 100.0))[-1]
    shown: list[Verdict] = []
    exec(check.text.partition("\n")[2], {"print": shown.append})
    assert not check.passed and not shown[0].passed


def test_the_short_check_fails_a_backend_that_raises_and_not_one_without_memory(
    small_calls: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Exception] = [RuntimeError("no kernel\nat all"), torch.OutOfMemoryError("full")]

    def fail(call: Any, out: gdn_ops.Forward) -> gdn_ops.Forward:
        raise errors[0]

    broken(monkeypatch, fail)
    check = list(conformance.short_check("torch", "cpu", 100.0))[-1]
    assert (check.passed, check.examples) == (False, 1)
    assert check.text.startswith("raised RuntimeError: no kernel\nfrom gdn_ops.testing import")
    errors.reverse()
    check = list(conformance.short_check("torch", "cpu", 100.0))[-1]
    assert (check.passed, check.examples) == (True, 0)
    assert check.text.startswith("not judged: OutOfMemoryError: full\nfrom gdn_ops.testing")


@pytest.mark.slow
def test_the_wide_calls_of_the_short_check_are_right() -> None:
    checks = list(conformance.short_check("torch", "cpu", 1e6))
    assert [c.passed for c in checks] == [True] * len(conformance.CALLS)


def test_a_backend_is_asked_only_what_it_can() -> None:
    limits = gdn_ops.Limits(devices=("*",), dtypes=("bfloat16",), head_dims=(128,), varlen=False)
    asked = [e for _, e in conformance.CALLS if conformance._is_within(limits, e)]
    wide = [e for _, e in conformance.CALLS if e.channels]
    assert len(wide) == 6 and [e.apart for e in wide if e.apart] == ["channels"]
    assert len(asked) == len(conformance.CALLS) - 3 - len(wide)
    assert {(e.dtype, e.K, e.V, e.lengths) for e in asked} == {("bfloat16", 128, 128, None)}
    decays: tuple[Any, ...] = ("none", "scalar", "channel")
    of_steps = replace(limits, decode_decays=decays)
    (step,) = (
        e for law, e in conformance.CALLS if "step" in law.__name__ and e.channels and e.B > 1
    )
    assert conformance._is_within(of_steps, step, decode=True)
    assert not conformance._is_within(of_steps, step)
    of_channels = replace(limits, decays=decays)
    asked = [e for e in wide if conformance._is_within(of_channels, e)]
    assert len(asked) == 4, "neither the packed one nor that of erase and write"
    apart = replace(of_channels, apart=True, erases=decays, writes=("scalar", "channel"))
    assert sum(conformance._is_within(apart, e) for e in wide) == 5
