"""A run of the benchmark: what is left out, what is refused, what is written."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gdn_ops.bench import measures, peers, report, rows, suite
from gdn_ops.bench.contender import Prepared, our_contender
from gdn_ops.bench.inputs import Inputs, Setting, find_case, make_inputs
from gdn_ops.bench.peers import find_contender
from gdn_ops.bench.verify import AT_ZERO, RefusedError, verify
from gdn_ops.spec.errors import SpecError
from gpu_stand_ins import FakeDevice, contender, stand_in

TINY = find_case("tiny")

pytestmark = pytest.mark.usefixtures("given_rates")


def put_peer(patch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Put a stand-in, whose results are changed, in the place of transformers."""
    peer = stand_in("transformers", FakeDevice(), change=change)
    patch.setitem(peers.PEERS, "transformers", peers.Peer(lambda: peer, ("*",)))


def test_an_absent_peer_is_a_reason_and_its_rows_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers.models.qwen3_next", None)
    reason = find_contender("transformers")
    assert isinstance(reason, str)
    assert reason.startswith("package 'transformers' is not usable")
    plan = _tiny_plan(("forward",), ("transformers",))
    result = suite.run(plan)
    assert result.skipped == [("all", "transformers", reason)]
    assert [row.comparator for row in result.rows] == ["torch"]
    assert result.rows[0].ratio is None


def _tiny_plan(what: tuple[str, ...], peer_names: tuple[str, ...]) -> suite.Plan:
    return suite.make_plan(["tiny"], what, ["torch"], peer_names, Setting(repeats=1))


def test_a_run_becomes_json_a_plot_and_a_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_peer(monkeypatch, lambda o: o)
    told: list[str] = []
    plan = _tiny_plan(("forward", "forward+backward"), ("transformers",))
    result = suite.run(plan, told.append)
    assert len(told) == plan.count()
    written = report.write(result, tmp_path / "results")
    assert written == [tmp_path / "results" / f"cpu-float32.{end}" for end in ("json", "png")]
    data = json.loads((tmp_path / "results" / "cpu-float32.json").read_text())
    assert data["schema"] == rows.SCHEMA
    assert {"date", "device", "dtype", "devices", "threads", "versions"} <= set(data["system"])
    rates = {"gflops", "gflops_registers", "gbytes", "gbytes_cached"}
    assert {dtype: set(found) for dtype, found in data["rates"].items()} == {"float32": rates}
    assert [(check["what"] == AT_ZERO, check["passed"]) for check in data["checks"]] == [
        *[(False, True)] * 2,
        *[(True, True)] * 2,
    ]
    assert data["system"]["peers"] == {"transformers": "1.0"}
    fields = {field.name for field in dataclasses.fields(rows.Row)}
    assert all(set(row) == fields for row in data["rows"])
    assert [(row["what"], row["comparator"]) for row in data["rows"]] == [
        (what, name) for what in plan.parts[0].cases for name in ("transformers", "torch")
    ]
    lines = report.text(result).splitlines()
    at = lines.index("forward+backward, tiny, float32, in ms")
    assert [line.split()[0] for line in lines[at + 1 :][:2]] == ["transformers", "torch"]
    assert (tmp_path / "results" / "cpu-float32.png").read_bytes()[1:4] == b"PNG"


def test_a_run_with_a_wrong_contender_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    put_peer(monkeypatch, lambda o: -o)
    timed: list[str] = []
    monkeypatch.setattr(measures, "sequence_rows", lambda what, *_: timed.append(what))
    with pytest.raises(RefusedError, match=r"transformers on tiny: o.* off by 2,"):
        suite.run(_tiny_plan(("forward",), ("transformers",)))
    assert timed == []


def test_a_backend_that_cannot_run_the_case_is_left_out_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gdn_ops.backends.torch import Torch

    monkeypatch.setattr(Torch, "reasons", lambda self, call: ["K=32 (supported: 128)"])
    result = suite.run(_tiny_plan(("forward",), ()))
    assert result.rows == []
    assert result.skipped == [("tiny", "torch", "K=32 (supported: 128)")]


def test_a_case_whose_channels_decay_is_measured_with_one_whose_heads_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = find_case("kimi-8-8-1024")
    short = dataclasses.replace(case, sizes=dataclasses.replace(TINY.sizes, T=40))
    monkeypatch.setattr(suite, "find_case", lambda name: short)
    given: list[tuple[int, ...]] = []
    sequence = our_contender("torch")
    assert not isinstance(sequence, str)

    def noted(x: Inputs) -> Prepared:
        given.append(tuple(x.log_alpha.shape))
        return sequence.sequence(x)

    peer = stand_in("transformers", FakeDevice(), change=lambda o: o)
    ours = dataclasses.replace(sequence, sequence=noted)
    monkeypatch.setattr(suite, "find_contender", {"transformers": peer, "torch": ours}.get)
    what = ("forward", "channels", "threads")
    plan = suite.make_plan([short.name], what, ["torch"], ("transformers",), Setting(repeats=1))
    result = suite.run(plan)
    assert [(row.what, row.comparator, row.unit) for row in result.rows] == [
        ("forward", "torch", "ms"),
        ("channels", "torch", "x"),
    ]
    assert result.rows[1].against == "a decay of every head" and result.rows[1].median > 0
    why = "takes no decay of every key channel here"
    assert result.skipped == [(short.name, "transformers", why)]
    s = short.sizes
    assert {shape for shape in given if shape[1] == s.T} == {
        (s.B, s.T, s.HV, s.K),
        (s.B, s.T, s.HV),
    }


