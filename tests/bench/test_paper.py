"""`gdn-ops bench paper` checks its models, measures all of them, and shows what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import run
from gdn_ops.bench.paper import attention, pages, show, suite
from gdn_ops.bench.paper.memory import bytes_of, formula_of, kept
from gdn_ops.bench.paper.plan import PARTS, QUICK, make_plan
from gdn_ops.bench.paper.skeletons import ATTENTION, MIXERS, build, state_behind
from gdn_ops.bench.verify import RefusedError
from gdn_ops.spec.errors import SpecError

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = tuple(MIXERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that a quick run has written."""
    folder = tmp_path_factory.mktemp("paper")
    threads = torch.get_num_threads()
    given = ("--quick", "--threads", 1, "--json", "--out", folder)
    result = run("bench", "paper", *given)
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    (folder / "stdout.json").write_text(result.stdout, encoding="utf-8")
    return folder


@pytest.fixture
def data(folder: Path) -> Any:
    return json.loads((folder / "paper-cpu-float32.json").read_text(encoding="utf-8"))


def test_a_quick_run_prints_and_writes_the_same_json(folder: Path, data: Any) -> None:
    assert json.loads((folder / "stdout.json").read_text(encoding="utf-8")) == data
    assert set(data) == {
        *("schema", "system", "rates", "checks", "rows", "skipped"),
        *("parameters", "energy", "break_even", "memory", "equal_context"),
    }
    system = data["system"]
    assert (system["device"], system["dtype"], system["threads"]["torch"]) == ("cpu", "float32", 1)
    assert {"date", "versions", "devices", "load", "seconds", "backends"} <= set(system)
    assert system["backends"][ATTENTION] is None
    assert system["backends"]["gdn"] in ("cpp", "torch")


