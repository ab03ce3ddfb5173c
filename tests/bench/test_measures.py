"""The benchmark takes turns, refuses wrong numbers, and writes what it measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gdn_ops import GATED_DELTA
from gdn_ops.bench import measures, rows, steps, suite
from gdn_ops.bench.child import call
from gdn_ops.bench.device import Peak, Run
from gdn_ops.bench.floors import CHUNK, Rates
from gdn_ops.bench.inputs import Setting, find_case, make_inputs
from gdn_ops.bench.measures import measure_peak, scaling_row
from gdn_ops.bench.turns import Timing, interleave
from gdn_ops.bench.verify import RefusedError, verify
from gpu_stand_ins import FakeDevice, contender, stand_in

TINY = find_case("tiny")
RATES = Rates(1e11, 1e10, 1e10)


def test_actions_take_turns_and_medians_leave_the_warm_up_out() -> None:
    device, log = FakeDevice(), []

    def works(name: str, *durations: float) -> Run:
        left = list(durations)

        def work() -> None:
            log.append(name)
            device.now += left.pop(0)

        return work

    actions = {
        "a": works("a", 100.0, 5.0, 3.0, 4.0),
        "b": works("b", 0.0, 1.0, 9.0, 2.0),
        "c": works("c", 1.0, 1.0, 1.0, 1.0),
    }
    timing = interleave(actions, 3, warmups=1, device=device)
    assert "".join(log) == "abcbcacababc"
    assert timing["a"] == Timing((5.0, 3.0, 4.0))
    assert (timing["a"].median, timing["a"].best) == (4.0, 3.0)
    assert (timing["b"].median, timing["b"].best) == (2.0, 1.0)


def test_benchmark_inputs_have_the_shapes_of_the_case_and_are_in_the_domains_of_the_spec() -> None:
    x = make_inputs(TINY.sizes, torch.bfloat16)
    assert x.q.shape == (2, 100, 2, 32)
    assert x.v.shape == (2, 100, 4, 48)
    assert (x.v.dtype, x.beta.dtype) == (torch.bfloat16, torch.float32)
    x = make_inputs(TINY.sizes, torch.float32)
    torch.testing.assert_close(x.k.norm(dim=-1), torch.ones(x.k.shape[:-1]))
    assert -0.1 < x.log_alpha.min() < x.log_alpha.max() <= 0
    assert 0 < x.beta.min() < x.beta.max() < 1


def test_right_contenders_pass_and_their_gradients_are_checked_too() -> None:
    x = make_inputs(TINY.sizes, torch.float32)
    checks = verify([contender(), contender("naive")], TINY, x, gradients=True)
    assert [check.passed for check in checks] == [True, True]
    assert all(check.error > 0 for check in checks)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: object, d: Tensor) -> Tensor:  # type: ignore[override]
        return d * 1.01


def _late_head(o: Tensor) -> Tensor:
    o = o.clone()
    o[:, 80:, 0] *= 1.01
    return o


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda o: o * 1.001, ".* off by 0.001, above the allowance"),
        (lambda o: o * float("nan"), "o of all heads off by nan"),
        (lambda o: torch.cat((o[:, :70], 2 * o[:, 70:]), 1), "o off by"),
        (_WrongGradient.apply, "d[a-z_]+ off by 0.01"),
        (_late_head, "[a-z]+ against torch off by"),
    ],
    ids=("scaled", "nan", "tail", "gradient", "one head late"),
)
def test_a_wrong_contender_is_refused(change: Callable[[Tensor], Tensor], what: str) -> None:
    x = make_inputs(TINY.sizes, torch.float32)
    with pytest.raises(RefusedError, match=f"no times are shown.*wrong on tiny: {what}"):
        wrong = stand_in("wrong", FakeDevice(), change=change)
        verify([contender(), wrong], TINY, x, gradients=True)


def test_rows_hold_the_ratio_of_medians_to_the_peer_and_the_floor() -> None:
    x = make_inputs(TINY.sizes, torch.float32)
    both = [stand_in("peer", FakeDevice()), contender()]
    measured = measures.sequence_rows("forward", TINY, x, both, Setting(repeats=2), RATES)
    assert [row.comparator for row in measured] == ["peer", "torch"]
    assert measured[0].ratio == 1.0
    assert measured[1].ratio == pytest.approx(measured[0].median / measured[1].median)
    assert {row.samples for row in measured} == {2}
    cost = GATED_DELTA.cost
    expected = max(cost.flops(TINY.sizes, CHUNK) / 1e11, cost.bytes(TINY.sizes, 4) / 1e10)
    assert measured[1].floor == pytest.approx(expected * 1e3)


@pytest.mark.parametrize(
    ("what", "case", "ratio", "median", "reached"),
    [
        ("forward", "qwen-16-32-2048", 4.0, 1.0, True),
        ("forward", "qwen-16-32-2048", 3.99, 1.0, False),
        ("forward", "qwen-16-32-2048", None, 1.0, None),
        ("memory", "qwen-16-32-4096", 0.33, 1.0, True),
        ("memory", "qwen-16-32-4096", 0.34, 1.0, False),
        ("scaling", "qwen-16-32-2048", None, 1.15, True),
        ("scaling", "qwen-16-32-2048", None, 1.16, False),
        ("overhead", "T=8", None, 61.0, False),
        ("step", "qwen-16-32-step-b1", 1.31, 1.0, False),
    ],
)
def test_targets_are_compared_with_what_they_bound(
    what: str, case: str, ratio: float | None, median: float, reached: bool | None
) -> None:
    bare = rows.Row(what, case, "torch", "ms", median, median, 1, ratio)
    row = rows.with_target(bare, rows.TARGETS)
    assert row.target is not None
    assert row.reached is reached
    assert rows.with_target(replace(bare, comparator="naive"), rows.TARGETS).target is None


def test_targets_are_for_float32_on_cpus() -> None:
    assert Setting().has_targets
    assert not Setting("bfloat16").has_targets
    assert not Setting(device="cuda").has_targets


def test_every_target_names_a_measurement_and_a_case_that_exist() -> None:
    for target in rows.TARGETS:
        assert target.what in suite.WHAT
        if target.case not in ("-", f"T={measures.OVERHEAD_TOKENS}"):
            assert find_case(target.case).name == target.case


def test_the_eager_steps_compute_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "REPEATS", 3)
    case = find_case("tiny-step")
    measured = steps.step_rows(case, ["torch"], Setting(), RATES)
    assert [row.comparator for row in measured] == ["torch", *steps.EAGER_STEPS]
    best = min(row.median for row in measured[1:])
    assert measured[0].ratio == pytest.approx(measured[0].median / best)


def test_a_wrong_eager_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = steps.as_sums
    monkeypatch.setitem(steps.EAGER_STEPS, "eager sums", lambda *a: right(*a[:-1], a[-1] * 1.01))
    with pytest.raises(RefusedError, match="step eager sums: o off by"):
        steps.step_rows(find_case("tiny-step"), ["torch"], Setting(), RATES)


def test_scaling_overhead_and_import_give_a_row_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "OVERHEAD_REPEATS", 3)
    monkeypatch.setattr(measures, "IMPORT_REPEATS", 1)
    setting = Setting(repeats=1)
    scaling = scaling_row(TINY, 2, "torch", setting)
    assert not isinstance(scaling, str), scaling
    assert scaling.median > 0
    assert (scaling.unit, scaling.against) == ("x", "T=200 over 2 times T=100")
    overhead = measures.overhead_row("torch", setting)
    assert (overhead.unit, overhead.samples) == ("us", 3)
    assert measures.import_row().median > 0


@pytest.mark.parametrize(
    "measure",
    [
        lambda: scaling_row(TINY, 2, "nobody", Setting(repeats=1)),
        lambda: call(measure_peak, "nobody", TINY.sizes, Setting()),
    ],
    ids=("scaling", "memory"),
)
def test_a_measuring_process_that_fails_is_a_reason(measure: Callable[[], object]) -> None:
    reason = measure()
    assert isinstance(reason, str)
    error = "gdn_ops.spec.errors.SpecError: unknown backend 'nobody'"
    assert reason.startswith(f"the measuring process ended with 1: {error}")


def test_peak_memory_grows_with_the_sequence() -> None:
    sizes = replace(TINY.sizes, T=600)
    peak = call(measure_peak, "naive", sizes, Setting())
    assert not isinstance(peak, str), peak
    # The definition keeps two states per token for its backward: 2 x 2 x 4 x 32 x 48 x 4 bytes.
    least = 600 * 2 * sizes.B * sizes.HV * sizes.K * sizes.V * 4
    assert least <= peak.bytes < 4 * least
    assert peak.baseline > 10_000_000


def test_memory_rows_are_ratios_to_the_peer() -> None:
    peaks = {"peer": Peak(4 << 20, 0, True), "torch": Peak(1 << 20, 0, True)}
    result = rows.Result({})
    names = ("peer", "torch", "x")
    measures.memory_rows("tiny", names, "peer", lambda n: peaks.get(n, "it broke"), result)
    assert [(row.comparator, row.median, row.ratio) for row in result.rows] == [
        ("peer", 4.0, 1.0),
        ("torch", 1.0, 0.25),
    ]
    assert result.skipped == [("memory", "x", "it broke")]