@pytest.mark.parametrize(
    ("cases", "what", "text"),
    [
        (
            ["kimi-8-8-1024"],
            ["step"],
            "case 'kimi-8-8-1024' is a sequence with a decay of every key channel, which --what "
            "step does not measure: forward, forward+backward, channels, strengths does",
        ),
        (
            ["tiny"],
            ["forward", "channels"],
            "--what channels needs a case whose key channels decay, got tiny",
        ),
    ],
)
def test_channels_are_measured_of_cases_that_have_them(
    cases: list[str], what: list[str], text: str
) -> None:
    suite.check_effect(["kimi-8-8-1024"], ["forward", "channels"])
    with pytest.raises(SpecError) as raised:
        suite.check_effect(cases, what)
    assert str(raised.value) == text


def test_without_cases_the_first_dtype_has_the_reference_table_and_others_what_peers_do() -> None:
    settings = (Setting("float32"), Setting("bfloat16"))
    plan = suite.make_plan([], suite.WHAT, ["torch"], (), *settings)
    first, second = (
        {what: tuple(case.name for case in cases) for what, cases in part.cases.items()}
        for part in plan.parts
    )
    assert first == {**suite.REFERENCE, "overhead": (), "import": ()}
    assert second == {what: suite.REFERENCE[what] for what in suite.BESIDE}


def test_with_cases_every_dtype_has_every_measurement_but_the_import() -> None:
    settings = (Setting("float32"), Setting("bfloat16"))
    what = ("forward", "step", "overhead", "import")
    plan = suite.make_plan(["tiny", "tiny-step"], what, ["torch"], (), *settings)
    one, two = ({n: [c.name for c in cs] for n, cs in part.cases.items()} for part in plan.parts)
    assert two == {"forward": ["tiny"], "step": ["tiny-step"], "overhead": []}
    assert one == {**two, "import": []}


def test_two_dtypes_stand_beside_each_other_in_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    put_peer(monkeypatch, lambda o: o)
    settings = (Setting("float32", repeats=1), Setting("bfloat16", repeats=1))
    plan = suite.make_plan(["tiny"], ["forward"], ["torch"], ["transformers"], *settings)
    told: list[str] = []
    result = suite.run(plan, told.append)
    assert len(told) == plan.count()
    assert [(row.dtype, row.comparator) for row in result.rows] == [
        (dtype, name) for dtype in ("float32", "bfloat16") for name in ("transformers", "torch")
    ]
    assert [check.dtype for check in result.checks] == ["float32"] * 4 + ["bfloat16"] * 4
    assert set(result.rates) == {"float32", "bfloat16"}
    assert result.system["dtype"] == "float32,bfloat16"
    assert report.files(Path("x"), "cpu", "float32,bfloat16")[0].name == "cpu-float32-bfloat16.json"
    text = report.text(result)
    for dtype in ("float32", "bfloat16"):
        assert f"\nforward, tiny, {dtype}, in ms; floor" in text
        assert f"conformance: torch on tiny in {dtype}: o" in text


def test_a_second_peer_is_a_line_of_its_own_below_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    put_peer(monkeypatch, lambda o: o)
    other = stand_in("onnxruntime", FakeDevice())
    monkeypatch.setitem(peers.PEERS, "onnxruntime", peers.Peer(lambda: other, ("cpu",)))
    result = suite.run(_tiny_plan(("forward",), ("transformers", "onnxruntime")))
    lines = report.text(result).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("forward, tiny"))
    words = [line.split() for line in lines[at + 1 :][:4]]
    assert [line[0] for line in words[:3]] == ["transformers", "onnxruntime", "torch"]
    assert words[3][-1] == "onnxruntime" and words[3][0].endswith("x") and len(words[3]) == 3
    (panel,) = report.panels(result)
    assert [bar.name for bar in panel.bars] == ["transformers", "onnxruntime", "torch"]


def test_transformers_computes_the_same_function() -> None:
    pytest.importorskip("transformers")
    x = make_inputs(TINY.sizes, torch.float32)
    verify([contender("transformers")], TINY, x, gradients=True)


def test_a_family_name_means_its_shortest_sequence() -> None:
    assert find_case("qwen-16-32").name == "qwen-16-32-2048"


def test_float64_is_judged_by_the_definition_and_not_by_a_peer_in_float32() -> None:
    pytest.importorskip("transformers")
    what = ("forward", "forward+backward")
    setting = Setting("float64", "cpu", 1)
    plan = suite.make_plan(["tiny"], what, ["torch"], suite.default_peers("cpu"), setting)
    result = suite.run(plan)
    assert {row.comparator for row in result.rows} == {"torch"}
    assert all(check.passed for check in result.checks)
    assert result.rows[0].dtype == "float64"
    reasons = {name: reason for case, name, reason in result.skipped if case == "tiny"}
    assert "does not compute in float64, only in float32" in reasons["transformers"]


def test_onnxruntime_is_a_peer_of_forwards_in_float32() -> None:
    found = find_contender("onnxruntime")
    if isinstance(found, str):
        pytest.skip(found)
    x = make_inputs(TINY.sizes, torch.float32)
    (check,) = verify([found], TINY, x, gradients=False)
    assert check.passed
    plan = _tiny_plan(("forward", "forward+backward"), ("onnxruntime",))
    result = suite.run(plan)
    assert [(row.what, row.comparator) for row in result.rows] == [
        ("forward", "onnxruntime"),
        ("forward", "torch"),
        ("forward+backward", "torch"),
    ]
    assert result.rows[1].against == "onnxruntime"
    assert ("forward+backward, tiny", "onnxruntime", "has no backward") in result.skipped