def test_every_contender_has_a_row_at_every_length(data: Any) -> None:
    found = {
        (r["what"], r["width"], r["comparator"], r["length"], r["batch"]) for r in data["rows"]
    }
    expected = {
        (what, 128, name, length, 256 // length)
        for what in ("prefill", "training")
        for name in NAMES
        for length in QUICK.lengths
    }
    expected |= {("decode", 128, name, context, 1) for name in NAMES for context in QUICK.contexts}
    expected |= {
        (what, width, name, length, 128 // length)
        for what in ("layer forward", "layer forward+backward")
        for width in QUICK.widths
        for name in ("gdn", ATTENTION)
        for length in QUICK.width_lengths
    }
    assert found == expected
    assert len(data["rows"]) == len(expected)


def test_a_row_says_how_fast_and_how_much_it_varies(data: Any) -> None:
    rows = {(r["what"], r["width"], r["comparator"], r["length"]): r for r in data["rows"]}
    for (what, width, _, length), row in rows.items():
        assert 0 < row["best"] <= row["median"] <= row["worst"]
        tokens = 1 if what == "decode" else row["batch"] * row["length"]
        assert row["tokens_per_second"] == pytest.approx(1e3 * tokens / row["median"])
        own = rows[what, width, ATTENTION, length]["median"]
        assert row["ratio"] == pytest.approx(own / row["median"])
        assert (row["unit"], row["against"], row["dtype"]) == ("ms", ATTENTION, "float32")


def test_models_have_the_same_parameters_but_for_their_mixers(data: Any) -> None:
    counts = data["parameters"]
    assert set(counts) == set(NAMES)
    assert len({count["others"] for count in counts.values()}) == 1
    # q, k, v and o of attention; 0.75 for q and k, 1.5 for v, output gate and o of the others.
    assert counts[ATTENTION]["mixers"] == 6 * 4 * 128**2
    assert 1 < counts["gdn"]["mixers"] / (6 * 6 * 128**2) < 1.03


def test_break_even_is_told_of_every_contender(data: Any) -> None:
    found = [(x["what"], x["comparator"], x["width"]) for x in data["break_even"]]
    others = [name for name in NAMES if name != ATTENTION]
    expected = [(what, name, 128) for what in ("prefill", "training") for name in others]
    layers = [("layer forward", "gdn", w) for w in QUICK.widths]
    layers += [("layer forward+backward", "gdn", w) for w in QUICK.widths]
    assert found == expected + layers
    assert {x["where"] for x in data["break_even"]} <= {"below", "between", "above"}


def test_every_model_was_compared_before(data: Any) -> None:
    what = ("logits", "gradient", "a decoded token")
    assert [(c["comparator"], c["what"]) for c in data["checks"]] == [
        (name, part) for name in NAMES for part in what
    ]
    assert all(0 <= check["error"] < check["allowance"] for check in data["checks"])


@pytest.mark.parametrize("name", NAMES)
def test_the_state_behind_a_text_has_the_bytes_of_the_formula(name: str) -> None:
    model = build(name, QUICK.shape)
    with torch.no_grad():
        _, state = model(torch.zeros((1, 300), dtype=torch.int64))
    assert bytes_of(state) == formula_of(model, 300, torch.float32)
    assert bytes_of(state_behind(model, 300)) == bytes_of(state)
    one = kept(name, model, 300, torch.float32)
    assert (one.bytes, one.formula) == (bytes_of(state), bytes_of(state))
    assert one.keys_values == 6 * 300 * 2 * 128 * 4


def test_memory_is_told_of_every_model_and_context(data: Any) -> None:
    models = {one["model"] for one in data["memory"]}
    assert models == {*NAMES, "GDN 0.4B", "GDN-H1 0.4B", "GDN 1.3B", "GDN-H1 1.3B"}
    assert len(data["memory"]) == len(models) * len(QUICK.contexts)
    assert all(one["bytes"] == one["formula"] for one in data["memory"])
    attention = [one for one in data["memory"] if one["model"] == ATTENTION]
    assert all(one["bytes"] == one["keys_values"] for one in attention)
    equal = data["equal_context"]
    assert set(equal) == models - {ATTENTION}
    # 16 layers with 720,000 numbers of memory and 3 last inputs of 7,200 channels in bfloat16.
    gdn = next(one for one in data["memory"] if one["model"] == "GDN 1.3B")
    assert gdn["bytes"] == 16 * (4 * 720_000 + 2 * 3 * 7200)
    assert equal["GDN 1.3B"] == gdn["bytes"] / (16 * 2 * 2 * 2400)


def test_what_is_shown_is_what_was_measured(data: Any) -> None:
    text = show.text(data)
    assert "energy per token: absent: " in text or "energy of training in mJ a token" in text
    for row in data["rows"]:
        if row["what"] in ("training", "prefill"):
            assert f"{row['tokens_per_second'] / 1e3:.3g}" in text
        elif row["what"] == "decode":
            assert f"{row['median']:.3g}" in text
    # None of its lengths is one of the published ones.
    assert "published" not in text
    longer = json.loads(json.dumps(data).replace('"length": 256', '"length": 4096'))
    assert "published, one H100" in show.text(longer)


def test_the_tables_of_the_page_are_made_of_the_result(folder: Path, data: Any) -> None:
    made = pages.tables(folder)
    row = next(r for r in data["rows"] if (r["what"], r["comparator"]) == ("training", "h1"))
    assert f"{row['tokens_per_second'] / 1e3:.2f} (" in made["paper-training"]
    assert "| attention | 55 | 47.6 | 37.9 | 26.5 | 0.48 | – |" in made["paper-published"]
    assert "4756 tokens" in made["paper-claims"]
    assert made["paper-memory"].count("\n") == 1 + len(NAMES) + 4
    assert pages.tables(folder / "nothing")["paper-setting"] == pages.NONE


def test_the_picture_has_a_line_for_every_contender(folder: Path, data: Any) -> None:
    pytest.importorskip("matplotlib")
    from gdn_ops.bench.paper import figure

    assert (folder / "paper-cpu-float32.png").stat().st_size > 10_000
    drawn = figure.make(data).axes
    labels = [[line.get_label() for line in axis.get_lines()] for axis in drawn]
    every = [kind.label for kind in MIXERS.values()]
    assert [sorted(labels[i]) for i in (1, 2, 5)] == [sorted(every)] * 3
    speeds = drawn[1].get_lines()[0].get_ydata()
    rows = [r for r in data["rows"] if (r["what"], r["comparator"]) == ("training", "gdn")]
    assert list(speeds) == [r["tokens_per_second"] / 1e3 for r in rows]


@pytest.mark.parametrize(
    ("given", "text"),
    {
        "--mixers gdn,mamba": "unknown mixer 'mamba', known: gdn, deltanet, mamba2, linear, "
        "attention, h1, h2; did you mean 'mamba2'?",
        "--lengths 1024,3000": "bench paper: lengths has 3000, which does not divide tokens = "
        "16384; every batch should have as many tokens as the others",
        "--width 200": "bench paper: width is 200, should be a multiple of 128, the width for each "
        "head",
        "--device mps": "device 'mps' is not available: torch sees cpu",
        "--backend nope": "unknown backend 'nope'",
        "--lengths 1024,": "--lengths: is '1024,', should be names with commas, and no spaces",
        "--lengths 0": "--lengths: is '0', should be an integer from 1",
        "--minutes -1": "--minutes: is '-1', should be a finite number of at least 0",
        "--dtype int8": "--dtype: unknown dtype 'int8', known: float32, bfloat16, float16",
        "--out .": "--out: 'paper-cpu-float32.json' is a folder, should be a file",
    }.items(),
)
def test_a_mistake_is_told_before_anything_runs(
    given: str, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "run", lambda *_: pytest.fail("it ran"))
    Path("paper-cpu-float32.json").mkdir()
    result = run("bench", "paper", *given.split())
    assert result.exit_code == 2
    assert result.stderr.startswith(f"gdn-ops: {text}"), result.stderr


def test_options_take_the_place_of_defaults() -> None:
    plan = make_plan(mixers=("h1", "gdn", "h1"), lengths=(2048, 1024), width=384, minutes=3)
    assert (plan.mixers, plan.lengths) == (("h1", "gdn"), (1024, 2048))
    assert (plan.shape.width, plan.shape.inner, plan.shape.heads) == (384, 1024, 3)
    assert sum(plan.seconds(part) for part in PARTS) == pytest.approx(180)
    assert plan.setting.dtype == "float32"
    with pytest.raises(SpecError, match=r"^device 'gpu' is not available: torch sees"):
        make_plan(device="gpu")


def test_a_model_that_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "rotate", lambda x, positions: x)
    result = run("bench", "paper", "--quick", "--mixers", "attention")
    assert result.exit_code == 1
    assert "attention on T=80 in float32: logits off by" in result.stderr


def test_models_that_differ_in_more_than_mixers_are_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = iter(({"mixers": 5, "others": 7}, {"mixers": 6, "others": 8}))
    monkeypatch.setattr(suite, "count_parameters", lambda model: next(counts))
    text = (
        "models differ in more than their mixers: .*'gdn': .*'others': 7.*'linear': .*'others': 8"
    )
    with pytest.raises(RefusedError, match=text):
        suite.run(make_plan(is_quick=True, mixers=("gdn", "linear")))


def test_without_attention_nothing_is_compared_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite._Suite, "_check", lambda self: None)
    monkeypatch.setattr(suite._Suite, "_decode", lambda self: None)
    result = suite.run(make_plan(is_quick=True, mixers=("gdn",), lengths=(64,), tokens=64))
    assert [row.ratio for row in result.rows] == [None, None]
    assert result.crossings == []
    reason = "single layers compare gdn and attention, which are not both asked for"
    assert ("layer", "all", reason) in result.skipped
